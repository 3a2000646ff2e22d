"""Who is to blame when a message does not come: from what is seen of each rank to one error.

Pure: a transport collects the facts, this file judges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from anyep.errors import PeerError, PeerLost, PeerTimeout
from anyep.transport.base import Blame


@dataclass(frozen=True, kw_only=True)
class Departure:
    """A rank that will post nothing any more. ``how``: "closed", "died" or "failed"; ``blame``: whom it names."""

    how: str
    blame: Blame | None = None


@dataclass(frozen=True, kw_only=True)
class Wait:
    """What is waited for, as error messages tell it. ``names`` says which process or thread a rank is.

    ``epoch`` is None for what belongs to no operation.
    """

    step: str
    epoch: int | None
    rank: int
    missing: Sequence[int]
    arrived: Sequence[int]
    elapsed_s: float
    timeout_s: float
    names: Mapping[int, str]
    holders: Sequence[int] = ()
    """by rank the names of processes that other transports know too (``elsewhere.py``)"""
    culprits: Sequence[int] = ()
    """the same, of a rank that waits in another transport the one for which it waits there"""

    def where(self) -> str:
        epoch = "" if self.epoch is None else f"epoch {self.epoch}, "
        return f"{self.step} ({epoch}rank {self.rank})"

    def error(self, kind: type[PeerError], text: str, ranks: Sequence[int]) -> PeerError:
        """Return an error that names ``ranks``."""
        names = self.holders if kind is PeerLost else self.culprits
        return kind(text, ranks=ranks, step=self.step, holders=[names[rank] for rank in ranks] if names else ())

    def progress(self) -> str:
        return f"arrived: {spell_ranks(self.arrived)}; missing: {spell_ranks(self.missing)}"


def spell_ranks(ranks: Sequence[int]) -> str:
    """Write ranks for people.

    >>> spell_ranks([0, 1, 2, 5]), spell_ranks([])
    ('0-2, 5', 'none')
    """
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def name_ranks(ranks: Sequence[int]) -> str:
    """Write ranks as the subject of a sentence.

    >>> name_ranks([3]), name_ranks([0, 1, 2])
    ('rank 3', 'ranks 0-2')
    """
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {spell_ranks(ranks)}"


def lost(wait: Wait, departures: Mapping[int, Departure]) -> PeerError | None:
    """Return the error for missing ranks that have left; None when none of them has.

    A rank that left because of others passes its blame on: the culprit is named, not the messenger. A rank that died or
    closed outweighs one that was only silent.
    """
    gone = {rank: departures[rank] for rank in wait.missing if rank in departures}
    if not gone:
        return None
    culprits = sorted({c for rank, left in gone.items() if _is_lost(left) for c in _culprits(rank, left)})
    if culprits:
        return wait.error(PeerLost, _lost_text(wait, gone, culprits), culprits)
    culprits = sorted({c for rank, left in gone.items() for c in _culprits(rank, left)})
    return wait.error(PeerTimeout, _passed_on_text(wait, gone, culprits), culprits)


def silent(wait: Wait, still: Mapping[int, int | None]) -> PeerError:
    """Return the error for missing ranks that are alive, after the time is up: it names those that stand ``still``.

    With each: a rank of another buffer for which it waits there, and which takes no part here; None: there is none.
    """
    missing, named = (", ".join(_named(wait, rank) for rank in ranks) for ranks in (wait.missing, [*still]))
    they, are, need = ("they", "are", "need") if len(still) > 1 else ("it", "is", "needs")
    alive = f"{they} {are} alive".capitalize()
    who = alive if set(still) == set(wait.missing) else f"Who is missing waits in turn, in the end for {named}"
    text = (
        f"{wait.where()}: no message from {missing} within timeout_s={wait.timeout_s:g} (waited {wait.elapsed_s:.2f} "
        f"s); {wait.progress()}. {who}: look whether {they} {are} stopped, still computing, or in another call "
        f"(all ranks must make the same calls in the same order); raise timeout_s if {they} only {need} longer"
    )
    for rank, outsider in still.items():
        if outsider is not None:
            text += (
                f". Rank {rank} waits in another buffer of its process, for rank {outsider} of that buffer, which "
                "takes no part in this one: look there first"
            )
    return wait.error(PeerTimeout, text, [*still])


def given_up(wait: Wait, departures: Mapping[int, Departure], still: Mapping[int, int | None]) -> PeerError:
    """Return the error for a wait that is over: for those that have left, else for those that stand ``still``."""
    return lost(wait, departures) or lost(replace(wait, missing=[*still]), departures) or silent(wait, still)


def standing_still(missing: Sequence[int], waits_for: Callable[[int], Sequence[int]], rank: int) -> list[int]:
    """Return who is to blame for a wait of ``rank``: who is missing, or in the end waited for by who is missing.

    ``waits_for``: what each rank says; none where it does not say that it waits. Where all wait for each other, as
    after calls in different orders, those that are missing are to blame.

    >>> standing_still([1], {1: [2, 3], 2: [3], 3: []}.__getitem__, 0)
    [3]
    """
    seen, still, ahead = {rank}, set(), list(missing)
    while ahead:
        other = ahead.pop()
        if other not in seen:
            seen.add(other)
            further = waits_for(other)
            ahead += further
            if not further:
                still.add(other)
    return sorted(still or missing)


def blame_for(error: BaseException, rank: int, holders: Sequence[int]) -> Blame:
    """Return what ``rank`` tells its peers when ``error`` makes it leave: whom it waited for, or else itself.

    ``holders``: names by rank. The error may be that of another buffer, with other ranks.
    """
    return blame_of(error, holders) or Blame(ranks=(rank,), timeout=False)


def blame_of(error: BaseException, holders: Sequence[int]) -> Blame | None:
    """Return whom an error names; None where it is its rank's own, or none of those it names takes part here."""
    if not isinstance(error, PeerError):
        return None
    here = {name: rank for rank, name in enumerate(holders)}
    named = [here[name] for name in error.holders if name in here] if error.holders else error.ranks
    ranks = sorted(rank for rank in named if rank < len(holders))
    return Blame(ranks=tuple(ranks), timeout=isinstance(error, PeerTimeout)) if ranks else None


