"""JSON that says everything once."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

__all__ = ["refuse_duplicates"]


def refuse_duplicates(data: bytes, canonical: bytes) -> None:
    """Refuse an object that has a member twice: readers differ in which one they believe.

    Our decoder takes the last one without a word. What it understood, encoded again, is the same text
    for everything this package writes, so that text with duplicates is found by a comparison; only
    text that was written by somebody else is parsed a second time.

    Args:
        data: JSON.
        canonical: the JSON that this package writes for what it read in *data*.

    Raises:
        ValueError: there is a duplicate.
    """
    if data != canonical:
        json.loads(data, object_pairs_hook=_unique)


def _unique(members: list[tuple[str, Any]]) -> None:
    counts = Counter(name for name, _ in members)
    if len(counts) != len(members):
        raise ValueError(f"{counts.most_common(1)[0][0][:100]!r} is there twice")
