"""The doorbell of ``transport/signals.py`` as a model: every interleaving of senders and sleepers is walked.

The stress test in test_signals.py runs the code and seldom hits a window of nanoseconds; this one runs the algorithm,
one atomic step at a time, and hits them all. A state is stuck when nobody can move and somebody sleeps on messages that
are all there.
"""

from __future__ import annotations

from typing import Any

import pytest

FAULTS = (
    "looks before it rings",
    "sleeps without looking again",
    "asks for one message too many",
    "rings before the word",
)
FAULTS += ("raises the target of others",)


def _sender(state: dict[str, Any], me: dict[str, Any], fault: str) -> None:
    steps = ["word", "ring", "look", "end"]
    if fault == "looks before it rings":
        steps = ["word", "look", "ring", "end"]
    if fault == "rings before the word":
        steps = ["ring", "look", "word", "end"]
    step = steps[me["at"]]
    if step == "word":
        state["words"] = tuple(w or i == me["source"] for i, w in enumerate(state["words"]))
    elif step == "ring":
        state["counter"] += 1
        me["rung"] = state["counter"]
    elif step == "look":
        sleepers, wake_at = state["sleepers"]
        if sleepers and (me["rung"] if "rung" in me else state["counter"]) >= wake_at:
            state["wake"] = True
    me["at"] += 1


def _sleeper(state: dict[str, Any], me: dict[str, Any], fault: str) -> None:
    step = me["step"]
    if step == "load":
        me |= {"seen": state["counter"], "step": "count"}
    elif step == "count":
        missing = sum(not state["words"][source] for source in me["wants"])
        me["target"] = me["seen"] + missing + (fault == "asks for one message too many")
        me["step"] = "join" if missing else "end"
    elif step == "join":
        sleepers, wake_at = state["sleepers"]
        lowest = me["target"] if not sleepers else min(wake_at, me["target"])
        if fault == "raises the target of others" and sleepers:
            lowest = max(wake_at, me["target"])
        state["sleepers"] = (sleepers + 1, lowest)
        me["step"] = "again"
    elif step == "again":
        me["looked"] = me["seen"] if fault == "sleeps without looking again" else state["counter"]
        blind = fault == "sleeps without looking again"
        me["step"] = "sleep" if blind or me["looked"] < me["target"] else "leave"
    elif step == "sleep":  # the kernel compares; a fault that trusts nothing skips that as well
        same = state["counter"] == me["looked"] or fault == "sleeps without looking again"
        me["step"] = "asleep" if same else "leave"
    elif step == "leave":
        sleepers, wake_at = state["sleepers"]
        state["sleepers"] = (sleepers - 1, wake_at) if sleepers > 1 else (0, 0)
        me["step"] = "load"


def _freeze(state: dict[str, Any]) -> Any:
    return tuple(
        (k, tuple(tuple(sorted(t.items())) for t in v) if k == "threads" else v) for k, v in sorted(state.items())
    )


def _next(state: dict[str, Any], index: int, fault: str) -> dict[str, Any]:
    threads = [dict(thread) for thread in state["threads"]]
    following = dict(state, threads=threads)
    (_sender if "source" in threads[index] else _sleeper)(following, threads[index], fault)
    if following.pop("wake", False):
        for thread in threads:
            if thread.get("step") == "asleep":
                thread["step"] = "leave"
    return following


def _can_move(thread: dict[str, Any]) -> bool:
    return thread["at"] < 3 if "source" in thread else thread["step"] not in ("asleep", "end")


def _oversleeps(state: dict[str, Any]) -> bool:
    asleep = [thread for thread in state["threads"] if thread.get("step") == "asleep"]
    return any(all(state["words"][source] for source in thread["wants"]) for thread in asleep)


def stuck_states(wants: list[tuple[int, ...]], num_senders: int, fault: str = "") -> int:
    """Walk every interleaving of sleepers, each with the sources it wants, and senders; return the stuck states."""
    threads: list[dict[str, Any]] = [{"source": source, "at": 0} for source in range(num_senders)]
    threads += [{"wants": sources, "step": "load"} for sources in wants]
    first = {"words": (False,) * 2, "counter": 0, "sleepers": (0, 0), "threads": threads}
    seen, todo, stuck = {_freeze(first)}, [first], 0
    while todo:
        state = todo.pop()
        movers = [i for i, thread in enumerate(state["threads"]) if _can_move(thread)]
        stuck += not movers and _oversleeps(state)
        for index in movers:
            following = _next(state, index, fault)
            key = _freeze(following)
            if key not in seen:
                seen.add(key)
                todo.append(following)
    return stuck


SCENES = [
    ([(0,)], 1),
    ([(0, 1)], 2),
    ([(0,), (1,)], 2),
    ([(0, 1), (1,)], 2),
    ([(0,), (0,)], 1),
    ([(0,), (0, 1)], 1),  # source 1 never sends
    ([(0,)], 2),  # source 1 is not awaited, and rings
]


@pytest.mark.parametrize(("wants", "num_senders"), SCENES)
def test_nobody_sleeps_for_ever(wants, num_senders):
    assert stuck_states(wants, num_senders) == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_finds_faults(fault):
    assert any(stuck_states(wants, num_senders, fault) for wants, num_senders in SCENES)
