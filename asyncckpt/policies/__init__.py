"""When to save and what to keep, as small frozen values."""

from __future__ import annotations

from asyncckpt.policies.keep import Best, Keep
from asyncckpt.policies.when import AtSteps, Every, When

__all__ = ["AtSteps", "Best", "Every", "Keep", "When"]
