"""The last save of a training that ends before its time: told to stop, or broken off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping

from asyncckpt.checkpointer.interruption import StepWatch
from asyncckpt.checkpointer.preempting import Preempting
from asyncckpt.future import SaveFuture
from asyncckpt.logs import get_logger
from asyncckpt.preemption.workers import is_worker_death

__all__ = ["LastSave"]

_logger = get_logger("asyncckpt")


class LastSave:
    """Makes it, where that is possible and right.

    Args:
        save: saves a step of the checkpointer's own state, given its metrics; None if it has no state.
        make_room: waits so many seconds for memory to stage it in; whether there is some.
        steps: those that are durable, or staged.
        preempting: knows whether, and for how long.
        step_watch: knows whether the state is still that of the last step.
    """

    def __init__(
        self,
        save: Callable[[int, Mapping[str, float] | None], SaveFuture] | None,
        make_room: Callable[[float], bool],
        steps: Collection[int],
        preempting: Preempting,
        step_watch: StepWatch,
    ) -> None:
        self._save = save
        self._make_room = make_room
        self._steps = steps
        self._preempting = preempting
        self._step_watch = step_watch

    def make(self, step: int, metrics: Mapping[str, float] | None = None) -> SaveFuture | None:
        """The last save before the process is killed; earlier failures are reported by `Checkpointer.close`."""
        with self._preempting.stopping(step):
            if step in self._steps:
                return None
            if self._save is None:
                _logger.error("step %d is not saved: Checkpointer(state=...) was not given", step)
                return None
            if not self._make_room(min(self._preempting.time_left_s, threading.TIMEOUT_MAX)):
                _logger.error("step %d is not saved: there is no memory to stage it beside what is being written", step)
                return None
            return self._save(step, metrics)

    def rescue(self, error: BaseException | None) -> None:
        """Save the last completed step when the loop was left because it was told to stop, or a worker died."""
        is_told = self._preempting.is_requested and not self._preempting.is_preempted
        step = self._preempting.last_step
        if error is None or not (is_told or is_worker_death(error)) or step < 0 or step in self._steps:
            return
        if not self._step_watch.is_between_steps:
            _logger.warning("step %d is not saved: an optimizer has begun the next one, or none was seen", step)
            return
        _logger.warning("%s has left the loop; saving step %d, after which no optimizer has begun", error, step)
        try:
            self.make(step)
        except Exception as failure:  # must not hide *error*, which is on its way
            _logger.error("step %d is not saved: %s", step, failure)

    def __repr__(self) -> str:
        return f"<LastSave {self._preempting!r}>"
