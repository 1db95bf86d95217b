"""Where things lie below a root."""

from __future__ import annotations

from asyncckpt.format.paths import step_name

__all__ = ["HEADER", "LOCK", "OWN", "PARTIAL", "header_key", "partial_key"]

OWN = ".asyncckpt"
PARTIAL = f"{OWN}/partial"
LOCK = f"{OWN}/run.lock"
HEADER = "zarr.json"
"""The file that makes a step directory a committed step; written last, removed first."""


def header_key(step: int) -> str:
    """Key of the header of a committed step."""
    return f"{step_name(step)}/{HEADER}"


def partial_key(step: int, nonce: str) -> str:
    """Directory in which a step is written before it is committed."""
    return f"{PARTIAL}/{step_name(step)}-{nonce}"
