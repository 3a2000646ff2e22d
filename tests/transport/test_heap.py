"""The heap: integers only, so it is compared with a model that keeps every byte's owner."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from anyep.transport.arena import Heap

UNIT = 128
SEGMENT = 1 << 48


class HeapMachine(RuleBasedStateMachine):
    """Random segments, takes and gives; the model maps each unit of each segment to the block that has it."""

    blocks = Bundle("blocks")

    def __init__(self):
        super().__init__()
        self.heap = Heap()
        self.owners: list[list[object]] = []

    @rule(units=st.integers(1, 40), reserved=st.integers(0, 45))
    def add_segment(self, units, reserved):
        if len(self.owners) < 6:
            self.heap.add_segment(units * UNIT, reserved_bytes=reserved * UNIT)
            first = min(units, reserved)
            self.owners.append(["reserved"] * first + [None] * (units - first))

    @rule(target=blocks, units=st.integers(1, 20))
    def take(self, units):
        fitting = [length for _, _, length in self.free_runs() if length >= units]
        position = self.heap.take(units * UNIT)
        assert (position is None) == (not fitting), "takes whenever something fits"
        if position is None:
            return None
        segment, index = position // SEGMENT, position % SEGMENT // UNIT
        assert position % UNIT == 0
        run = next(length for s, start, length in self.free_runs() if s == segment and start <= index < start + length)
        assert run == min(fitting), "the smallest range that fits"
        owners = self.owners[segment]
        assert owners[index : index + units] == [None] * units, "was free"
        owners[index : index + units] = [position] * units
        return position, units

    @rule(block=consumes(blocks))
    def give(self, block):
        if block is not None:
            self.give_units(*block)

    @rule(target=blocks, block=consumes(blocks), kept=st.integers(1, 20))
    def give_the_end(self, block, kept):
        if block is None or block[1] <= kept:
            return block
        position, units = block
        self.give_units(position + kept * UNIT, units - kept)
        return position, kept

    def give_units(self, position, units):
        self.heap.give(position, units * UNIT)
        index = position % SEGMENT // UNIT
        self.owners[position // SEGMENT][index : index + units] = [None] * units

    def free_runs(self):
        runs = []
        for segment, owners in enumerate(self.owners):
            start = None
            for index, owner in enumerate([*owners, "end"]):
                if owner is None and start is None:
                    start = index
                elif owner is not None and start is not None:
                    runs.append((segment, start, index - start))
                    start = None
        return runs

    @invariant()
    def free_ranges_are_the_models(self):
        expected = [(segment * SEGMENT + start * UNIT, length * UNIT) for segment, start, length in self.free_runs()]
        assert self.heap.free_ranges() == expected, "merged, ascending, exact"
        assert self.heap.free_bytes == sum(num_bytes for _, num_bytes in expected)


TestHeap = HeapMachine.TestCase
TestHeap.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


def test_worked_example():
    heap = Heap()
    heap.add_segment(1024, reserved_bytes=128)
    heap.add_segment(256)
    first, second = heap.take(384), heap.take(128)
    assert (first, second) == (128, SEGMENT), "the smallest that fits"
    assert heap.take(640) is None
    heap.give(first, 384)
    assert heap.take(640) == 128


@given(st.lists(st.integers(1, 25), min_size=1, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_everything_given_back_is_one_range(sizes, random):
    heap = Heap()
    heap.add_segment(1 << 20)
    taken = [(heap.take(size * UNIT), size * UNIT) for size in sizes]
    random.shuffle(taken)
    for position, num_bytes in taken:
        heap.give(position, num_bytes)
    assert heap.free_ranges() == [(0, 1 << 20)]


@pytest.mark.parametrize("reserved", [1024, 1152, 5120])
def test_segment_that_is_all_reserved_gives_nothing(reserved):
    heap = Heap()
    heap.add_segment(1024, reserved_bytes=reserved)
    assert heap.take(128) is None
    assert heap.free_bytes == 0
