"""``anyep doctor``: what this machine has, what is possible on it, and what is not, with the reason."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from anyep.cli import machine_facts as facts
from anyep.errors import AnyEPError, Unavailable
from anyep.machine.processes import lie_alike

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 120
_BASIC_BYTES = 1 << 30
"""Two small ranks."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. ``possible`` None: a plain fact."""

    topic: str
    text: str
    possible: bool | None = None
    needed: bool = False
    """without it the basic job is impossible"""


@click.command()
@click.option("--peers", is_flag=True, help="Run by every rank of a job: who reaches whom, how soon, how fast.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "nixl", "gloo"]),
    default="auto",
    show_default=True,
    help="Between hosts, with --peers.",
)
@click.option("--interface", help="Network interface of this rank, with --peers.  [default: as the engine chooses]")
@click.option(
    "--timeout", type=click.FloatRange(0.1, 3600), default=10.0, show_default=True, help="Seconds, with --peers."
)
def doctor(peers: bool, engine: str, interface: str | None, timeout: float) -> None:
    """Say what is possible on this machine, what is not, and why.

    Exit code 0 when the basic job is possible: two ranks that exchange tokens. With --peers: when all hosts of the job
    reach each other.
    """
    if not peers:
        given = [name for name in ("engine", "interface", "timeout") if _is_given(name)]
        if given:
            raise click.UsageError(f"--{given[0]} goes with --peers, which every rank of a job runs")
    if peers:
        from anyep.cli.doctor_peers import run_peers

        code = run_peers(engine, interface, timeout)
        if code:
            raise click.exceptions.Exit(code)
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    findings = [*_machine(), *_calls(), *_transports(), *_comparisons()]
    _print(findings, console)
    missing = [finding for finding in findings if finding.needed and not finding.possible]
    if missing:
        console.print(f"\nThe basic job is impossible here: {', '.join(finding.topic for finding in missing)}.")
        raise click.exceptions.Exit(1)
    console.print("\nThe basic job is possible here; try: anyep bench --ranks 2 --tokens 128")


def _is_given(option: str) -> bool:
    """Whether the user gave an option, rather than leave it at its default."""
    return click.get_current_context().get_parameter_source(option) is not ParameterSource.DEFAULT


