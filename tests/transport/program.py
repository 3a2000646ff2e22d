"""One rank of a job that torchrun or mpiexec starts: exchanges on four transports and tells what came."""

from __future__ import annotations

import sys

from anyep.transport.registry import open_transport
from tests.transport.ranks import LANES, exchange


def main(launcher: str) -> None:
    group = None
    if launcher == "mpi":
        from mpi4py import MPI

        group = MPI.COMM_WORLD
    told = ""
    for _ in range(2):
        one, other = (
            open_transport(
                group, transport="auto", lanes=LANES, ring=2, heap_bytes=1 << 20, timeout_s=60.0, poison=True
            ).transport
            for _ in range(2)
        )
        told += f"{exchange(other, 5)}{exchange(one, 5)}"
        one.close()
        other.close()
    print(f"rank {one.rank} exchanged {told};", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
