"""Whether NIXL carries a device's memory here: registered, sent from, and received into. Tried in a process of its own.

For ``anyep doctor``: exchanges between hosts go through host memory, whatever comes of it (docs/gpu.md says why). In a
process of its own, because NIXL tells its reasons to the standard error stream alone, and because an installation that
does not fit may end the process that asks.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from anyep.errors import Unavailable
from anyep.transport.nixl_agent import load_nixl

_NUM_WORDS = 1 << 18
_LONGEST_S = 20.0
_TIMEOUT_S = 120.0
_NAP_S = 0.0002
_REASON = re.compile(r"^E\d{4} .*?\] (?:nixlUcx\w+ \S+: )?(.+)$", re.MULTILINE)
"""A line in which NIXL says what was wrong, as Google's logging writes it."""


class Tried(NamedTuple):
    """What came of it."""

    possible: bool
    text: str


def try_device(where: str, command: Sequence[str] = (sys.executable, "-m", __name__)) -> Tried:
    """Try the memory of a device, such as ``"cuda:0"``. Never raises: what went wrong is told."""
    try:
        ended = subprocess.run([*command, where], capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as failure:
        return Tried(False, f"could not be tried on {where}: {failure}")
    reason = _REASON.search(ended.stderr)
    try:
        told = json.loads(ended.stdout.splitlines()[-1])
        error, kinds = told["error"], ", ".join(told["kinds"])
    except (IndexError, KeyError, TypeError, ValueError):
        last = reason[1] if reason else (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Tried(False, f"the attempt on {where} ended with code {ended.returncode}: {last}")
    if error is None:
        return Tried(True, f"{where} was registered, sent from and received into; UCX names {kinds}")
    why = f"{error}: {reason[1]}" if reason else error
    return Tried(False, f"{where}: {why}; UCX names {kinds or 'no memory'}")


def main(where: str) -> None:
    """Try it, and print a JSON object. Ends the process: what NIXL has loaded may not survive an orderly end."""
    kinds: list[str] = []
    error: str | None = None
    try:
        _carry(torch.device(where), kinds)
    except Exception as found:  # NIXL's errors have no common kind
        error = f"{type(found).__name__}: {found}"
    print("\n" + json.dumps({"kinds": kinds, "error": error}), flush=True)
    os._exit(0)


def _carry(device: torch.device, kinds: list[str]) -> None:
    """Send numbers that the device has made to host memory, and others back. Raises whatever does not work."""
    nixl = load_nixl()
    name = f"anyep-trial-{secrets.token_hex(8)}"
    agent: Any = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
    agent.create_backend("UCX", {})
    kinds += agent.get_backend_mem_types("UCX")
    there = torch.arange(_NUM_WORDS, dtype=torch.int32, device=device)
    here = torch.zeros(_NUM_WORDS, dtype=torch.int32, device="cpu")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    registered = [agent.register_memory([(*_block(one), "")], _kind(one)) for one in (there, here)]
    _write(agent, name, there, here)
    _check(here, torch.arange(_NUM_WORDS, dtype=torch.int32), f"what was sent from {device}")
    here.neg_()
    _write(agent, name, here, there)
    _check(there.cpu(), here, f"what was received on {device}")
    for one in registered:
        agent.deregister_memory(one)


def _block(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return address, bytes and the device's number, as NIXL names memory."""
    return tensor.data_ptr(), tensor.nbytes, max(0, tensor.get_device())


def _kind(tensor: torch.Tensor) -> str:
    return "VRAM" if tensor.is_cuda else "DRAM"


def _write(agent: Any, name: str, source: torch.Tensor, target: torch.Tensor) -> None:
    ends = [agent.get_xfer_descs([_block(one)], _kind(one)) for one in (source, target)]
    handle = agent.initialize_xfer("WRITE", *ends, name, b"")
    state, began = agent.transfer(handle), time.monotonic()
    while state == "PROC" and time.monotonic() - began < _LONGEST_S:
        time.sleep(_NAP_S)
        state = agent.check_xfer_state(handle)
    if state != "DONE":
        raise Unavailable(f"a write of {source.nbytes} bytes from {source.device} to {target.device} ended as {state}")
    agent.release_xfer_handle(handle)


def _check(came: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if not torch.equal(came, expected):
        raise Unavailable(f"{what} differs in {int((came != expected).sum())} of {expected.numel()} numbers")


if __name__ == "__main__":
    main(sys.argv[1])
