"""The codec chain of one chunk: presets, validation, and running it on numpy-free buffers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import google_crc32c
from numcodecs import blosc, zstd

from asyncckpt.errors import CorruptCheckpointError, InvalidOptionError
from asyncckpt.format.dtypes import DataType
from asyncckpt.options import Compression

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ChunkCodec", "resolve_codecs"]

# The writer runs one chunk per thread; blosc's own pool would serialise all callers behind one lock.
blosc.use_threads = False

CodecJson = Mapping[str, Any]

_CRC_BYTES = 4
_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
_CNAMES = ("lz4", "lz4hc", "blosclz", "zstd", "zlib", "snappy")
_BLOSC_HEADER_BYTES = 16
_ZSTD_MAGIC = (0xFD2FB528).to_bytes(4, "little")
_PRESETS: dict[str, dict[str, Any] | None] = {
    "fast": {"cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "blocksize": 0},
    # blosc's automatic block size for zstd level 1 is so small that half of the gain is lost.
    "small": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 2**20},
    "none": None,
}
_CONFIGURATION_KEYS = {
    "bytes": {"endian"},
    "blosc": {"cname", "clevel", "shuffle", "typesize", "blocksize"},
    "zstd": {"level", "checksum"},
    "gzip": {"level"},
    "crc32c": set(),
}


def resolve_codecs(compression: Compression, data_type: DataType) -> tuple[CodecJson, ...]:
    """The Zarr v3 codec chain that *compression* means for *data_type*.

    Args:
        compression: ``"fast"``, ``"small"``, ``"none"``, or a list of ``bytes`` followed by any of
            ``blosc``, ``zstd``, ``gzip`` and ``crc32c``.
        data_type: element type; decides byte order and ``typesize``.

    Raises:
        InvalidOptionError: an unknown preset or codec, or a configuration that is not understood.
    """
    if isinstance(compression, str):
        return _resolve_preset(compression, data_type)
    try:
        return _resolve_list(json.dumps(compression), data_type)
    except TypeError as error:
        raise InvalidOptionError(f"compression is a preset or a list of codecs, not {compression!r}") from error


@lru_cache(maxsize=256)
def _resolve_preset(name: str, data_type: DataType) -> tuple[CodecJson, ...]:
    if name not in _PRESETS:
        raise InvalidOptionError(
            f"compression must be one of {', '.join(map(repr, _PRESETS))} or a codec list, not {name!r}"
        )
    settings = _PRESETS[name]
    compressor = [] if settings is None else [_blosc(settings, data_type)]
    return (_bytes(data_type), *compressor, {"name": "crc32c"})


def _bytes(data_type: DataType) -> CodecJson:
    if not data_type.has_endianness:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def _blosc(settings: Mapping[str, Any], data_type: DataType) -> CodecJson:
    return {"name": "blosc", "configuration": {"typesize": data_type.itemsize, **settings}}


@lru_cache(maxsize=256)
def _resolve_list(text: str, data_type: DataType) -> tuple[CodecJson, ...]:
    listed = json.loads(text)
    if not isinstance(listed, list) or not listed or any(not isinstance(codec, dict) for codec in listed):
        raise InvalidOptionError("compression is a preset or a non-empty list of codecs")
    if listed[0].get("name") != "bytes":
        raise InvalidOptionError("the first codec must be 'bytes'")
    chain: list[CodecJson] = [_bytes(data_type)]
    for codec in listed[1:]:
        chain.append(_with_defaults(codec, data_type))
    check_codecs(chain, data_type)
    return tuple(chain)


def _with_defaults(codec: CodecJson, data_type: DataType) -> CodecJson:
    # Readers insist on settings that the specification calls required.
    defaults = {
        "blosc": {"typesize": data_type.itemsize, **(_PRESETS["fast"] or {})},
        "gzip": {"level": 5},
        "zstd": {"level": 0, "checksum": False},
    }.get(str(codec.get("name")))
    if defaults is None or not isinstance(codec.get("configuration", {}), dict):
        return codec
    return {**codec, "configuration": {**defaults, **codec.get("configuration", {})}}


def check_codecs(codecs: list[CodecJson], data_type: DataType) -> None:
    """Accept *codecs* as a chain for *data_type*.

    Raises:
        InvalidOptionError: they are not a chain this package can run.
    """
    if not codecs or codecs[0] != _bytes(data_type):
        raise InvalidOptionError(f"the codecs of {data_type.name} must begin with {_bytes(data_type)}")
    for codec in codecs[1:]:
        name, configuration = codec.get("name"), codec.get("configuration", {})
        if name not in _CONFIGURATION_KEYS or name == "bytes" or set(codec) - {"name", "configuration"}:
            raise InvalidOptionError(f"codec {str(name)[:50]!r} is not supported; use blosc, zstd, gzip or crc32c")
        if not isinstance(configuration, dict) or set(configuration) - _CONFIGURATION_KEYS[name]:
            raise InvalidOptionError(f"codec {name!r} has an unknown setting: {str(configuration)[:200]}")
        _make_stage(codec, data_type.itemsize)


class ChunkCodec:
    """Encodes and decodes single chunks; thread-safe.

    Args:
        codecs: a chain from `resolve_codecs` or a checked ``zarr.json``.
        data_type: element type.
    """

    def __init__(self, codecs: tuple[CodecJson, ...], data_type: DataType) -> None:
        self._stages = [_make_stage(codec, data_type.itemsize) for codec in codecs[1:]]

    def encode(self, raw: Buffer) -> Buffer:
        """The stored bytes of one full chunk; *raw* is C order, little endian."""
        data: Buffer = raw
        for stage in self._stages:
            data = stage.encode(data)
        return data

    def decode_into(self, stored: Buffer, out: memoryview) -> None:
        """Decode one chunk into *out*, which has exactly the size of a full chunk.

        Raises:
            CorruptCheckpointError: *stored* is not such a chunk; nothing past *out* is written.
        """
        data = memoryview(stored).cast("B")
        for index in range(len(self._stages) - 1, -1, -1):
            last = index == 0 or all(isinstance(stage, _Crc32c) for stage in self._stages[:index])
            data = self._stages[index].decode(data, out if last else None, len(out))
        if data.obj is not out.obj:
            if len(data) != len(out):
                raise CorruptCheckpointError(f"a chunk decodes to {len(data)} bytes instead of {len(out)}")
            out[:] = data


class _Stage:
    def encode(self, data: Buffer) -> Buffer:
        raise NotImplementedError

    def decode(self, data: memoryview, out: memoryview | None, limit: int) -> memoryview:
        """Undo `encode`, into *out* if given; never gives more than *limit* bytes (plus codec overhead)."""
        raise NotImplementedError


class _Blosc(_Stage):
    def __init__(self, configuration: Mapping[str, Any], itemsize: int) -> None:
        self._cname = configuration["cname"].encode("ascii")
        self._clevel = configuration["clevel"]
        self._shuffle = _SHUFFLES[configuration["shuffle"]]
        self._blocksize = configuration["blocksize"]
        self._typesize = configuration.get("typesize", itemsize)

    def encode(self, data: Buffer) -> Buffer:
        stored = self._compress(data, self._clevel)
        if len(stored) >= memoryview(data).nbytes:
            # Incompressible: a stored frame decodes at memory speed, with the same codec.
            return self._compress(data, 0)
        return stored

    def _compress(self, data: Buffer, clevel: int) -> bytes:
        compressed: bytes = blosc.compress(
            data, self._cname, clevel, self._shuffle, self._blocksize, typesize=self._typesize
        )
        return compressed

    def decode(self, data: memoryview, out: memoryview | None, limit: int) -> memoryview:
        if len(data) < _BLOSC_HEADER_BYTES:
            raise CorruptCheckpointError("a blosc chunk is cut short")
        # Bytes 4..8 and 12..16 of a blosc frame: decoded and encoded size.
        num_bytes = int.from_bytes(data[4:8], "little")
        if (
            num_bytes > limit
            or int.from_bytes(data[12:16], "little") != len(data)
            or (out is not None and num_bytes != limit)
        ):
            raise CorruptCheckpointError(f"a blosc chunk announces {num_bytes} bytes instead of {limit}")
        target = memoryview(bytearray(num_bytes)) if out is None else out
        try:
            blosc.decompress(data, target)
        except (RuntimeError, ValueError) as error:
            raise CorruptCheckpointError(f"a blosc chunk cannot be decoded: {error}") from error
        return target


class _Crc32c(_Stage):
    def encode(self, data: Buffer) -> Buffer:
        plain = data if isinstance(data, bytes) else bytes(data)
        checksum: int = google_crc32c.value(plain)
        return plain + checksum.to_bytes(_CRC_BYTES, "little")

    def decode(self, data: memoryview, out: memoryview | None, limit: int) -> memoryview:
        if len(data) < _CRC_BYTES:
            raise CorruptCheckpointError("a chunk is cut short")
        body = data[:-_CRC_BYTES]
        if google_crc32c.value(bytes(body)) != int.from_bytes(data[-_CRC_BYTES:], "little"):
            raise CorruptCheckpointError("a chunk does not match its crc32c")
        return body


class _Gzip(_Stage):
    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._level = configuration.get("level", 5)

    def encode(self, data: Buffer) -> Buffer:
        compressor = zlib.compressobj(self._level, zlib.DEFLATED, zlib.MAX_WBITS | 16)
        return compressor.compress(data) + compressor.flush()

    def decode(self, data: memoryview, out: memoryview | None, limit: int) -> memoryview:
        decompressor = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            plain = decompressor.decompress(data, limit + 1)
        except zlib.error as error:
            raise CorruptCheckpointError(f"a gzip chunk cannot be decoded: {error}") from error
        if len(plain) > limit or not decompressor.eof:
            raise CorruptCheckpointError(f"a gzip chunk does not decode to {limit} bytes")
        return memoryview(plain)


class _Zstd(_Stage):
    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._level = configuration.get("level", 0)
        self._checksum = configuration.get("checksum", False)

    def encode(self, data: Buffer) -> Buffer:
        compressed: bytes = zstd.compress(data, self._level, self._checksum)
        return compressed

    def decode(self, data: memoryview, out: memoryview | None, limit: int) -> memoryview:
        # The library neither bounds what it allocates nor tells that it filled only a part of a buffer.
        num_bytes = _zstd_content_bytes(data)
        if num_bytes > limit or (out is not None and num_bytes != limit):
            raise CorruptCheckpointError(f"a zstd chunk announces {num_bytes} bytes instead of {limit}")
        target = memoryview(bytearray(num_bytes)) if out is None else out
        try:
            zstd.decompress(data, target)
        except (RuntimeError, ValueError) as error:
            raise CorruptCheckpointError(f"a zstd chunk cannot be decoded: {error}") from error
        return target


def _zstd_content_bytes(frame: memoryview) -> int:
    """What a zstd frame decodes to (RFC 8878, section 3.1.1.1); every encoder that knows the size writes it.

    Raises:
        CorruptCheckpointError: it does not say, or is no frame.
    """
    if len(frame) < 5 or frame[:4] != _ZSTD_MAGIC:
        raise CorruptCheckpointError("a zstd chunk is not a zstd frame")
    descriptor = frame[4]
    is_single_segment = bool(descriptor & 0x20)
    start = 5 + (not is_single_segment) + (0, 1, 2, 4)[descriptor & 3]
    num_bytes = (1 if is_single_segment else 0, 2, 4, 8)[descriptor >> 6]
    if num_bytes == 0 or len(frame) < start + num_bytes:
        raise CorruptCheckpointError("a zstd chunk does not say how long it is")
    size = int.from_bytes(frame[start : start + num_bytes], "little")
    return size + 256 if num_bytes == 2 else size


def _make_stage(codec: CodecJson, itemsize: int) -> _Stage:
    configuration = codec.get("configuration", {})
    makers: dict[str, Callable[[], _Stage]] = {
        "blosc": lambda: _Blosc(_checked_blosc(configuration), itemsize),
        "zstd": lambda: _Zstd(configuration),
        "gzip": lambda: _Gzip(configuration),
        "crc32c": _Crc32c,
    }
    return makers[codec["name"]]()


def _checked_blosc(configuration: Mapping[str, Any]) -> Mapping[str, Any]:
    valid = (
        configuration.get("cname") in _CNAMES
        and configuration.get("clevel") in range(10)
        and configuration.get("shuffle") in _SHUFFLES
        and isinstance(configuration.get("blocksize"), int)
        and 0 <= configuration["blocksize"] < 2**31
        and configuration.get("typesize", 1) in range(1, 256)
    )
    if not valid:
        raise InvalidOptionError(f"blosc does not understand {str(dict(configuration))[:200]}")
    return configuration
