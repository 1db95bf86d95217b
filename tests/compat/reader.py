"""Reads steps of format 1 by ``docs/format.md`` alone: a second implementation that shares no code with asyncckpt.

    python tests/compat/reader.py ROOT/step-00000500

Where it and asyncckpt disagree, one of them or the document is wrong. It trusts nothing and decodes
everything, one chunk after the other; it is not fast.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import struct
import sys
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numcodecs
import numpy as np
import xxhash

SIZES = {
    "bool": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "float16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16, "bfloat16": 2,
}  # fmt: skip
MISSING = 2**64 - 1


class Tensor(NamedTuple):
    """A tensor or array: torch's or numpy's name of its type, and its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Other(NamedTuple):
    """A value that only Python or torch can have, as its node: enums, paths, times, registered types."""

    tag: str
    members: dict[str, Any]


def digest(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))


def require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"damaged or not format 1: {what}")


def size_of(data_type: str) -> int:
    return 1 if data_type.startswith("float8_") else SIZES[data_type]


class Step:
    """A committed step; reading its header and indexes checks them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = self._read_header()
        self.files = self._read_indexes()

    def state(self) -> Any:
        """The whole state (section 6)."""
        return self.value(self.header["tree"])

    # -- sections 3 and 4 ----------------------------------------------------------------------

    def _read_header(self) -> dict[str, Any]:
        data = (self.path / "zarr.json").read_bytes()
        start = len(data) - len('"}}}') - 32
        found = data[start : start + 32].decode()
        require(digest(data[:start] + b"0" * 32 + data[start + 32 :]) == found, "digest of the header")
        group = json.loads(data)
        require(group["zarr_format"] == 3 and group["node_type"] == "group", "the header is no group")
        header: dict[str, Any] = group["attributes"]["asyncckpt"]
        require(header["format"] == 1, f"format {header['format']}")
        require(self.path.name == f"step-{header['step']:08d}" and header["digest"] == found, "step or digest")
        return header

    def _read_indexes(self) -> dict[str, tuple[int, str, str]]:
        files = {}
        for index in self.header["indexes"]:
            require(digest((self.path / index["key"] / "zarr.json").read_bytes()) == index["metadata_digest"], "index")
            data = (self.path / index["key"] / "c.0").read_bytes()
            require(len(data) == index["bytes"] and digest(data) == index["digest"], "index")
            for key, size, stored, raw in json.loads(check_crc32c(data)):
                files[key] = size, stored, raw
        return files

    def read_file(self, key: str) -> bytes:
        size, stored, _ = self.files[key]
        data = (self.path / key).read_bytes()
        require(len(data) == size and digest(data) == stored, key)
        return data

    # -- section 5 -----------------------------------------------------------------------------

    def array(self, key: str) -> tuple[bytes, int]:
        """The bytes of an array or inline tensor, and those of one element."""
        if key in self.header["inline"]:
            inline = self.header["inline"][key]
            data = base64.b64decode(inline["data"], validate=True)
            require(len(data) == math.prod(inline["shape"]) * size_of(inline["dtype"]), key)
            return data, size_of(inline["dtype"])
        metadata = json.loads(self.read_file(f"{key}/zarr.json"))
        require(metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}, key)
        shape, file_shape = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        itemsize = size_of(metadata["data_type"])
        data = b""
        for at in itertools.product(*(range(-(-n // cut)) for n, cut in zip(shape, file_shape, strict=True))):
            name = f"{key}/{'.'.join(['c', *map(str, at)])}"
            there = [min(cut, n - i * cut) for n, cut, i in zip(shape, file_shape, at, strict=True)]
            raw = decode_file(self.read_file(name), metadata["codecs"], file_shape, there, itemsize)
            require(digest(raw) == self.files[name][2], f"raw digest of {name}")
            data += raw
        require(len(data) == math.prod(shape) * itemsize, key)
        return data, itemsize

    # -- section 6 -----------------------------------------------------------------------------

    def value(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$" not in node:
            return {key: self.value(item) for key, item in node.items()}
        return getattr(self, f"_{node['$'].replace('.', '_')}", self._other)(node)

    def _other(self, node: dict[str, Any]) -> Other:
        return Other(node["$"], {name: self.value(part) for name, part in node.items() if name != "$"})

    def _tuple(self, node: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(map(self.value, node["items"]))

    def _dict(self, node: dict[str, Any]) -> dict[Any, Any]:
        return {self.value(key): self.value(item) for key, item in node["items"]}

    def _odict(self, node: dict[str, Any]) -> OrderedDict[Any, Any]:
        found: Any = OrderedDict(self._dict(node))
        if "meta" in node:
            found._metadata = self.value(node["meta"])
        result: OrderedDict[Any, Any] = found
        return result

    def _int(self, node: dict[str, Any]) -> int:
        return int(node["value"], 16)

    def _float(self, node: dict[str, Any]) -> float:
        return float(struct.unpack(">d", bytes.fromhex(node["bits"]))[0])

    def _complex(self, node: dict[str, Any]) -> complex:
        return complex(self.value(node["real"]), self.value(node["imag"]))

    def _str(self, node: dict[str, Any]) -> str:
        return base64.b64decode(node["value"]).decode("utf-8", "surrogatepass")

    def _bytes(self, node: dict[str, Any]) -> bytes:
        return base64.b64decode(node["value"])

    def _tensor(self, node: dict[str, Any]) -> Tensor:
        shape = tuple(node["shape"])
        data, itemsize = self.array(node["key"])
        if "view" in node:
            view = node["view"]
            strides = [stride * itemsize for stride in view["stride"]]
            data = np.ndarray(view["shape"], f"V{itemsize}", data, view["offset"] * itemsize, strides).tobytes()
        return Tensor(node["dtype"], shape, data)

    _ndarray = _tensor

    def _npscalar(self, node: dict[str, Any]) -> Tensor:
        return Tensor(node["dtype"], (), base64.b64decode(node["data"]))

    def _optimizer(self, node: dict[str, Any]) -> dict[str, Any]:
        labels = [parameter[0] for parameter in node["parameters"]]
        state: dict[Any, dict[str, Any]] = {}
        for slot, values in self.value(node["slots"]).items():
            for label, item in values.items():
                state.setdefault(labels.index(label), {})[slot] = item
        numbers = iter(range(len(labels)))
        groups = [
            {**group, "params": list(itertools.islice(numbers, size))}
            for group, size in zip(self.value(node["param_groups"]), node["group_sizes"], strict=True)
        ]
        state.update(self.value(node["extra_state"]))
        return {"state": state, "param_groups": groups, **self.value(node["extra"])}


# -- files and chunks (section 5) ------------------------------------------------------------------


def decode_file(data: bytes, codecs: Any, cut: list[int], there: list[int], itemsize: int) -> bytes:
    """The bytes of the array in a file that is *cut* long along each axis, of which *there* is in the array."""
    if codecs[0]["name"] != "sharding_indexed":
        return without_padding(decode_chunk(data, codecs), cut, there, itemsize)
    sharding = codecs[0]["configuration"]
    chunk = sharding["chunk_shape"]
    slots = list(itertools.product(*(range(whole // part) for whole, part in zip(cut, chunk, strict=True))))
    index = check_crc32c(data[-16 * len(slots) - 4 :])
    raw = b""
    for slot, at in enumerate(slots):
        offset, size = struct.unpack_from("<QQ", index, 16 * slot)
        inside = [min(part, n - i * part) for n, part, i in zip(there, chunk, at, strict=True)]
        require((offset == size == MISSING) == (min(inside) <= 0), "a chunk is missing from a shard")
        if offset != MISSING:
            stored = decode_chunk(data[offset : offset + size], sharding["codecs"])
            raw += without_padding(stored, chunk, inside, itemsize)
    return raw


def decode_chunk(data: bytes, codecs: Any) -> bytes:
    require(codecs[0]["name"] == "bytes", "codecs")
    for codec in reversed(codecs[1:]):
        data = DECODERS[codec["name"]](data)
    return data


def check_crc32c(data: bytes) -> bytes:
    require(google_crc32c.value(data[:-4]) == int.from_bytes(data[-4:], "little"), "crc32c")
    return data[:-4]


DECODERS = {
    "blosc": lambda data: bytes(numcodecs.Blosc().decode(data)),
    "zstd": lambda data: bytes(numcodecs.Zstd().decode(data)),
    "gzip": lambda data: zlib.decompress(data, zlib.MAX_WBITS | 16),
    "crc32c": check_crc32c,
}


def without_padding(data: bytes, cut: list[int], there: list[int], itemsize: int) -> bytes:
    full = np.frombuffer(data, f"V{itemsize}").reshape(cut)
    return full[tuple(map(slice, there))].tobytes()


if __name__ == "__main__":
    print(Step(Path(sys.argv[1])).state())