def _print(findings: list[Finding], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    marks = {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}
    for finding in findings:
        table.add_row(finding.topic, marks[finding.possible], Text(finding.text))
    console.print(table, highlight=False)


def _machine() -> list[Finding]:
    described = facts.describe_machine()
    packages = [f"{name} {described[name]}" for name in ("anyep", "torch", "numba", "numpy") if name in described]
    return [
        Finding(topic="processor", text=f"{described['cpu']}, {described['cores']} cores usable"),
        Finding(topic="system", text=f"{described['system']}, Python {described['python']}"),
        Finding(topic="packages", text=", ".join(packages)),
        _memory(),
        _shared_memory(),
        _cache(),
        _addresses(),
    ]


def _memory() -> Finding:
    total, available, free = facts.total_memory_bytes(), facts.available_memory_bytes(), facts.free_memory_bytes()
    if total is None or available is None or free is None:
        return Finding(topic="memory", text="this system does not say how much there is")
    limit = "no cgroup limits it" if available >= free else f"{_gib(free)} but for a cgroup's limit"
    return Finding(
        topic="memory",
        text=f"{_gib(total)}, available {_gib(available)}, {limit}",
        possible=available >= _BASIC_BYTES,
        needed=True,
    )


def _shared_memory() -> Finding:
    text = "arenas are unnamed and lie in ordinary memory; /dev/shm is only used by MPI"
    if os.path.isdir("/dev/shm"):
        return Finding(
            topic="shared memory", text=f"/dev/shm has {_gib(shutil.disk_usage('/dev/shm').free)} free; {text}"
        )
    return Finding(topic="shared memory", text=f"no /dev/shm; {text}")


def _cache() -> Finding:
    try:
        from anyep.machine.compiler import cache_directory, cached_functions

        directory = cache_directory()
    except (AnyEPError, ImportError) as error:
        return Finding(topic="kernel cache", text=str(error), possible=False, needed=True)
    kernels = len(cached_functions())
    state = f"{kernels} functions compiled" if kernels else "empty: the first buffer compiles, some ten seconds"
    return Finding(topic="kernel cache", text=f"{directory}, {state}", possible=True, needed=True)


def _addresses() -> Finding:
    if lie_alike():
        return Finding(topic="addresses", text="the same in every process that is started from here")
    return Finding(
        topic="addresses",
        text="random in each program that is started; where ranks share cores, setarch -R saves time (bench does it)",
    )


def _calls() -> list[Finding]:
    return [
        _attempt("memfd", "memory that ranks share and nobody names", _try_memfd),
        _attempt("pidfd", "a dead peer is noticed at once", _try_pidfd),
        _attempt("futex", "waiting ranks sleep", _try_futex),
    ]


def _attempt(topic: str, text: str, call: Callable[[], object]) -> Finding:
    try:
        call()
    except (OSError, AttributeError) as error:
        return Finding(topic=topic, text=f"{text}; not here: {error}", possible=False)
    return Finding(topic=topic, text=text, possible=True)


def _try_memfd() -> None:
    os.close(os.memfd_create("anyep-doctor"))


def _try_pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _try_futex() -> None:
    """Wake nobody: the call itself is what may be missing or forbidden."""
    import ctypes
    import platform

    numbers = {"x86_64": 202, "aarch64": 98}
    machine = platform.machine()
    if sys.platform != "linux" or machine not in numbers:
        raise OSError("no futex call known here")
    wake_private, word = 129, ctypes.c_int(0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(numbers[machine], ctypes.byref(word), wake_private, 1, None, None, 0) < 0:
        raise OSError(ctypes.get_errno(), "futex")


def _transports() -> list[Finding]:
    return [
        Finding(topic="transport inprocess", text="ranks as threads of one process", possible=True, needed=True),
        _attempt("transport shm", "rank processes of one host, which needs memfd", _try_memfd),
        _between_hosts_gloo(),
        _between_hosts_nixl(),
        _cuda(),
        _gpu_memory_nixl(),
    ]


def _between_hosts_gloo() -> Finding:
    possible = _has_gloo()
    text = "over TCP, comes with torch" if possible else "this build of torch has no gloo"
    return Finding(topic="between hosts gloo", text=text, possible=possible)


def _between_hosts_nixl() -> Finding:
    """Load it: a package that is there and cannot be loaded is of no use."""
    from anyep.transport.nixl_agent import load_nixl

    try:
        load_nixl()
    except Unavailable as error:
        return Finding(topic="between hosts nixl", text=str(error), possible=False)
    return Finding(topic="between hosts nixl", text="over UCX, preferred where all ranks have it", possible=True)


def _cuda() -> Finding:
    import torch

    from anyep.kernels.gpu.loading import why_no_gpu

    if not torch.cuda.is_available():
        return Finding(topic="CUDA tensors", text=why_no_gpu(), possible=False)
    if importlib.util.find_spec("triton") is None:
        return Finding(topic="CUDA tensors", text="the kernels need Triton: pip install 'anyep[gpu]'", possible=False)
    number = torch.cuda.device_count()
    return Finding(topic="CUDA tensors", text=f"{number} x {torch.cuda.get_device_name(0)}", possible=True)


def _gpu_memory_nixl() -> Finding:
    """Try it where there is a GPU. No exchange depends on it."""
    import torch

    from anyep.transport.nixl_agent import load_nixl
    from anyep.transport.nixl_device import try_device

    topic, staged = "GPU memory nixl", "rows of a GPU pass through pinned host memory with and without it"
    if not torch.cuda.is_available():
        return Finding(topic=topic, text=f"torch finds no GPU to try it on; {staged}", possible=False)
    try:
        load_nixl()
    except Unavailable as error:
        return Finding(topic=topic, text=str(error), possible=False)
    tried = try_device(f"cuda:{torch.cuda.current_device()}")
    return Finding(topic=topic, text=f"{tried.text}; {staged}", possible=tried.possible)


def _comparisons() -> list[Finding]:
    return [_gloo(), _mpich()]


def _has_gloo() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_gloo_available()


def _gloo() -> Finding:
    possible = _has_gloo()
    text = "all_to_all_single, as Megatron uses it" if possible else "this build of torch has no gloo"
    return Finding(topic="comparison gloo", text=text, possible=possible)


def _mpich() -> Finding:
    from anyep.cli.bench.peers import find_mpiexec

    try:
        launcher = find_mpiexec()
    except AnyEPError as error:
        return Finding(topic="comparison mpich", text=str(error), possible=False)
    return Finding(topic="comparison mpich", text=f"Alltoallv, started by {launcher}", possible=True)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
