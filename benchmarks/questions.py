"""What the benchmarks of the suite have in common: how large, where, how often, and who is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import PEERS, installed

__all__ = ["REFERENCE", "Setup"]

REFERENCE = "asyncckpt fast"


@dataclass(frozen=True)
class Setup:
    """One run.

    Attributes:
        directory: where checkpoints go; on the disk that matters.
        size: ``124M``, or ``tiny``, which only shows that everything runs.
        repetitions: of everything, after a warm-up, unless stated otherwise.
        peers: who is compared, where the question fits.
        alone_steps: training steps without a save before each save.
        large: whether the 8 GB tensor is tried.
    """

    directory: Path
    size: str = "124M"
    repetitions: int = 5
    peers: Sequence[str] = field(default_factory=lambda: list(PEERS))
    alone_steps: int = 60
    large: bool = True

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def log(self) -> Path:
        """Where workers print."""
        return self.directory / "worker.log"

    def choose(self, candidates: Sequence[str]) -> list[str]:
        """Those of *candidates* that are wanted and installed."""
        return installed([name for name in candidates if name in self.peers])

    def place(self, name: str) -> Path:
        """A directory of that name for checkpoints; not made yet."""
        return self.directory / name.replace(" ", "-")

    def facts(self) -> dict[str, Any]:
        """For the JSON file."""
        return {"size": self.size, "repetitions": self.repetitions, "alone_steps": self.alone_steps}
