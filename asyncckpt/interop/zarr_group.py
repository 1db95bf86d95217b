"""A committed step as a zarr-python group."""

from __future__ import annotations

from os import PathLike

import zarr

from asyncckpt.interop.zarr_dtypes import register_zarr_dtypes
from asyncckpt.repository.catalog import Catalog
from asyncckpt.stores import open_store

__all__ = ["open_zarr"]


def open_zarr(root: str | PathLike[str], which: int | str = "latest") -> zarr.Group:
    """The step as a read-only group: ``state/<item>/...`` holds the tensors, sliced without reading the rest.

    Args:
        root: directory of the run.
        which: step number, ``"latest"`` or a tag.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CorruptCheckpointError: the header of the numbered step is damaged.
    """
    register_zarr_dtypes()
    committed = Catalog(open_store(root)).find(which)
    return zarr.open_group(committed.location, mode="r")
