"""What the trainer knows of the mirror: its options, how it stands, and reading from it."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from os import PathLike

from asyncckpt.errors import CheckpointNotFoundError, StorageError, error_from_fields
from asyncckpt.events import EventDispatcher
from asyncckpt.model import Health, MirrorHealth, Statistics
from asyncckpt.policies.mirror import Mirror
from asyncckpt.repository.mirror import require_apart, require_mounted
from asyncckpt.stores import LocalStore, open_store
from asyncckpt.stores.local import local_path
from asyncckpt.writer.messages import MirrorEvent, MirrorState

__all__ = ["MirrorView", "resolve_mirror"]


def resolve_mirror(mirror: Mirror | str | PathLike[str] | None, first: str) -> Mirror | None:
    """*mirror*, checked, with absolute paths.

    Args:
        mirror: what the user gave.
        first: path of the first root.

    Raises:
        InvalidOptionError: one root is inside the other, or they are the same.
    """
    if mirror is None:
        return None
    options = mirror if isinstance(mirror, Mirror) else Mirror(mirror)
    path = local_path(options.root)
    require_apart(first, path)
    mount = None if options.mount is None else os.path.abspath(options.mount)
    return replace(options, root=path, mount=mount)


class MirrorView:
    """Hears of the mirror on the thread that listens to the writer.

    State: ``_health`` and the totals are replaced by that thread, and read by any.

    Args:
        options: the mirror; None has none.
        events: told what happens there.
    """

    def __init__(self, options: Mirror | None, events: EventDispatcher) -> None:
        self.options = options
        self._events = events
        self._health = MirrorHealth()
        self._num_copied = 0
        self._copied_bytes = 0

    def hear(self, message: MirrorEvent | MirrorState) -> None:
        """The writer said something about the mirror."""
        if isinstance(message, MirrorState):
            error = None if message.error is None else error_from_fields(message.error)
            self._health = MirrorHealth(message.newest, tuple(message.missing), message.copying, error)
            return
        if message.name == "copied":
            self._num_copied += 1
            self._copied_bytes += message.fields["copied_bytes"]
        self._events.emit(f"mirror.{message.name}", message.step, **message.fields)

    def complete_health(self, health: Health) -> Health:
        """*health*, with the mirror."""
        return health if self.options is None else replace(health, mirror=self._health)

    def complete_statistics(self, statistics: Statistics) -> Statistics:
        """*statistics*, with the mirror."""
        return replace(statistics, num_mirrored=self._num_copied, mirrored_bytes=self._copied_bytes)

    def open_store(self) -> LocalStore | None:
        """The mirror, to read from it; None when there is none. Warns when it cannot be looked at."""
        if self.options is None:
            return None
        try:
            require_mounted(os.fspath(self.options.root), self.options.mount)
            return open_store(self.options.root)
        except CheckpointNotFoundError:
            return None  # the writer makes it, or complains
        except StorageError as error:
            warnings.warn(f"restoring without the mirror: {error}", RuntimeWarning, stacklevel=4)
            return None

    def __repr__(self) -> str:
        return f"<MirrorView {self.options}: {self._health}>"
