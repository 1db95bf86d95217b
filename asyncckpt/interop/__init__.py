"""Reading checkpoints with other libraries. Importing this registers our data types with zarr-python."""

from asyncckpt.interop.zarr_dtypes import register_zarr_dtypes
from asyncckpt.interop.zarr_group import open_zarr

__all__ = ["open_zarr", "register_zarr_dtypes"]

register_zarr_dtypes()
