"""What is not durable yet, in numbers and in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from asyncckpt.future import SaveFuture
from asyncckpt.telemetry.units import format_bytes, format_seconds

__all__ = ["Backlog", "BacklogMeter", "PendingSave", "backlog_of"]


@dataclass(frozen=True, slots=True)
class PendingSave:
    """A save that has not ended. ``raw_bytes`` is 0 until its snapshot is staged."""

    step: int
    raw_bytes: int
    done_bytes: int

    def describe(self) -> str:
        """``step 7 (45 % of 1.9 GB)``."""
        if not self.raw_bytes:
            return f"step {self.step} (being staged)"
        return f"step {self.step} ({self.done_bytes / self.raw_bytes:.0%} of {format_bytes(self.raw_bytes)})"


@dataclass(frozen=True, slots=True)
class Backlog:
    """All of them, oldest first.

    Attributes:
        saves: see `PendingSave`.
        bytes_s: raw bytes that were written per second lately; None when it is not known.
    """

    saves: tuple[PendingSave, ...]
    bytes_s: float | None = None

    @property
    def rest_bytes(self) -> int:
        """Raw bytes that are not written."""
        return sum(save.raw_bytes - save.done_bytes for save in self.saves)

    @property
    def rest_s(self) -> float | None:
        """Seconds until they are written, as far as that is known."""
        return self.rest_bytes / self.bytes_s if self.bytes_s else None

    @property
    def steps(self) -> list[int]:
        """The steps, oldest first."""
        return [save.step for save in self.saves]

    def describe(self) -> str:
        """``step 7 (45 % of 1.9 GB), 812 MB/s, about 1.3 s to go``."""
        if not self.saves:
            return "what retention and the mirror still have to do"
        what = ", ".join(save.describe() for save in self.saves)
        if self.bytes_s is None or self.rest_s is None:
            return what
        return f"{what}, {format_bytes(self.bytes_s)}/s, about {format_seconds(self.rest_s)} to go"


def backlog_of(futures: Iterable[SaveFuture]) -> Backlog:
    """The backlog that *futures* are; those that have ended are none."""
    return Backlog(tuple(_pending(future) for future in futures if not future.done()))


def _pending(future: SaveFuture) -> PendingSave:
    raw_bytes = future.stats.raw_bytes
    return PendingSave(future.step, raw_bytes, int(future.progress * raw_bytes))


class BacklogMeter:
    """Looks at a backlog that only shrinks, and learns how fast.

    Args:
        futures: the saves.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, futures: Callable[[], Iterable[SaveFuture]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._futures = futures
        self._clock = clock
        self._since: tuple[float, int] | None = None  # when staging was over, and the bytes left then

    def look(self) -> Backlog:
        """The backlog now."""
        seen, now = backlog_of(self._futures()), self._clock()
        if any(not save.raw_bytes for save in seen.saves):
            return seen
        if self._since is None or seen.rest_bytes > self._since[1]:  # a new writer began anew
            self._since = now, seen.rest_bytes
        since, rest_bytes = self._since
        written = rest_bytes - seen.rest_bytes
        return Backlog(seen.saves, written / (now - since) if written and now > since else None)

    def __repr__(self) -> str:
        return f"<BacklogMeter {self.look().describe()}>"
