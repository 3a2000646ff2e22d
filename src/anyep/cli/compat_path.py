"""``anyep compat-path``: the directory that makes ``import deep_ep`` find AnyEP."""

from __future__ import annotations

from pathlib import Path

import click

import anyep.compat


@click.command("compat-path")
def compat_path() -> None:
    """Print a directory for PYTHONPATH in which ``import deep_ep`` finds AnyEP."""
    click.echo(str(Path(anyep.compat.__file__).parent / "path"))
