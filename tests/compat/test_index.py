"""The page that says where each behaviour is tested names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "compatibility-tests.md"


def test_every_test_that_the_page_names_exists():
    source = "\n".join(path.read_text() for path in HERE.glob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", source, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert len(named) > 100
    assert not named - defined
