"""``asyncckpt ls``: the steps of a root, newest first."""

from __future__ import annotations

import sys
from typing import Any

from asyncckpt.cli.exits import ExitCode
from asyncckpt.cli.output import (
    Column,
    format_bytes,
    format_metrics,
    format_ratio,
    format_time,
    print_json,
    print_table,
)
from asyncckpt.cli.roots import open_catalog
from asyncckpt.errors import error_to_fields
from asyncckpt.model import CheckpointInfo
from asyncckpt.repository import DamagedStep

__all__ = ["info_entry", "run"]

_COLUMNS = (
    Column("step", right=True),
    Column("kind"),
    Column("created"),
    Column("raw", right=True),
    Column("stored", right=True),
    Column("ratio", right=True),
    Column("arrays", right=True),
    Column("finite"),
    Column("metrics"),
    Column("tags"),
)


def run(root: str, *, as_json: bool) -> ExitCode:
    """Print the steps; `ExitCode.CORRUPT` when none of them can be read.

    Raises:
        NothingCommittedError: there is none.
        StorageError: the root cannot be read.
    """
    catalog = open_catalog(root)
    infos = [committed.info for committed in catalog.committed()]
    damaged = catalog.damaged
    if as_json:
        entries = [{"step": found.step, **error_to_fields(found.error)} for found in damaged]
        print_json({"root": catalog.store.url, "steps": [info_entry(info) for info in infos], "damaged": entries})
    else:
        rows = {info.step: _row(info) for info in infos} | {found.step: _damaged_row(found) for found in damaged}
        print_table(_COLUMNS, [rows[step] for step in sorted(rows, reverse=True)])
        for found in damaged:
            sys.stderr.write(f"asyncckpt: {found.error}\n")
    return ExitCode.OK if infos or not damaged else ExitCode.CORRUPT


def info_entry(info: CheckpointInfo) -> dict[str, Any]:
    """One step as JSON, the same in every verb."""
    return {
        "step": info.step,
        "path": info.path,
        "kind": info.kind,
        "created": info.created.isoformat(),
        "raw_bytes": info.raw_bytes,
        "stored_bytes": info.stored_bytes,
        "num_arrays": info.num_arrays,
        "finite": info.finite,
        "metrics": dict(info.metrics),
        "tags": list(info.tags),
    }


def _row(info: CheckpointInfo) -> tuple[str, ...]:
    return (
        str(info.step),
        info.kind,
        format_time(info.created),
        format_bytes(info.raw_bytes),
        format_bytes(info.stored_bytes),
        format_ratio(info.raw_bytes, info.stored_bytes),
        str(info.num_arrays),
        {True: "yes", False: "NO", None: "-"}[info.finite],
        format_metrics(info.metrics),
        ", ".join(info.tags),
    )


def _damaged_row(damaged: DamagedStep) -> tuple[str, ...]:
    return (str(damaged.step), "DAMAGED", *["-"] * 8)
