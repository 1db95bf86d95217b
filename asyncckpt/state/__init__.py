"""The state of a training run: taken apart for saving, put together and applied when restoring."""

from __future__ import annotations

from asyncckpt.state.registry import register_type
from asyncckpt.state.rng import RNG
from asyncckpt.state.training import TrainingState

__all__ = ["RNG", "TrainingState", "register_type"]
