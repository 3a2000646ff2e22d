"""Where a rank runs: what it tells the others about its process, and what they can see of it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from anyep import config
from anyep.machine import processes


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A rank's process. ``started`` tells it from a later one of the same number; '' where nothing tells."""

    host: str
    process_namespace: str
    pid: int
    started: str = ""

    @classmethod
    def own(cls) -> Identity:
        return cls(
            host=config.host_id() or processes.host_identity(),
            process_namespace=processes.process_namespace(),
            pid=os.getpid(),
            started=processes.start_time(os.getpid()),
        )

    def has_ended(self) -> bool:
        """Whether this process has ended; False where it cannot be seen from here."""
        here = Identity.own()
        seen = self.started and (self.host, self.process_namespace) == (here.host, here.process_namespace)
        return bool(seen) and processes.start_time(self.pid) != self.started
