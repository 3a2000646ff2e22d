"""``anyep compat-path``: the directory that makes ``import deep_ep`` find AnyEP."""

from __future__ import annotations

from pathlib import Path

import click

import anyep.compat


@click.command("compat-path")
def compat_path() -> None:
    """Print what PYTHONPATH needs for DeepEP's programs.

    A directory in which "import deep_ep" finds DeepEP's interface on AnyEP:

    PYTHONPATH=$(anyep compat-path) torchrun ... program.py
    """
    click.echo(str(Path(anyep.compat.__file__).parent / "path"))
