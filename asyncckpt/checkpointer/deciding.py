"""Asks the ``when=`` policy, and keeps what it decides from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from asyncckpt.future import SaveFuture
from asyncckpt.model import IntervalReport, Kind, SaveStats
from asyncckpt.policies.costs import CostMeter
from asyncckpt.policies.moment import Moment
from asyncckpt.policies.when import When, decide

__all__ = ["Decide", "SaveDecider"]

Decide = Callable[[When, Moment], Kind | None]
"""Decides about one moment; the kind of checkpoint to save, or ``None``.

The seam for several ranks. Clocks differ from rank to rank, so one of them must decide for all: it calls
`decide`, sends the answer, a short string or ``None``, to the others, and they return what they received.
Every rank is asked at the same calls of ``step()`` and ``validated()``.
"""

Metrics = Mapping[str, float]


@dataclass(slots=True, eq=False)
class _Saved:
    """A checkpoint that exists or is being written. ``future`` is None as soon as it is known to exist."""

    step: int
    metrics: Metrics
    future: SaveFuture | None = None


class SaveDecider:
    """Whether a save is due, and of which kind; used by the thread that trains.

    Args:
        when: the policy; None is never due.
        load_saved: metrics by step of the checkpoints there are; asked once, before the first validation.
        decide: see `Decide`.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        when: When | None,
        load_saved: Callable[[], Mapping[int, Metrics]] = dict,
        *,
        decide: Decide = decide,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._when = when
        self._load_saved = load_saved
        self._decide = decide
        self._clock = clock
        self._meter = CostMeter()
        self._last_step: int | None = None
        self._last_s = clock()
        self._running: list[_Saved] = []  # not known to have ended
        self._ended: list[SaveStats] = []  # of durable ones, while others are still running
        self._validation: tuple[int, dict[str, float]] | None = None
        self._is_loaded = False
        # Other threads remove entries (pruned steps), so they never add any: what is gone stays gone.
        self._saved: dict[int, _Saved] = {}

    def after_step(self, step: int) -> Kind | None:
        """The kind of save that is due after *step*; counting then starts anew."""
        now_s = self._clock()
        # Between validated() and step() of the same step nothing is trained; a save in between may have blocked.
        is_validated = self._validation is not None and self._validation[0] == step
        self._meter.observe(now_s, in_flight=bool(self._running), is_step=not is_validated)
        self._reap()
        if self._when is None or step == self._last_step:  # that one is there already
            return None
        return self._answer(self._moment(step, now_s))

    def after_validation(self, step: int, metrics: Mapping[str, float]) -> Kind | None:
        """The kind of save that is due because *step* was validated; a later save of *step* gets *metrics* too."""
        now_s = self._clock()
        self._reap()
        self._meter.skip(now_s)
        self._validation = (step, self.validation_of(step) | dict(metrics))
        if self._when is None or step == self._last_step:
            return None
        return self._answer(self._moment(step, now_s, self._validation[1]))

    def validation_of(self, step: int) -> dict[str, float]:
        """What was reported about *step* so far."""
        return self._validation[1] if self._validation is not None and self._validation[0] == step else {}

    def note_begun(self, future: SaveFuture, metrics: Metrics) -> None:
        """A save was begun, whoever asked for it; time and steps are counted from here."""
        saved = _Saved(future.step, metrics, future)
        self._running.append(saved)
        self._saved[future.step] = saved
        self._count_from(future.step)

    def note_restored(self, step: int) -> None:
        """*step* is what training goes on from."""
        self._count_from(step)
        self._meter.skip(self._last_s)
        self._validation = None

    def note_removed(self, *steps: int) -> None:
        """These checkpoints are gone; may be called from any thread."""
        for step in steps:
            self._saved.pop(step, None)

    def explain(self) -> IntervalReport | None:
        """What the policy decides and why, if it is adaptive."""
        return None if self._when is None else self._when.explain(self._moment(self._last_step or 0, self._clock()))

    def _answer(self, moment: Moment) -> Kind | None:
        assert self._when is not None
        kind = self._decide(self._when, moment)
        if kind is not None:
            # Also when the save is then refused: a loop that goes on must not be refused at every step.
            self._count_from(moment.step)
        return kind

    def _moment(self, step: int, now_s: float, validation: Metrics | None = None) -> Moment:
        return Moment(
            step=step,
            now_s=now_s,
            last_step=self._last_step,
            last_s=self._last_s,
            in_flight=bool(self._running) or self._meter.is_measuring,
            costs=self._meter.costs,
            validation=validation,
            saved=() if validation is None else self._saved_metrics(),
        )

    def _saved_metrics(self) -> tuple[Metrics, ...]:
        if not self._is_loaded:
            for step, metrics in self._load_saved().items():
                self._saved.setdefault(step, _Saved(step, metrics))
            self._is_loaded = True
        return tuple(saved.metrics for saved in self._saved.copy().values())

    def _count_from(self, step: int) -> None:
        self._last_step, self._last_s = step, self._clock()

    def _reap(self) -> None:
        if not self._running:
            return
        ended = [saved for saved in self._running if saved.future is not None and saved.future.done()]
        for saved in ended:
            self._running.remove(saved)
            self._end(saved)
        if not self._running:
            self._meter.add_saves(self._ended)
            self._ended = []

    def _end(self, saved: _Saved) -> None:
        future, saved.future = saved.future, None
        if future is not None and future.outcome == "durable":
            self._ended.append(future.stats)
        elif self._saved.get(saved.step) is saved:  # it was not begun anew meanwhile
            self._saved.pop(saved.step, None)

    def __repr__(self) -> str:
        return f"<SaveDecider {self._when!r} since step {self._last_step}>"