def _is_lost(left: Departure) -> bool:
    return left.blame is None or not left.blame.timeout


def _culprits(rank: int, left: Departure) -> tuple[int, ...]:
    return (rank,) if left.blame is None else left.blame.ranks


def _named(wait: Wait, rank: int) -> str:
    name = wait.names.get(rank, "")
    notes = [note for note in ("this rank" if rank == wait.rank else "", name) if note]
    return f"rank {rank} ({', '.join(notes)})" if notes else f"rank {rank}"


_HOW = {
    "closed": "closed its buffer",
    "died": "died",
    "failed": "ended with an error",
}


def _lost_text(wait: Wait, gone: Mapping[int, Departure], culprits: Sequence[int]) -> str:
    tales = []
    for culprit in culprits:
        direct = gone.get(culprit)
        if direct is not None and (direct.blame is None or culprit in direct.blame.ranks):
            tales.append(f"{_named(wait, culprit)} {_HOW[direct.how]} while this rank needed it")
        else:
            tales.append(f"{_named(wait, culprit)} was lost, as {_messengers(gone, culprit)}")
    return (
        f"{wait.where()}: {'; '.join(tales)}. {wait.progress()}. "
        "Look at the output of the ranks named; close this buffer and make a new one on the ranks that are left"
    )


def _passed_on_text(wait: Wait, gone: Mapping[int, Departure], culprits: Sequence[int]) -> str:
    tales = [
        f"{_named(wait, culprit)} was silent for longer than timeout_s, as {_messengers(gone, culprit)}"
        for culprit in culprits
    ]
    return (
        f"{wait.where()}: {'; '.join(tales)}. {wait.progress()}. "
        "Look whether the ranks named are stopped, still computing, or in another call"
    )


def _messengers(gone: Mapping[int, Departure], culprit: int) -> str:
    ranks = [rank for rank, left in gone.items() if left.blame is not None and culprit in left.blame.ranks]
    return f"{name_ranks(ranks)} said before leaving"


def follows_from_peer(error: BaseException | None) -> bool:
    """Whether an error is another rank's, or came from one: not the root cause."""
    while error is not None:
        if isinstance(error, PeerError):
            return True
        error = error.__cause__ or error.__context__
    return False
