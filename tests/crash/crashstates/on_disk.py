"""The same questions to a state built on a real file system, where nothing stands between them and the package."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from asyncckpt.repository import Catalog, CommittedStep, clean_partials, prepare_root, verify_step
from asyncckpt.repository.names import PARTIAL
from asyncckpt.stores import LocalStore
from asyncckpt.stores.contract import Store
from crashstates.expectations import ROOT
from crashstates.image import Image
from crashstates.image_store import ImageStore
from crashstates.program import write_step

__all__ = ["disagreements"]


def disagreements(image: Image, directory: Path) -> list[str]:
    """What the package finds on a real file system but not in memory, and what the next run fails to do there.

    Args:
        image: with one name for each directory.
        directory: a new one; it is removed.
    """
    directory.mkdir()
    try:
        image.write_to(directory / "top")
        return list(_disagreements(image, directory / "top" / ROOT))
    finally:
        shutil.rmtree(directory)


def _disagreements(image: Image, root: Path) -> Iterator[str]:
    expected, found = _verified(ImageStore(image, ROOT)), _verified(LocalStore(root))
    if expected != found:
        yield f"a real file system shows {found}, the model {expected}"
    store = prepare_root(root)
    clean_partials(store)
    if left := store.entries(PARTIAL):
        yield f"cleaning leaves {left[0].name} on a real file system"
    step = max(found, default=0) + 1
    write_step(store, step, "after-the-crash")
    if _verified(store) != {**found, step: True}:
        yield f"step {step} cannot be saved on a real file system"


def _verified(store: Store) -> dict[int, bool]:
    return {step: verify_step(CommittedStep(store, step), threads=1).ok for step in Catalog(store).steps()}
