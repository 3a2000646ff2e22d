"""Imports go down only, and no module is longer than a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from .layers import violations

PACKAGE = Path(__file__).parents[2] / "src" / "anyep"


MOST_LINES = 300


def test_a_module_is_one_page():
    long = {str(path): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert [name for name, lines in long.items() if lines > MOST_LINES] == []


def test_imports_go_down():
    assert violations(PACKAGE) == []


@pytest.fixture
def tree(tmp_path):
    package = tmp_path / "anyep"
    for name in (
        "errors.py",
        "buffer.py",
        "layout/plan.py",
        "kernels/cpu.py",
        "transport/shm.py",
        "exchange/combine.py",
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    (package / "__init__.py").write_text("from anyep.buffer import Buffer\n")
    (package / "cli").mkdir()
    (package / "cli" / "main.py").write_text(
        "import anyep\nfrom anyep import Buffer, errors\nfrom anyep.buffer import x\n"
    )
    (package / "exchange" / "__init__.py").write_text(
        "from anyep.kernels import cpu\nfrom anyep.transport import shm\n"
    )
    return package


def test_a_clean_tree_passes(tree):
    assert violations(tree) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "layout/plan.py",
            "import os\nfrom anyep.kernels.cpu import route",
            "layout/plan.py:2: layout imports kernels",
        ),
        ("layout/plan.py", "import anyep.exchange.combine", "layout imports exchange"),
        ("layout/plan.py", "def f():\n    from anyep.buffer import Buffer", "layout/plan.py:2: layout imports buffer"),
        ("layout/plan.py", "from ..exchange import combine", "layout imports exchange"),
        ("layout/plan.py", "from .. import buffer", "layout imports buffer"),
        ("layout/plan.py", "from anyep import buffer", "layout imports buffer"),
        ("layout/plan.py", "from anyep import Buffer", "the public face is above it"),
        ("exchange/combine.py", "import anyep", "the public face is above it"),
        ("errors.py", "from anyep.layout import plan", "errors imports layout"),
        ("kernels/cpu.py", "from anyep.transport import shm", "neither may see the other"),
        ("transport/shm.py", "from anyep.kernels.cpu import copy", "neither may see the other"),
        ("buffer.py", "if True:\n    import anyep.cli.main", "buffer imports cli"),
        ("misc.py", "from anyep import errors", "misc has no place among the layers"),
    ],
)
def test_a_step_up_is_found(tree, file, text, expected):
    (tree / file).write_text(text + "\n")
    assert [sentence for sentence in violations(tree) if expected in sentence], violations(tree)
