"""Runs a codec chain on single chunks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.codecs import SHUFFLES, CodecJson

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ChunkCodec"]

# The writer runs one chunk per thread; blosc's own pool would serialise all callers behind one lock.
blosc.use_threads = False

_CRC_BYTES = 4
_BLOSC_HEADER_BYTES = 16
_ZSTD_FASTEST = -100  # zstd stores nothing as it is on request; this is memory speed on noise
_ZSTD_MAGIC = bytes.fromhex("28b52ffd")


class ChunkCodec:
    """Encodes and decodes single chunks; thread-safe.

    Args:
        codecs: a chain from `resolve_codecs` or a checked ``zarr.json``.
    """

    def __init__(self, codecs: tuple[CodecJson, ...]) -> None:
        self._stages = [_STAGES[codec["name"]](codec.get("configuration", {})) for codec in codecs[1:]]
        self._ends_in_checksum = bool(self._stages) and isinstance(self._stages[-1], _Crc32c)

    def encode(self, raw: Buffer, *, compress: bool = True) -> tuple[Buffer, ...]:
        """The stored bytes of one full chunk, in pieces; *raw* is C order, little endian.

        Without *compress* the codecs store what they can store, in frames that decode like any other.

        The checksum at the end is a piece of its own: appending it would copy megabytes for four bytes,
        and memory traffic is what slows training down beside the writer.
        """
        data: Buffer = raw
        for stage in self._stages[: len(self._stages) - self._ends_in_checksum]:
            data = stage.encode(data, compress)
        return (data, _Crc32c.checksum(data)) if self._ends_in_checksum else (data,)

    def decode_into(self, stored: Buffer, out: memoryview) -> None:
        """Decode one chunk into *out*, which has exactly the size of a full chunk.

        Memory on the way is bounded by the size of *out*, whatever *stored* says.

        Raises:
            CorruptCheckpointError: *stored* is not such a chunk; nothing past *out* is written.
        """
        limits = [len(out)]
        for _ in self._stages[1:]:
            limits.append(_most_encoded(limits[-1]))
        data = memoryview(stored).cast("B")
        for index in range(len(self._stages) - 1, -1, -1):
            data = self._stages[index].decode(data, out if index == 0 else None, limits[index])
        if data.obj is not out.obj:
            if len(data) != len(out):
                raise CorruptCheckpointError(f"a chunk decodes to {len(data)} bytes instead of {len(out)}")
            out[:] = data


def _most_encoded(num_bytes: int) -> int:
    """More than any codec makes of *num_bytes*, incompressible ones included (RFC 1951, ``ZSTD_compressBound``)."""
    return num_bytes + num_bytes // 8 + 128


class _Stage(Protocol):
    def encode(self, data: Buffer, compress: bool) -> Buffer:
        """What is stored instead of *data*; as little work as possible without *compress*."""

    def decode(self, data: memoryview, out: memoryview | None, limit: int) -> memoryview:
        """Undo `encode`.

        Args:
            data: what `encode` gave.
            out: where the result may go, in which case it fills it; memory of its own otherwise.
            limit: the most bytes that the result may have.

        Raises:
            CorruptCheckpointError: *data* is damaged or would decode to more.
        """


class _Blosc(_Stage):
    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._cname = configuration["cname"].encode("ascii")
        self._clevel = configuration["clevel"]
        self._shuffle = SHUFFLES[configuration["shuffle"]]
        self._blocksize = configuration["blocksize"]
        self._typesize = configuration["typesize"]

    def encode(self, data: Buffer, compress: bool) -> Buffer:
        stored = self._compress(data, self._clevel if compress else 0)
        if compress and len(stored) >= memoryview(data).nbytes:
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
        target = _room("blosc", int.from_bytes(data[4:8], "little"), out, limit)
        if int.from_bytes(data[12:16], "little") != len(data):
            raise CorruptCheckpointError("a blosc chunk has another size than it announces")
        try:
            blosc.decompress(data, target)
        except (RuntimeError, ValueError) as error:
            raise CorruptCheckpointError(f"a blosc chunk cannot be decoded: {error}") from error
        return target


def _room(codec: str, announced: int, out: memoryview | None, limit: int) -> memoryview:
    """Memory for the *announced* size of a frame."""
    if announced > limit or (out is not None and announced != limit):
        raise CorruptCheckpointError(f"a {codec} chunk announces {announced} bytes instead of {limit}")
    return memoryview(bytearray(announced)) if out is None else out


class _Crc32c(_Stage):
    def __init__(self, configuration: Mapping[str, Any]) -> None:
        pass

    def encode(self, data: Buffer, compress: bool) -> Buffer:
        return bytes(data) + self.checksum(data)

    @staticmethod
    def checksum(data: Buffer) -> bytes:
        """The bytes to append to *data*."""
        view = memoryview(data)
        # Of the buffers that are not bytes the extension takes only those that need no release.
        value: int = google_crc32c.value(np.frombuffer(view, np.uint8) if view.nbytes else b"")
        return value.to_bytes(_CRC_BYTES, "little")

    def decode(self, data: memoryview, out: memoryview | None, limit: int) -> memoryview:
        if len(data) < _CRC_BYTES:
            raise CorruptCheckpointError("a chunk is cut short")
        body = data[:-_CRC_BYTES]
        if self.checksum(body) != data[-_CRC_BYTES:]:
            raise CorruptCheckpointError("a chunk does not match its crc32c")
        return body


class _Gzip(_Stage):
    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._level = configuration["level"]

    def encode(self, data: Buffer, compress: bool) -> Buffer:
        compressor = zlib.compressobj(self._level if compress else 0, zlib.DEFLATED, zlib.MAX_WBITS | 16)
        return compressor.compress(data) + compressor.flush()

    def decode(self, data: memoryview, out: memoryview | None, limit: int) -> memoryview:
        decompressor = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            plain = decompressor.decompress(data, limit + 1)
        except zlib.error as error:
            raise CorruptCheckpointError(f"a gzip chunk cannot be decoded: {error}") from error
        if len(plain) > limit or not decompressor.eof or decompressor.unused_data:
            raise CorruptCheckpointError(f"a gzip chunk does not decode to {limit} bytes")
        return memoryview(plain)


class _Zstd(_Stage):
    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._level = configuration["level"]
        self._checksum = configuration["checksum"]

    def encode(self, data: Buffer, compress: bool) -> Buffer:
        level = self._level if compress else _ZSTD_FASTEST
        compressed: bytes = zstd.compress(data, level, self._checksum)
        return compressed

    def decode(self, data: memoryview, out: memoryview | None, limit: int) -> memoryview:
        target = _room("zstd", _zstd_content_bytes(data), out, limit)
        try:
            zstd.decompress(data, target)
        except (RuntimeError, ValueError) as error:
            raise CorruptCheckpointError(f"a zstd chunk cannot be decoded: {error}") from error
        return target


def _zstd_content_bytes(data: memoryview) -> int:
    """The decoded size in the header of a zstd frame (RFC 8878, section 3.1.1.1), which is always there.

    The library takes a frame without it too, but then tells nobody how much of the memory it filled.
    """
    descriptor = data[4] if len(data) > 4 and data[:4] == _ZSTD_MAGIC else 0
    single_segment = descriptor >> 5 & 1
    size = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if size == 0 or len(data) < start + size:
        raise CorruptCheckpointError("a zstd chunk does not announce its size")
    return int.from_bytes(data[start : start + size], "little") + (256 if size == 2 else 0)


_STAGES: dict[str, Callable[[Mapping[str, Any]], _Stage]] = {
    "blosc": _Blosc,
    "zstd": _Zstd,
    "gzip": _Gzip,
    "crc32c": _Crc32c,
}
