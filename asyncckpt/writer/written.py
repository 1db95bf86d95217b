"""What has been written of a save so far, and the header that says so."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

import msgspec

from asyncckpt.format.header import FORMAT, Header, IndexRef, InlineTensor
from asyncckpt.format.index import FileRecord
from asyncckpt.model import TensorSpec
from asyncckpt.writer.encode import JobResult
from asyncckpt.writer.finite import holds_non_finite, type_of_values
from asyncckpt.writer.jobs import tensor_bytes
from asyncckpt.writer.messages import Save

__all__ = ["Written"]


@dataclass(slots=True)
class Written:
    """The files and inline tensors of one step, growing.

    Attributes:
        trained: keys of the arrays that training should change.
        trained_digest: of their values.
        non_finite: keys of the arrays with NaN or infinity.
        finite: whether there are none; None when nobody looked.
    """

    records: list[FileRecord] = field(default_factory=list)
    inline: dict[str, InlineTensor] = field(default_factory=dict)
    num_arrays: int = 0
    raw_bytes: int = 0
    linked_bytes: int = 0
    encode_s: float = 0.0
    write_s: float = 0.0
    trained: set[str] = field(default_factory=set)
    trained_digest: str | None = None
    non_finite: set[str] = field(default_factory=set)
    finite: bool | None = None

    def add(self, result: JobResult) -> None:
        """A job is done."""
        self.records.extend(result.records)
        self.raw_bytes += result.raw_bytes
        self.linked_bytes += result.linked_bytes
        self.encode_s += result.encode_s
        self.write_s += result.write_s
        self.non_finite.update(result.non_finite)

    def add_inline(self, spec: TensorSpec, arena: memoryview, *, check_finite: bool) -> None:
        """A tensor for the header, which lies in *arena*."""
        data = arena[spec.offset : spec.offset + tensor_bytes(spec)]
        self.inline[spec.key] = InlineTensor(
            dtype=spec.data_type,
            shape=list(spec.shape),
            data=base64.b64encode(data).decode("ascii"),
            torch_dtype=spec.torch_dtype,
        )
        self.raw_bytes += len(data)
        if check_finite and holds_non_finite(data, type_of_values(spec)):
            self.non_finite.add(spec.key)

    @property
    def stored_bytes(self) -> int:
        return sum(record.bytes for record in self.records)

    def header(self, save: Save, indexes: list[IndexRef], stored_bytes: int) -> Header:
        """The header of the step, when everything else is written.

        Args:
            save: identity and header fields.
            indexes: of all ranks.
            stored_bytes: of all files but the header itself.
        """
        return Header(
            format=FORMAT,
            step=save.step,
            kind=save.kind,
            nonce=save.nonce,
            run=save.run,
            created=save.created,
            world_size=1,
            tags=save.tags,
            metrics=save.metrics,
            metadata=save.metadata,
            versions=save.versions,
            tree=save.tree,
            inline=self.inline,
            arrays=self.num_arrays,
            raw_bytes=self.raw_bytes,
            stored_bytes=stored_bytes,
            indexes=indexes,
            timings={"stage_s": save.stage_s, "encode_s": self.encode_s, "write_s": self.write_s},
            finite=msgspec.UNSET if self.finite is None else self.finite,
        )
