"""Programs in the pages are Python, name what exists, and call it with arguments that it has."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import anyep
from anyep import nn

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MODULES = {"anyep": anyep, "nn": nn}
METHODS = {"ep": anyep.Buffer}
"""What the pages call a buffer."""


def programs(page: Path) -> Iterator[ast.Module]:
    """Parse every block."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        yield ast.parse(block)


def found(node: ast.expr) -> object:
    """Return what a dotted name stands for, as far as it begins with one of ours; None for others."""
    if isinstance(node, ast.Name):
        return MODULES.get(node.id, METHODS.get(node.id))
    if isinstance(node, ast.Attribute):
        owner = found(node.value)
        return None if owner is None else getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist_and_take_these_arguments(page):
    for program in programs(page):
        for node in ast.walk(program):
            if isinstance(node, ast.Attribute):
                found(node)
            if not isinstance(node, ast.Call):
                continue
            called = found(node.func)
            if called is None or not callable(called):
                continue
            taken = inspect.signature(called).parameters
            if any(one.kind is one.VAR_KEYWORD for one in taken.values()):
                continue
            named = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            assert named <= set(taken), f"{ast.unparse(node.func)} takes no {named - set(taken)}"


def test_there_are_programs():
    assert sum(1 for page in PAGES for _ in programs(page)) >= 12
