"""The public face: `Checkpointer`, and reading without one."""

from asyncckpt.checkpointer.checkpointer import Checkpointer
from asyncckpt.checkpointer.once import save_sync
from asyncckpt.checkpointer.reading import Catalogue, load, open

__all__ = ["Catalogue", "Checkpointer", "load", "open", "save_sync"]
