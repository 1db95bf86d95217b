"""The directory of a run: created durably, checked to be ours, cleared of what dead writers left."""

from __future__ import annotations

import contextlib
import os
import uuid

from asyncckpt.errors import ForeignRootError, StorageError
from asyncckpt.format.paths import parse_step_name
from asyncckpt.repository.names import HEADER, OWN, PARTIAL
from asyncckpt.stores.contract import Store
from asyncckpt.stores.durability import sync_directory_path
from asyncckpt.stores.local import LocalStore, local_path
from asyncckpt.stores.placement import spread_subdirectories

__all__ = ["clean_partials", "discard_partials", "prepare_root"]

# The root of a freshly formatted volume is a fine place for checkpoints.
_HARMLESS = frozenset({"lost+found"})


def prepare_root(path: str | os.PathLike[str]) -> LocalStore:
    """The store at *path*, ready to be written; nothing that exists is changed.

    Every directory on the way is durable on return, whoever created it: a checkpoint acknowledged later
    must not vanish with a parent directory that was only in memory.

    Args:
        path: a path or ``file://`` URL; missing directories are created.

    Raises:
        InvalidOptionError: a kind of store that is not available.
        ForeignRootError: there is something else than checkpoints; it was not touched.
        StorageError: it cannot be created or written (``EACCES``, ``EROFS``, ``ENOTDIR``, ...).
    """
    root = local_path(path)
    try:
        _create(root)
        _require_ours(root)
        _create(f"{root}/{PARTIAL}")
        _require_writable(root)
        _sync_path(f"{root}/{PARTIAL}")
        spread_subdirectories(f"{root}/{PARTIAL}")
    except OSError as error:
        raise StorageError.from_os_error(error, f"prepare the checkpoint root {root}", path=root) from error
    return LocalStore(root)


def _create(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)  # somebody else may be preparing the same root
    except FileExistsError as error:
        message = f"{path} is not a directory; choose another place for checkpoints"
        raise ForeignRootError(message, path=path) from error


def _sync_path(path: str) -> None:
    """fsync every directory above *path*, up to where its file system is mounted.

    Not only above those that were new: a launcher script, or a run that was killed in `prepare_root`,
    may have created them a moment ago and flushed nothing.
    """
    path = os.path.realpath(path)
    device = os.stat(path).st_dev
    while (parent := os.path.dirname(path)) != path and os.stat(parent).st_dev == device:
        path = parent
        with contextlib.suppress(PermissionError):  # a parent that only lets pass through cannot be opened
            sync_directory_path(path)


def _require_ours(root: str) -> None:
    for own in (OWN, PARTIAL):
        if os.path.islink(f"{root}/{own}"):  # what it leads to would be written to and cleared
            raise ForeignRootError(f"{root}/{own} is a symbolic link; choose another directory", path=root)
    names = set(os.listdir(root)) - _HARMLESS
    if OWN in names:
        return
    foreign = sorted(name for name in names if parse_step_name(name) is None)
    if foreign:
        raise ForeignRootError(
            f"{root} holds {foreign[0]!r} and is no checkpoint root; choose an empty or new directory",
            path=root,
            found=foreign[:10],
        )


def _require_writable(root: str) -> None:
    # Trying is the only reliable test: access(2) knows nothing of quotas, immutable flags or NFS squashing.
    probe = f"{root}/{PARTIAL}/probe-{uuid.uuid4().hex}"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    with contextlib.suppress(FileNotFoundError):  # a run that starts at the same time has cleaned it away
        os.unlink(probe)


def clean_partials(store: Store) -> list[str]:
    """Remove what interrupted writes and deletions left. Only the holder of the root's lock may call this.

    That is everything in ``.asyncckpt/partial``, and every ``step-N`` without a header: a deletion
    removes the header first, and a commit never shows a step without one.

    Returns:
        The keys that were removed.

    Raises:
        StorageError: something could not be removed.
    """
    partials = discard_partials(store)
    # Only now: after a power cut during its rename, a step may have had a second name in ``partial``.
    headerless = [
        entry.name
        for entry in store.entries("")
        if entry.is_directory and parse_step_name(entry.name) is not None and not _has_header(store, entry.name)
    ]
    for key in headerless:
        store.delete(key)
    return partials + headerless


def discard_partials(store: Store) -> list[str]:
    """Remove what interrupted writes left in ``.asyncckpt/partial``. Only the root's writer may call this.

    The header goes first: a writer that was killed inside the kernel may still complete its rename, and what
    appears then must not be taken for a committed step.

    Returns:
        The keys that were removed.

    Raises:
        StorageError: something could not be removed.
    """
    leftovers = store.entries(PARTIAL)
    for entry in leftovers:
        if entry.is_directory:
            store.delete(f"{PARTIAL}/{entry.name}/{HEADER}")
        store.delete(f"{PARTIAL}/{entry.name}")
    return [f"{PARTIAL}/{entry.name}" for entry in leftovers]


def _has_header(store: Store, name: str) -> bool:
    return any(entry.name == HEADER for entry in store.entries(name))
