"""Objects that could not be made leave nothing open, and say on every rank whose fault it was."""

from __future__ import annotations

import gc
import warnings
from functools import partial

import pytest

import anyep
from anyep.collectives import Gatherer, Ring, RowStore

KINDS = {
    "ring": partial(Ring, max_bytes=64),
    "gatherer": partial(Gatherer, session_bytes=64),
    "rows": RowStore,
}


@pytest.mark.parametrize(("kind", "step"), [(Ring, "_meet"), (Gatherer, "_swap")])
def test_a_rank_that_fails_in_the_last_step_is_named(monkeypatch, kind, step):
    original = getattr(kind, step)

    def fail_on_one(self, *args):
        if self.rank == 1:
            raise ZeroDivisionError
        return original(self, *args)

    monkeypatch.setattr(kind, step, fail_on_one)

    def rank_main(member):
        with pytest.raises((ZeroDivisionError, anyep.PeerLost)) as caught:
            KINDS["ring" if kind is Ring else "gatherer"](member)
        return caught.type is ZeroDivisionError or caught.value.ranks

    assert anyep.local_group(3).run(rank_main) == [(1,), True, (1,)]
    gc.collect()  # an object left open would warn, and warnings are errors


@pytest.mark.parametrize("name", KINDS)
def test_an_object_that_nobody_closed_says_so(name):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        anyep.local_group(1).run(lambda member: [KINDS[name](member)].clear())
        gc.collect()
    assert [str(one.message) for one in seen if "was never closed" in str(one.message)]
    assert all(issubclass(one.category, ResourceWarning) for one in seen)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_group_is_refused(name):
    with pytest.raises(TypeError, match="group must be"):
        KINDS[name]("localhost")
