"""When to save and what to keep, as small frozen values."""

from __future__ import annotations

from asyncckpt.policies.adaptive import Adaptive
from asyncckpt.policies.keep import Best, Keep
from asyncckpt.policies.mirror import Mirror
from asyncckpt.policies.moment import Costs, Moment
from asyncckpt.policies.validation import Validation
from asyncckpt.policies.when import AtSteps, Every, When, decide

__all__ = ["Adaptive", "AtSteps", "Best", "Costs", "Every", "Keep", "Mirror", "Moment", "Validation", "When", "decide"]
