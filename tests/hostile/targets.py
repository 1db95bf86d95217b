"""What fuzzers feed: each function reads bytes of one kind, with digests and checksums made valid first.

Guessing a digest would keep a fuzzer outside. Whatever ends in anything but a documented error is a bug.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable

import torch
from forge import digest, index_files, seal_header, seal_header_bytes, with_crc

from asyncckpt.errors import CorruptError, UnsupportedStateError
from asyncckpt.format.codecs import resolve_codecs
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.files import FileEncoder, decode_file
from asyncckpt.format.header import IndexRef, decode_header_file, info_from_header
from asyncckpt.format.index import decode_index
from asyncckpt.format.layout import ArrayLayout, plan_layout
from asyncckpt.format.metadata import decode_array_metadata, encode_array_metadata
from asyncckpt.format.walk import iter_tensors
from asyncckpt.state.apply import LoadPlan
from asyncckpt.state.stored import array_keys, decode_tree

__all__ = ["HEADER", "TARGETS", "TREE", "feed", "seeds"]

_MAX_DECODED_BYTES = 2**20
_MAX_SECONDS = 1.0
_ARRAYS = {
    "state/w": torch.zeros(2, 3),
    "state/array": torch.zeros(3, dtype=torch.int64),
    "state/integers": torch.zeros(2, 3, dtype=torch.int8),
    "state/scales": torch.ones(2, dtype=torch.float64),
    "state/zeros": torch.zeros(2, dtype=torch.int64),
}
_INT32 = DATA_TYPES["int32"]
_COMPRESSIONS = ("fast", "small", "none", *([{"name": "bytes"}, {"name": name}] for name in ("gzip", "zstd")))
_LAYOUTS = [
    plan_layout((40, 25), _INT32, resolve_codecs(compression, _INT32), chunk_bytes=chunk_bytes, shard_bytes=2000)
    for compression in _COMPRESSIONS
    for chunk_bytes in (600, 8000)
]


def read_header(data: bytes) -> None:
    header = decode_header_file(seal_header_bytes(data))
    info_from_header(header, "/somewhere")
    list(iter_tensors(header.tree))
    list(array_keys(decode_tree(header.tree)))


def read_tree(data: bytes) -> None:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return
    list(iter_tensors(tree))
    list(array_keys(decode_tree(tree)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated
        LoadPlan(tree).build(_ARRAYS)


def read_index(data: bytes) -> None:
    metadata, chunk = index_files(data)
    decode_index(IndexRef(0, "index/rank-00000", len(chunk), digest(chunk), digest(metadata)), metadata, chunk)


def read_metadata(data: bytes) -> None:
    layout, _ = decode_array_metadata(data)
    if layout.num_bytes <= _MAX_DECODED_BYTES:
        list(layout.files())


def read_file(data: bytes) -> None:
    if not data:
        return
    layout: ArrayLayout = _LAYOUTS[data[0] % len(_LAYOUTS)]
    part = next(iter(layout.files()))
    stored = data[1:]
    index_bytes = layout.chunks_per_shard * 16
    if layout.shard_shape is not None and len(stored) > index_bytes:
        stored = stored[:-index_bytes] + with_crc(stored[-index_bytes:])
    decode_file(layout, part, memoryview(stored), memoryview(bytearray(layout.num_bytes)))


TARGETS: tuple[Callable[[bytes], None], ...] = (read_header, read_tree, read_index, read_metadata, read_file)


def feed(target: int, data: bytes) -> None:
    """Let a target read *data*.

    Raises:
        TimeoutError: it took more than a second of this thread.
        Exception: it did not end in a documented error.
    """
    started = time.thread_time()
    with contextlib.suppress(CorruptError, UnsupportedStateError):
        TARGETS[target % len(TARGETS)](data)
    if time.thread_time() - started > _MAX_SECONDS:
        raise TimeoutError(f"{len(data)} bytes took more than {_MAX_SECONDS} s")


_TENSOR = {"$": "tensor", "key": "state/w", "dtype": "float32", "shape": [2, 3]}
TREE = {
    "w": _TENSOR,
    "view": {**_TENSOR, "view": {"shape": [2, 3], "stride": [3, 1], "offset": 0}},
    "array": {"$": "ndarray", "key": "state/array", "dtype": "int64", "shape": [3]},
    "plain": [None, True, 1, 2.5, "text", {"$": "tuple", "items": [{"$": "int", "value": "0x100000000000000"}]}],
    "special": {"$": "dict", "items": [[1, {"$": "float", "bits": "7ff8000000000000"}]]},
    "more": [{"$": "bytes", "value": "AAAA"}, {"$": "str", "value": "AAAA"}, {"$": "path", "value": "a/b"}],
    "dates": {"$": "datetime", "value": "2026-01-01T00:00:00", "fold": 0},
    "complex": {"$": "complex", "real": 1.0, "imag": {"$": "float", "bits": "7ff8000000000000"}},
    "odict": {"$": "odict", "items": [["a", _TENSOR]], "meta": {"a": {"version": 1}}},
    "enum": {"$": "enum", "type": "http:HTTPStatus", "name": "OK"},
    "torch": [{"$": "torch.dtype", "name": "float32"}, {"$": "torch.device", "name": "cuda:0"}],
    "size": {"$": "torch.Size", "items": [1, 2]},
    "scalar": {"$": "npscalar", "dtype": "float32", "data": "AAAAAA=="},
    "custom": {"$": "custom", "type": "collections:deque", "value": {"maxlen": 3, "items": [1]}},
    "quantized": {
        "$": "quantized", "dtype": "qint8", "values": {**_TENSOR, "key": "state/integers", "dtype": "int8"},
        "scale": 0.5, "zero_point": 0,
    },
    "channels": {
        "$": "quantized", "dtype": "qint8", "values": {**_TENSOR, "key": "state/integers", "dtype": "int8"}, "axis": 0,
        "scales": {"$": "tensor", "key": "state/scales", "dtype": "float64", "shape": [2]},
        "zero_points": {"$": "tensor", "key": "state/zeros", "dtype": "int64", "shape": [2]},
    },
    "optimizer": {
        "$": "optimizer", "parameters": [["w", [2, 3], 0]], "modules": ["model"], "group_sizes": [1],
        "param_groups": [{"lr": 0.1}], "slots": {"exp_avg": {"w": _TENSOR}}, "extra_state": {}, "extra": {},
    },
}  # fmt: skip
HEADER = {
    "format": 1, "step": 5, "kind": "regular", "nonce": "n", "run": "r", "created": "2026-01-01T00:00:00+00:00",
    "world_size": 1, "tags": ["good"], "metrics": {"loss": 1.0}, "metadata": {"lr": 0.1}, "versions": {"torch": "2.6"},
    "tree": TREE, "inline": {"state/w": {"dtype": "float32", "shape": [1], "data": "AAAAAA=="}}, "arrays": 2,
    "raw_bytes": 100, "stored_bytes": 50,
    "indexes": [{"rank": 0, "key": "index/rank-00000", "bytes": 9, "digest": "0" * 32, "metadata_digest": "0" * 32}],
    "timings": {"stage_s": 0.1},
}  # fmt: skip


def seeds() -> list[tuple[int, bytes]]:
    """Valid inputs and their targets, so that a fuzzer starts behind the first checks."""
    raw = bytes(range(250)) * 16
    found = [(0, seal_header(HEADER)), (2, json.dumps([["state/w/c.0", 9, "0" * 32, "0" * 32]]).encode())]
    found += [(1, json.dumps({name: value}).encode()) for name, value in TREE.items()]
    for number, layout in enumerate(_LAYOUTS):
        found.append((3, encode_array_metadata(layout, {"asyncckpt": {"torch_dtype": "complex32"}})))
        encoder = FileEncoder(layout, next(iter(layout.files())), memoryview(raw))
        stored = b"".join(piece for chunk in encoder for piece in chunk)
        end = None if layout.shard_shape is None else -4
        found.append((4, bytes([number]) + stored[:end]))
    return found
