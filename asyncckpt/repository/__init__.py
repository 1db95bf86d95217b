"""A root of checkpoints: committing, finding, verifying and removing steps."""

from __future__ import annotations

from asyncckpt.repository.catalog import Catalog, CommittedStep, DamagedStep
from asyncckpt.repository.commit import StepWriter
from asyncckpt.repository.lock import RunLock
from asyncckpt.repository.retention import Decision, RetentionPlan, execute_retention, plan_retention
from asyncckpt.repository.root import clean_partials, prepare_root
from asyncckpt.repository.verify import verify_step

__all__ = [
    "Catalog",
    "CommittedStep",
    "DamagedStep",
    "Decision",
    "RetentionPlan",
    "RunLock",
    "StepWriter",
    "clean_partials",
    "execute_retention",
    "plan_retention",
    "prepare_root",
    "verify_step",
]
