"""What of the staged saves can still be made durable, in which order and whether compressed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asyncckpt.preemption.bandwidth import Bandwidth

__all__ = ["FlushDecision", "FlushPlan", "StagedSave", "plan_flush"]


@dataclass(frozen=True, slots=True)
class StagedSave:
    """A save that is not durable yet.

    Attributes:
        save_id: its identity towards the writer; newer ones are larger.
        step: what it saves.
        raw_bytes: of the whole snapshot.
        done_bytes: how many of them are written already.
        is_begun: the writer is at it.
        is_repeatable: it may be put back and begun anew (streamed ones may not).
    """

    save_id: int
    step: int
    raw_bytes: int
    done_bytes: int = 0
    is_begun: bool = False
    is_repeatable: bool = True

    @property
    def rest_bytes(self) -> int:
        """What is left to write if it is not put back."""
        return max(0, self.raw_bytes - self.done_bytes)


@dataclass(frozen=True, slots=True)
class FlushDecision:
    """What becomes of one save, and why."""

    save_id: int
    step: int
    makes_it: bool
    reason: str


@dataclass(frozen=True, slots=True)
class FlushPlan:
    """What to write until the deadline.

    Attributes:
        decisions: every save, in the order in which they are to be written. The first one interrupts
            a save that is being written and is not the first.
        compress: whether to go on compressing.
    """

    decisions: tuple[FlushDecision, ...]
    compress: bool

    @property
    def order(self) -> tuple[int, ...]:
        """The ``save_id`` of every save, first to last."""
        return tuple(decision.save_id for decision in self.decisions)

    @property
    def lost_steps(self) -> tuple[int, ...]:
        """Steps that will not make it."""
        return tuple(decision.step for decision in self.decisions if not decision.makes_it)

    def follows_from(self, earlier: FlushPlan | None) -> bool:
        """Whether this is what is left of *earlier* after some saves have ended; the reasons may differ."""
        if earlier is None or self.compress != earlier.compress:
            return False
        verdicts = [(decision.save_id, decision.makes_it) for decision in self.decisions]
        ids = set(self.order)
        return verdicts == [
            (decision.save_id, decision.makes_it) for decision in earlier.decisions if decision.save_id in ids
        ]


def plan_flush(staged: Sequence[StagedSave], bandwidth: Bandwidth, time_left_s: float) -> FlushPlan:
    """Choose the order that gets the newest possible save to disk in *time_left_s*.

    Everything in the order it was saved if there is time for that, uncompressed if only that is fast enough.
    Otherwise the newest save that can make it goes first, after the one that is being written if there is
    time for both; the rest follows, newest first. When nothing can make it, what has the least left goes
    first, because the estimate may be wrong.

    Args:
        staged: in any order.
        bandwidth: of the storage as far as it is known.
        time_left_s: until the deadline.
    """
    oldest_first = sorted(staged, key=lambda save: (not save.is_begun, save.save_id))
    for compress in (True, False):
        if all(end <= time_left_s for end in _ends(oldest_first, bandwidth, compress)):
            return _plan(oldest_first, bandwidth, compress, time_left_s)
    compress = bandwidth.bytes_s(compress=True) >= bandwidth.bytes_s(compress=False)

    def fits(order: Sequence[StagedSave]) -> bool:
        return _ends(order, bandwidth, compress)[-1] <= time_left_s

    begun = next((save for save in oldest_first if save.is_begun), None)
    newest_first = sorted(staged, key=lambda save: -save.save_id)
    order = _around_newest(newest_first, begun, fits) or _around_nearest(newest_first, begun)
    return _plan(order, bandwidth, compress, time_left_s)


def _around_newest(
    newest_first: Sequence[StagedSave], begun: StagedSave | None, fits: Callable[[Sequence[StagedSave]], bool]
) -> list[StagedSave]:
    """The order that serves the newest save that can make it; empty when none can."""
    for save in newest_first:
        others = [other for other in newest_first if other is not save and other is not begun]
        head = [save] if begun is None or begun is save else [save, begun]
        # What cannot be interrupted is waited for, and what leaves enough time is not interrupted.
        if len(head) == 2 and (not head[1].is_repeatable or fits([head[1], save])):
            head.reverse()
        if fits(head[: head.index(save) + 1]):
            return [*head, *others]
    return []


def _around_nearest(newest_first: Sequence[StagedSave], begun: StagedSave | None) -> list[StagedSave]:
    first = min(newest_first, key=lambda save: (save.rest_bytes, -save.save_id))
    if begun is not None and not begun.is_repeatable:
        first = begun
    return [first, *(save for save in newest_first if save is not first)]


def _ends(order: Sequence[StagedSave], bandwidth: Bandwidth, compress: bool) -> list[float]:
    """Seconds from now until each save of *order* is durable."""
    ends: list[float] = []
    end_s = 0.0
    for position, save in enumerate(order):
        # What is interrupted begins anew.
        num_bytes = save.rest_bytes if position == 0 or not save.is_repeatable else save.raw_bytes
        end_s += bandwidth.seconds(num_bytes, compress=compress)
        ends.append(end_s)
    return ends


def _plan(order: Sequence[StagedSave], bandwidth: Bandwidth, compress: bool, time_left_s: float) -> FlushPlan:
    decisions = []
    for save, end_s in zip(order, _ends(order, bandwidth, compress), strict=True):
        makes_it = end_s <= time_left_s
        verdict = "durable" if makes_it else "not durable in time: ready"
        reason = f"{verdict} in {end_s:.1f} s, {max(time_left_s, 0.0):.1f} s are left"
        decisions.append(FlushDecision(save.save_id, save.step, makes_it, reason))
    return FlushPlan(tuple(decisions), compress)
