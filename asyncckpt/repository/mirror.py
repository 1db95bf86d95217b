"""The second root of a run: what to copy there, and opening it without harm when its disk is not there.

See ``docs/decisions/032-mirror.md`` for what was decided, and why.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from asyncckpt.errors import InvalidOptionError, StorageError
from asyncckpt.model import CheckpointInfo
from asyncckpt.policies.keep import Keep
from asyncckpt.repository.lock import RunLock
from asyncckpt.repository.retention import plan_retention
from asyncckpt.repository.root import clean_partials, prepare_root
from asyncckpt.stores.contract import Store
from asyncckpt.stores.local import local_path

__all__ = ["MirrorRoot", "open_mirror", "plan_mirror", "require_apart", "require_mounted"]


def plan_mirror(
    source: Sequence[CheckpointInfo], mirrored: Sequence[CheckpointInfo], keep: Keep, now: datetime
) -> list[CheckpointInfo]:
    """Which steps to copy, in which order: the newest first.

    Only what *keep* would keep if everything were there already; so nothing is copied that retention on the
    mirror would remove at once, and training that saves faster than copies are made skips to the newest.

    Args:
        source: committed steps of the first root that can be copied.
        mirrored: committed steps of the mirror. One with the number of a step of *source* and another nonce
            is another checkpoint; the one of *source* replaces it.
        keep: the policy of the mirror.
        now: current time, with a time zone.
    """
    nonces = {info.step: info.nonce for info in mirrored}
    union = {info.step: info for info in (*mirrored, *source)}
    kept = {decision.step for decision in plan_retention(list(union.values()), keep, now).keep}
    missing = [info for info in source if info.step in kept and nonces.get(info.step) != info.nonce]
    return sorted(missing, key=lambda info: info.step, reverse=True)


@dataclass(frozen=True, slots=True)
class MirrorRoot:
    """An open mirror: locked, and cleared of what an interrupted copy left.

    Attributes:
        store: the mirror.
        lock: nobody else writes to it.
        is_on_same_disk: it is on the file system of the first root, and will fail with it.
    """

    store: Store
    lock: RunLock
    is_on_same_disk: bool

    def close(self) -> None:
        """Let others write to it."""
        self.lock.release()


def open_mirror(
    first: Store,
    root: str | os.PathLike[str],
    mount: str | os.PathLike[str] | None = None,
    *,
    may_create: bool = True,
) -> MirrorRoot:
    """Open the mirror at *root* of the root *first* for writing.

    Args:
        first: the first root.
        root: the mirror.
        mount: see `require_mounted`.
        may_create: whether a missing directory is made. Those above it never are: where they are missing, a
            disk is probably not mounted, and what is written there fills another one.

    Raises:
        InvalidOptionError: one root is inside the other, or they are the same.
        ForeignRootError: there is something else than checkpoints; it was not touched.
        RootLockedError: another run writes there.
        StorageError: it is not there (``ENOENT``), not mounted (``ENODEV``), or cannot be written.
    """
    path = local_path(root)
    require_mounted(path, mount)
    if not os.path.isdir(path if not may_create else os.path.dirname(path)):
        raise StorageError(
            f"the mirror {path} is not there; mount its disk, or create the directory", errno=errno.ENOENT, path=path
        )
    require_apart(local_path(first.url), path)
    store = prepare_root(path)
    lock = RunLock.acquire(store, {"mirror_of": first.url})
    try:
        clean_partials(store)
        return MirrorRoot(store, lock, _device(first.url) == _device(store.url))
    except BaseException:
        lock.release()
        raise


def require_mounted(root: str, mount: str | os.PathLike[str] | None) -> None:
    """Refuse to use *root* while nothing is mounted at *mount*; None does not look.

    Raises:
        StorageError: ``ENODEV``: nothing is.
    """
    if mount is not None and not os.path.ismount(local_path(mount)):
        message = f"the mirror {root} is not mounted: nothing is mounted at {os.fspath(mount)}"
        raise StorageError(message, errno=errno.ENODEV, path=root)


def require_apart(first: str, mirror: str) -> None:
    """Refuse a mirror that is its own original, or a part of it.

    Args:
        first: path of the first root.
        mirror: path of the mirror; neither needs to exist.

    Raises:
        InvalidOptionError: one is inside the other, whatever they are called.
    """
    if _is_within(first, mirror) or _is_within(mirror, first):
        raise InvalidOptionError(
            f"the mirror {mirror} and the root {first} are the same, or one is inside the other; "
            "choose a directory elsewhere, best on another disk",
            path=mirror,
        )


def _is_within(path: str, outer: str) -> bool:
    """Whether *path* is *outer* or below it: by name, or by what the names lead to (links, bind mounts)."""
    path, outer = os.path.realpath(path), os.path.realpath(outer)
    while True:
        if path == outer or _is_same_file(path, outer):
            return True
        path, below = os.path.dirname(path), path
        if path == below:
            return False


def _is_same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def _device(url: str) -> int:
    return os.stat(local_path(url)).st_dev
