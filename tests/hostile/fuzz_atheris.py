"""Coverage-guided fuzzing of everything that parses stored bytes; by hand, not part of the tests.

    pip install atheris
    python tests/hostile/fuzz_atheris.py -max_total_time=3600

The first byte of an input chooses what reads the rest. Digests and checksums are made valid first, since
guessing them would keep the fuzzer outside. Whatever ends in anything but a documented error is a crash, and
libFuzzer writes the input to ``crash-*``. With ``KEEP_GOING=DIR`` in the environment one input per place of
failure is written to that directory instead, and fuzzing goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(include=["asyncckpt.format", "asyncckpt.state", "msgspec"]):
    from asyncckpt.errors import CorruptError, UnsupportedStateError
    from asyncckpt.format.codecs import resolve_codecs
    from asyncckpt.format.dtypes import DATA_TYPES
    from asyncckpt.format.files import decode_file, encode_file
    from asyncckpt.format.header import IndexRef, decode_header_file, info_from_header
    from asyncckpt.format.index import decode_index
    from asyncckpt.format.layout import ArrayLayout, plan_layout
    from asyncckpt.format.metadata import decode_array_metadata, encode_array_metadata
    from asyncckpt.format.walk import iter_tensors
    from asyncckpt.state.stored import array_keys, decode_tree

from forge import digest, index_files, seal_header, seal_header_bytes, with_crc

_MAX_DECODED_BYTES = 2**20
_MAX_SECONDS = 1.0
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


def fuzz_one(data: bytes) -> None:
    if not data:
        return
    started = time.thread_time()
    with contextlib.suppress(CorruptError, UnsupportedStateError):
        TARGETS[data[0] % len(TARGETS)](data[1:])
    if time.thread_time() - started > _MAX_SECONDS:
        raise TimeoutError(f"{len(data)} bytes took more than {_MAX_SECONDS} s")


def fuzz_one_and_go_on(data: bytes) -> None:
    try:
        fuzz_one(data)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__}-{Path(frame.filename).stem}-{frame.lineno}"
        found = Path(os.environ["KEEP_GOING"], place)
        if not found.exists():
            print(f"FAILED {place}: {error}", flush=True)
            found.write_bytes(data)


_TENSOR = {"$": "tensor", "key": "state/w", "dtype": "float32", "shape": [2, 3]}
_TREE = {
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
        "$": "quantized", "dtype": "qint8", "values": {**_TENSOR, "dtype": "int8"}, "scale": 0.5, "zero_point": 0,
    },
    "optimizer": {
        "$": "optimizer", "parameters": [["w", [2, 3], 0]], "modules": ["model"], "group_sizes": [1],
        "param_groups": [{"lr": 0.1}], "slots": {"exp_avg": {"w": _TENSOR}}, "extra_state": {}, "extra": {},
    },
}  # fmt: skip
_HEADER = {
    "format": 1, "step": 5, "kind": "regular", "nonce": "n", "run": "r", "created": "2026-01-01T00:00:00+00:00",
    "world_size": 1, "tags": ["good"], "metrics": {"loss": 1.0}, "metadata": {"lr": 0.1}, "versions": {"torch": "2.6"},
    "tree": _TREE, "inline": {"state/w": {"dtype": "float32", "shape": [1], "data": "AAAAAA=="}}, "arrays": 2,
    "raw_bytes": 100, "stored_bytes": 50,
    "indexes": [{"rank": 0, "key": "index/rank-00000", "bytes": 9, "digest": "0" * 32, "metadata_digest": "0" * 32}],
    "timings": {"stage_s": 0.1},
}  # fmt: skip


def seeds() -> list[bytes]:
    """One valid input per target, so that the fuzzer starts behind the first checks."""
    raw = bytes(range(250)) * 16
    found = [b"\0" + seal_header(_HEADER), b"\2" + json.dumps([["state/w/c.0", 9, "0" * 32, "0" * 32]]).encode()]
    found += [b"\1" + json.dumps({name: value}).encode() for name, value in _TREE.items()]
    for number, layout in enumerate(_LAYOUTS):
        found.append(b"\3" + encode_array_metadata(layout, {"asyncckpt": {"torch_dtype": "complex32"}}))
        stored = io.BytesIO()
        encode_file(layout, next(iter(layout.files())), memoryview(raw), stored.write)
        end = None if layout.shard_shape is None else -4
        found.append(b"\4" + bytes([number]) + stored.getvalue()[:end])
    return found


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="asyncckpt-corpus-") as corpus:
        for number, seed in enumerate(seeds()):
            fuzz_one(seed)
            Path(corpus, f"seed-{number}").write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], fuzz_one_and_go_on if "KEEP_GOING" in os.environ else fuzz_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
