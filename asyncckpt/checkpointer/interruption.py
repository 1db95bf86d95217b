"""Whether the state is that of the last completed step, when an exception leaves the training loop.

torch raises in the main thread wherever it is when a DataLoader worker has died: while the next batch is fetched, as a
rule, but an optimizer may also have updated half of the parameters. Whatever an optimizer has begun after the last
`step()` is not that step's state, and must not be saved as such. Rejected: comparing the version counters of all
tensors, which costs a millisecond in every step; a hook costs a microsecond.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

__all__ = ["StepWatch"]


class StepWatch:
    """Hears of every optimizer of this process before it begins a step. Used in the thread that trains.

    Attributes:
        is_between_steps: an optimizer has been seen, `note_step` was called, and none has begun since. Without an
            optimizer seen, nothing is known about what changes the state.
    """

    def __init__(self) -> None:
        self._has_seen_any = False
        self.is_between_steps = False
        self._handle = register_optimizer_step_pre_hook(self._note_begun)

    def _note_begun(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._has_seen_any = True
        self.is_between_steps = False

    def note_step(self) -> None:
        """The training step is complete."""
        self.is_between_steps = self._has_seen_any

    def close(self) -> None:
        """Hear no more."""
        self._handle.remove()

    def __repr__(self) -> str:
        return f"<StepWatch {'between steps' if self.is_between_steps else 'in a step'}>"
