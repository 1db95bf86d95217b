"""Frozen value objects that several layers share."""

from asyncckpt.model.checkpoint import KINDS, CheckpointInfo, Kind, Mismatch
from asyncckpt.model.findings import Damage, Recovered, VerifyReport
from asyncckpt.model.health import Health, MirrorHealth
from asyncckpt.model.saving import Outcome, SaveStats, TensorSpec
from asyncckpt.model.statistics import Durations, IntervalReport, Statistics

__all__ = [
    "KINDS",
    "CheckpointInfo",
    "Damage",
    "Durations",
    "Health",
    "IntervalReport",
    "Kind",
    "MirrorHealth",
    "Mismatch",
    "Outcome",
    "Recovered",
    "SaveStats",
    "Statistics",
    "TensorSpec",
    "VerifyReport",
]
