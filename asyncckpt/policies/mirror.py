"""Where checkpoints are copied to, and how many are kept there."""

from __future__ import annotations

import os
from dataclasses import dataclass

from asyncckpt.errors import InvalidOptionError
from asyncckpt.policies.checks import require_duration
from asyncckpt.policies.keep import Keep

__all__ = ["Mirror"]


@dataclass(frozen=True, slots=True)
class Mirror:
    """A second root, to which committed checkpoints are copied in the background.

    Attributes:
        root: its directory, best on another disk. It is created once if the directory above it exists, and
            never again by the same run: a disk that is not mounted must not be replaced by a directory.
        keep: which checkpoints survive there; ``None`` is the policy of the checkpointer.
        mount: a mount point that must be mounted for anything to happen; ``None`` does not look.
        close_timeout_s: how long the end of a run waits for its newest checkpoint to be there. The run's own
            root stays locked meanwhile; keep it below the ``Writer(lock_timeout_s=)`` of the next run.
    """

    root: str | os.PathLike[str]
    keep: Keep | None = None
    mount: str | os.PathLike[str] | None = None
    close_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name, path in (("root", self.root), ("mount", self.mount)):
            if not isinstance(path, (str, os.PathLike)) and not (name == "mount" and path is None):
                raise InvalidOptionError(f"Mirror.{name} must be a path, not {path!r}")
        if self.keep is not None and not isinstance(self.keep, Keep):
            raise InvalidOptionError(f"Mirror.keep must be a Keep, not {self.keep!r}")
        if self.close_timeout_s != 0:
            require_duration("Mirror.close_timeout_s", self.close_timeout_s)
