"""The header of a step: the ``zarr.json`` of its group, whose presence means "committed"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import msgspec
import xxhash

from asyncckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from asyncckpt.format.index import IndexRef, index_key
from asyncckpt.format.json_text import refuse_duplicates
from asyncckpt.format.limits import MAX_COUNT, MAX_HEADER_BYTES, MAX_INDEX_BYTES
from asyncckpt.format.paths import check_key
from asyncckpt.format.tree import Node, decode_value
from asyncckpt.model import CheckpointInfo

__all__ = [
    "FORMAT", "MAX_HEADER_BYTES", "Header", "IndexRef", "InlineTensor", "decode_header_file", "encode_header_file",
    "info_from_header",
]  # fmt: skip

FORMAT = 1
_MAX_STEP = 10**18
_DIGITS = 32
_ZEROS = b"0" * _DIGITS
_TAIL = re.compile(rb'"digest":"([0-9a-f]{32})"\}\}\}\Z')
_TAIL_BYTES = len('"}}}')


class InlineTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A tensor of at most `layout.INLINE_BYTES`, kept in the header.

    Attributes:
        dtype: Zarr data type name.
        shape: its shape.
        data: base64 of its bytes, C order, little endian.
        torch_dtype: torch's name for the type when Zarr has none.
    """

    dtype: str
    shape: list[int]
    data: str
    torch_dtype: str | None = None


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything about a step but the tensors themselves; ``docs/format.md`` describes each field."""

    format: int
    step: int
    kind: str
    nonce: str
    run: str
    created: str
    world_size: int
    tags: list[str]
    metrics: Any
    metadata: Any
    versions: dict[str, str]
    tree: Any
    inline: dict[str, InlineTensor]
    arrays: int
    raw_bytes: int
    stored_bytes: int
    indexes: list[IndexRef]
    timings: dict[str, float]
    finite: bool | msgspec.UnsetType = msgspec.UNSET  # left out when nobody looked
    digest: str = "0" * _DIGITS  # must stay the last field: the file ends with it


class _Attributes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    asyncckpt: Header


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    zarr_format: int
    node_type: str
    attributes: _Attributes


class _FormatOnly(msgspec.Struct, frozen=True):
    format: int


class _FormatAttributes(msgspec.Struct, frozen=True):
    asyncckpt: _FormatOnly


class _FormatGroup(msgspec.Struct, frozen=True):
    attributes: _FormatAttributes


_decode_group = msgspec.json.Decoder(_Group).decode
_decode_format = msgspec.json.Decoder(_FormatGroup).decode


def encode_header_file(header: Header) -> bytes:
    """The ``zarr.json`` of a step, its digest filled in.

    The digest is the XXH3-128 of the whole file with the 32 digits of the digest replaced by zeros,
    so a reader needs no canonical JSON to check it.
    """
    blank = msgspec.structs.replace(header, digest="0" * _DIGITS)
    data = msgspec.json.encode(_Group(3, "group", _Attributes(blank)))
    at = len(data) - _TAIL_BYTES - _DIGITS
    return data[:at] + xxhash.xxh3_128_hexdigest(data).encode("ascii") + data[at + _DIGITS :]


def decode_header_file(data: bytes) -> Header:
    """The header in a step's ``zarr.json``, verified.

    Raises:
        UnsupportedFormatError: written by a newer version, or not a checkpoint of ours.
        CorruptCheckpointError: the file is damaged.
    """
    if len(data) > MAX_HEADER_BYTES:
        raise CorruptCheckpointError(f"the header has {len(data)} bytes, more than the limit of {MAX_HEADER_BYTES}")
    tail = _TAIL.search(data, max(0, len(data) - 64))
    if tail is None:
        raise CorruptCheckpointError("the header is cut short or was changed: it does not end in its digest")
    start, end = tail.span(1)
    if xxhash.xxh3_128_hexdigest(data[:start] + _ZEROS + data[end:]).encode("ascii") != tail[1]:
        raise CorruptCheckpointError("the header does not match its digest")
    try:
        found = _decode_format(data).attributes.asyncckpt.format
        if found != FORMAT:
            raise UnsupportedFormatError(
                f"the checkpoint has format {found}; this asyncckpt reads format {FORMAT}: update it", format=found
            )
        group = _decode_group(data)
        refuse_duplicates(data, msgspec.json.encode(group))
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise CorruptCheckpointError(f"the header is malformed: {error}") from error
    if group.zarr_format != 3 or group.node_type != "group":
        raise CorruptCheckpointError("the header is not in a Zarr v3 group")
    _check(group.attributes.asyncckpt)
    return group.attributes.asyncckpt


def _check(header: Header) -> None:
    counts = (header.world_size, header.arrays, header.raw_bytes, header.stored_bytes)
    if min(header.step, *counts) < 0 or header.step >= _MAX_STEP or max(counts) > MAX_COUNT:
        raise CorruptCheckpointError("the header has a negative or an absurd count")
    for key in header.inline:
        check_key(key)
    _check_indexes(header)
    try:
        _created(header)
    except (ValueError, OverflowError) as error:
        raise CorruptCheckpointError(f"the header was created at {header.created[:50]!r}") from error


def _check_indexes(header: Header) -> None:
    ranks = {reference.rank for reference in header.indexes}
    if not len(ranks) == len(header.indexes) == header.world_size or min(ranks, default=0) < 0:
        raise CorruptCheckpointError(f"the header names {len(header.indexes)} indexes for {header.world_size} ranks")
    for reference in header.indexes:
        if reference.rank >= header.world_size or reference.key != index_key(reference.rank):
            raise CorruptCheckpointError(f"the index of rank {reference.rank} cannot be {reference.key[:100]!r}")
        if not 0 <= reference.bytes <= MAX_INDEX_BYTES:
            raise CorruptCheckpointError(f"the index of rank {reference.rank} cannot have {reference.bytes} bytes")


def _created(header: Header) -> datetime:
    """When the header was created.

    Raises:
        ValueError: it is no time, or one that cannot be compared with others: without a zone.
        OverflowError: it has no equivalent in UTC.
    """
    created = datetime.fromisoformat(header.created)
    if created.tzinfo is None:
        raise ValueError("a time without a zone")
    created.astimezone(UTC)
    return created


def info_from_header(header: Header, path: str) -> CheckpointInfo:
    """What *header* says about the step at *path*.

    Raises:
        CorruptCheckpointError: metrics or metadata are malformed.
    """
    return CheckpointInfo(
        step=header.step,
        path=path,
        kind=header.kind,
        created=_created(header),
        raw_bytes=header.raw_bytes,
        stored_bytes=header.stored_bytes,
        num_arrays=header.arrays,
        world_size=header.world_size,
        format=header.format,
        nonce=header.nonce,
        run=header.run,
        metrics=_numbers(header.metrics),
        tags=tuple(header.tags),
        versions=MappingProxyType(header.versions),
        metadata=_mapping(header.metadata),
        finite=None if header.finite is msgspec.UNSET else header.finite,
    )


def _numbers(node: Node) -> Mapping[str, float]:
    found = _mapping(node)
    if not all(type(name) is str and type(value) in (int, float) for name, value in found.items()):
        raise CorruptCheckpointError("metrics are numbers by name")
    try:
        return MappingProxyType({name: float(value) for name, value in found.items()})
    except OverflowError as error:
        raise CorruptCheckpointError("a metric is larger than any float") from error


def _mapping(node: Node) -> Mapping[str, Any]:
    value = decode_value(node, _refuse)
    if not isinstance(value, dict):
        raise CorruptCheckpointError("metrics and metadata are mappings")
    return MappingProxyType(value)


def _refuse(node: dict[str, Any], depth: int) -> Any:
    raise CorruptCheckpointError(f"the header holds an unknown value {str(node)[:100]}")
