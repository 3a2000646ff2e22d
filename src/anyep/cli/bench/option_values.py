"""What options of ``anyep bench`` say: texts to values, or click.BadParameter with what was expected and what came."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import click

from anyep.cli.bench.plan import DECODE_TOKENS

_CASE = re.compile(r"([1-9]\d*)x(\d+)")
"""Ranks and tokens of a latency case."""
_PICTURES = (".png", ".svg", ".pdf")
_HOSTS = re.compile(r"([1-9]\d*)x([1-9]\d*)")
"""Hosts, and ranks of each."""
_LINK = re.compile(r"(\d+(?:\.\d+)?)([mg])bit")
_SWEEP = re.compile(r"tokens=\d+(,\d+)*")


def parse_names(choices: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """Return a callback that splits a list at commas and checks each name."""

    def split(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
        for name in names:
            if name not in choices:
                raise click.BadParameter(f"{name!r} is not one of {', '.join(choices)}", context, parameter)
        return names

    return split


def parse_cases(context: click.Context, parameter: click.Parameter, value: str) -> tuple[tuple[int, int], ...]:
    """Return (ranks, tokens) of each latency case of a list as 2x1,8x0."""
    cases = []
    for text in filter(None, value.split(",")):
        match = _CASE.fullmatch(text.strip())
        if match is None or int(match[2]) > DECODE_TOKENS:
            raise click.BadParameter(
                f"{text!r} is not RANKSxTOKENS with up to {DECODE_TOKENS} tokens, as 2x1", context, parameter
            )
        cases.append((int(match[1]), int(match[2])))
    return tuple(cases)


def parse_sizes(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Return the numbers of a list as tokens=1,8,32, in ascending order."""
    if not value:
        return ()
    if _SWEEP.fullmatch(value) is None:
        raise click.BadParameter(f"{value!r} is not a list as tokens=1,8,32", context, parameter)
    return tuple(sorted({int(number) for number in value.removeprefix("tokens=").split(",")}))


def parse_hosts(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Return the ranks of each host of a number as 2x4; none where it was not given."""
    if value is None:
        return ()
    match = _HOSTS.fullmatch(value)
    if match is None or int(match[1]) < 2:
        raise click.BadParameter(f"{value!r} is not HOSTSxRANKS with at least 2 hosts, as 2x4", context, parameter)
    return (int(match[2]),) * int(match[1])


def parse_links(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float | None, ...]:
    """Return the Mbit/s of each link of a list as 1gbit,none; None: without a limit."""
    links: list[float | None] = []
    for text in filter(None, value.split(",")):
        match = _LINK.fullmatch(text.strip().lower())
        if match is None and text.strip() != "none":
            raise click.BadParameter(f"{text!r} is not a speed as 1gbit or 200mbit, nor none", context, parameter)
        links.append(float(match[1]) * (1000.0 if match[2] == "g" else 1.0) if match else None)
    if 0.0 in links:
        raise click.BadParameter("a link of 0 bit/s carries nothing", context, parameter)
    return tuple(dict.fromkeys(links))


def check_output(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse now what could not be written after all the measuring."""
    if value is not None and not (value.parent.is_dir() and os.access(value.parent, os.W_OK)):
        raise click.BadParameter(f"{value.parent} is no directory to write in", context, parameter)
    return value


def parse_picture(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix not in _PICTURES:
        raise click.BadParameter(f"{value} must end in {', '.join(_PICTURES)}", context, parameter)
    return check_output(context, parameter, value)
