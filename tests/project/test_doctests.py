"""The worked examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import anyep

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(anyep.__path__, "anyep.") if not module.name.endswith("__main__")
)


EXTRAS = {"triton"}
"""What may be missing: modules that need it are passed over."""


def _imported(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in EXTRAS:
            raise
        return None


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = _imported(name)
    if module is None:
        pytest.skip(f"{name} needs one of {', '.join(EXTRAS)}, which is not installed")
    failed, _ = doctest.testmod(module)
    assert failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [
        test for name in MODULES if (module := _imported(name)) for test in finder.find(module) if test.examples
    ]
    assert len(examples) >= 15
