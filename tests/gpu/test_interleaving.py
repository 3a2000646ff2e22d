"""Ranks that signal and wait on the device: step by step, in many orders, on memory as weak as a GPU's."""

from __future__ import annotations

import pytest

from tests.gpu.programs import needs_triton, run_program

pytestmark = needs_triton

FIRST, LAST = 0, 12


@pytest.fixture(scope="module")
def interleaved(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def run(case, first=FIRST, last=LAST):
        found = run_program("interleaved", case, str(first), str(last), cache=cache, interpreted=True)
        return [verdict for verdict, _ in found.values()], [order for _, order in found.values()]

    return run


def test_every_order_of_steps_brings_the_same_rows(interleaved):
    verdicts, orders = interleaved("strong")
    assert verdicts == ["right"] * (LAST - FIRST)
    assert len(set(orders)) > LAST - FIRST - 2


def test_a_seed_replays_its_order(interleaved):
    assert interleaved("weak", 5, 7) == interleaved("weak", 5, 7)


@pytest.mark.parametrize("case", ["weak", "weak, met"])
def test_release_and_acquire_are_enough_on_weak_memory(interleaved, case):
    verdicts, _ = interleaved(case)
    assert verdicts == ["right"] * (LAST - FIRST)


@pytest.mark.parametrize("promise", ["release", "acquire", "release, met", "acquire, met"])
def test_a_signal_without_its_promise_is_caught(interleaved, promise):
    verdicts, _ = interleaved(f"no {promise}", 0, 4)
    assert [verdict for verdict in verdicts if "stale words" not in verdict] == []


def test_a_rank_that_never_signals_is_an_error_word_and_no_hang(interleaved):
    verdicts, _ = interleaved("silent", 0, 2)
    late_in_epoch_3 = [[0, 3 << 32, 0]] * 3
    assert verdicts == [f"errors {late_in_epoch_3}"] * 2


def test_a_deadlock_names_who_waits_for_which_word(interleaved):
    verdicts, _ = interleaved("deadlock", 0, 2)
    for verdict in verdicts:
        assert verdict.startswith("nobody goes on: rank 0 for the word at ")
        assert "rank 1 for the word" in verdict
        assert "rank 2 for the word" in verdict


@pytest.mark.slow
@pytest.mark.parametrize("first", [100, 300])
def test_many_orders_on_weak_memory(interleaved, first):
    verdicts, _ = interleaved("weak", first, first + 200)
    assert verdicts == ["right"] * 200
