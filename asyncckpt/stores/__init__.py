"""Where checkpoints are kept: the store contract and its implementations."""

from __future__ import annotations

from asyncckpt.stores.contract import Barrier, Entry, FileSink, Store, StoreProperties
from asyncckpt.stores.local import LocalStore, open_store

__all__ = ["Barrier", "Entry", "FileSink", "LocalStore", "Store", "StoreProperties", "open_store"]
