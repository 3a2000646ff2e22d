"""The command ``anyep``: one clear line for every mistake, never a traceback for what a user can cause.

Exit codes: 0 done and verified; 1 a check failed or the machine cannot do it; 2 bad options; 130 interrupted, 129 and
143 where the terminal went away and where somebody ended it.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

import click

from anyep.cli.bench.command import bench
from anyep.cli.compat_path import compat_path
from anyep.cli.doctor import doctor
from anyep.errors import AnyEPError
from anyep.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="anyep")
@click.pass_context
def cli(context: click.Context) -> None:
    """Expert-parallel communication for Mixture-of-Experts models."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


cli.add_command(bench)
cli.add_command(compat_path)
cli.add_command(doctor)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit the process."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, _end)
    sys.exit(run(arguments))


def _end(number: int, frame: FrameType | None) -> None:
    """Unwind as Ctrl-C does, so that ranks and temporary files do not outlive the command."""
    click.echo(f"anyep: ended by {signal.Signals(number).name}", err=True)
    sys.exit(128 + number)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    try:
        return cli.main(arguments, prog_name="anyep", standalone_mode=False) or 0
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "anyep"
        click.echo(f"{command}: {error.format_message()} (see {command} --help)", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("anyep: interrupted", err=True)
        return 130
    except AnyEPError as error:
        click.echo(f"anyep: {type(error).__name__}: {error}", err=True)
        return 1
