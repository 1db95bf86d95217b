"""``asyncckpt show``: one step, its header and its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from asyncckpt.cli.exits import ExitCode
from asyncckpt.cli.ls import info_entry
from asyncckpt.cli.output import (
    Column,
    format_bytes,
    format_metrics,
    format_ratio,
    format_time,
    json_value,
    print_json,
    print_table,
    printable,
)
from asyncckpt.cli.roots import find_step, open_catalog
from asyncckpt.format.walk import iter_tensors
from asyncckpt.model import CheckpointInfo
from asyncckpt.repository import CommittedStep

__all__ = ["run"]

_COLUMNS = (Column("tensor"), Column("dtype"), Column("shape"), Column("size", right=True), Column("note"))


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the state.

    Attributes:
        path: where it is in the state, ``/``-joined.
        dtype: name of its torch (or numpy) type.
        shape: its shape.
        bytes: its size, although a tied one is stored once only.
        key: of the array that holds it, or, if it is inline, its key in the header.
        inline: whether its value stands in the header.
        tied_to: path of an earlier tensor that shares its storage.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    key: str
    inline: bool
    tied_to: str | None


def run(root: str, which: str, only: Sequence[str], *, as_json: bool) -> ExitCode:
    """Print one step.

    Args:
        root: directory of the checkpoints.
        which: a step number, a tag, or ``latest``.
        only: patterns; with any, tensors that match none are left out.
        as_json: print JSON.

    Raises:
        NothingCommittedError: nothing is committed in *root*.
        CheckpointNotFoundError: no step answers to *which*.
        CorruptError: it is damaged.
    """
    committed = find_step(open_catalog(root), which)
    tensors = [
        tensor
        for tensor in _tensors(committed)
        if not only or any(fnmatchcase(tensor.path, pattern) for pattern in only)
    ]
    if as_json:
        print_json(
            {**info_entry(committed.info), **_facts(committed.info), "tensors": [asdict(one) for one in tensors]}
        )
    else:
        _print_facts(committed.info)
        _print_tensors(tensors)
    return ExitCode.OK


def _tensors(committed: CommittedStep) -> Iterator[_Tensor]:
    header = committed.header
    first_with: dict[str, str] = {}
    for path, node in iter_tensors(header.tree):
        shape, key = tuple(node["shape"]), node["key"]
        yield _Tensor(
            path=path,
            dtype=node["dtype"],
            shape=shape,
            bytes=math.prod(shape) * _item_bytes(node["dtype"]),
            key=key,
            inline=key in header.inline,
            tied_to=first_with.get(key),
        )
        first_with.setdefault(key, path)


def _item_bytes(dtype: str) -> int:
    """Bytes per element; every type but ``bool`` carries its number of bits in its name."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def _facts(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "format": info.format,
        "world_size": info.world_size,
        "run": info.run,
        "nonce": info.nonce,
        "versions": dict(info.versions),
        "metadata": dict(info.metadata),
    }


def _print_facts(info: CheckpointInfo) -> None:
    ratio = format_ratio(info.raw_bytes, info.stored_bytes)
    facts = {
        "path": info.path,
        "kind": info.kind,
        "created": format_time(info.created),
        "size": f"{format_bytes(info.raw_bytes)}, stored as {format_bytes(info.stored_bytes)} ({ratio})",
        "arrays": f"{info.num_arrays}, written by {info.world_size} rank{'s' * (info.world_size != 1)}",
        "finite": {True: "yes", False: "NO: it holds NaN or infinity", None: ""}[info.finite],
        "metrics": format_metrics(info.metrics),
        "tags": ", ".join(info.tags),
        "metadata": ", ".join(f"{name}={json_value(value)}" for name, value in info.metadata.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in info.versions.items()),
        "format": str(info.format),
        "run": info.run,
    }
    print(f"step {info.step}")
    for name, value in facts.items():
        if value:
            print(printable(f"  {name:<9} {value}"))


def _print_tensors(tensors: Sequence[_Tensor]) -> None:
    for item, group in groupby(tensors, key=lambda tensor: tensor.path.partition("/")[0]):
        members = list(group)
        unique = {tensor.key: tensor.bytes for tensor in members}
        print(f"\n{printable(item)}: {len(members)} tensors, {format_bytes(sum(unique.values()))}")
        print_table(_COLUMNS, [_row(tensor) for tensor in members])


def _row(tensor: _Tensor) -> tuple[str, ...]:
    note = f"tied to {tensor.tied_to}" if tensor.tied_to else "in the header" if tensor.inline else ""
    shape = f"[{', '.join(map(str, tensor.shape))}]"
    return (tensor.path, tensor.dtype, shape, format_bytes(tensor.bytes), note)
