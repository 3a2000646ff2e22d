"""The heap: integers only, so it is compared with a model that keeps every byte's owner."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from anyep.transport.arena import Heap
from anyep.transport.base import Place

UNIT = 128


class HeapMachine(RuleBasedStateMachine):
    """Random segments, takes and gives; the model maps each unit of each segment to the block that has it."""

    blocks = Bundle("blocks")

    def __init__(self):
        super().__init__()
        self.heap = Heap()
        self.owners: list[list[object]] = []

    @rule(units=st.integers(1, 40), reserved=st.integers(0, 45 * UNIT))
    def add_segment(self, units, reserved):
        if len(self.owners) < 6:
            self.heap.add_segment(units * UNIT, reserved_bytes=reserved)
            first = min(units, -(-reserved // UNIT))
            self.owners.append(["reserved"] * first + [None] * (units - first))

    @rule(target=blocks, num_bytes=st.integers(1, 20 * UNIT))
    def take(self, num_bytes):
        units = -(-num_bytes // UNIT)
        fitting = [length for _, _, length in self.free_runs() if length >= units]
        place = self.heap.take(num_bytes)
        assert (place is None) == (not fitting), "takes whenever something fits"
        if place is None:
            return None
        assert place.offset % UNIT == 0
        index = place.offset // UNIT
        run = next(
            length
            for segment, start, length in self.free_runs()
            if segment == place.segment and start <= index < start + length
        )
        assert run == min(fitting), "the smallest range that fits"
        owners = self.owners[place.segment]
        assert owners[index : index + units] == [None] * units, "was free"
        owners[index : index + units] = [place] * units
        return place, num_bytes

    @rule(block=consumes(blocks))
    def give(self, block):
        if block is None:
            return
        place, num_bytes = block
        self.heap.give(place, num_bytes)
        index, units = place.offset // UNIT, -(-num_bytes // UNIT)
        self.owners[place.segment][index : index + units] = [None] * units

    @rule(target=blocks, block=consumes(blocks), kept=st.integers(1, 20 * UNIT))
    def give_the_end(self, block, kept):
        if block is None or block[1] <= kept:
            return block
        place, num_bytes = block
        begin, end = -(-kept // UNIT), -(-num_bytes // UNIT)
        if begin < end:
            self.heap.give(Place(place.segment, place.offset + begin * UNIT), (end - begin) * UNIT)
            index = place.offset // UNIT
            self.owners[place.segment][index + begin : index + end] = [None] * (end - begin)
        return place, kept

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
        expected = [(Place(segment, start * UNIT), length * UNIT) for segment, start, length in self.free_runs()]
        assert self.heap.free_ranges() == expected, "merged, ascending, exact"
        assert self.heap.free_bytes == sum(num_bytes for _, num_bytes in expected)


TestHeap = HeapMachine.TestCase
TestHeap.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


def test_worked_example():
    heap = Heap()
    heap.add_segment(1024, reserved_bytes=128)
    first, second = heap.take(200), heap.take(100)
    assert (first, second) == (Place(segment=0, offset=128), Place(segment=0, offset=384))
    assert heap.take(600) is None
    heap.give(first, 200)
    assert heap.take(1) == Place(segment=0, offset=128)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_everything_given_back_is_one_range(sizes, random):
    heap = Heap()
    heap.add_segment(1 << 20)
    taken = [(heap.take(size), size) for size in sizes]
    random.shuffle(taken)
    for place, size in taken:
        heap.give(place, size)
    assert heap.free_ranges() == [(Place(segment=0, offset=0), 1 << 20)]


@pytest.mark.parametrize("reserved", [1024, 1025, 5000])
def test_segment_that_is_all_reserved_gives_nothing(reserved):
    heap = Heap()
    heap.add_segment(1024, reserved_bytes=reserved)
    assert heap.take(1) is None
    assert heap.free_bytes == 0
