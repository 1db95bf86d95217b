"""Copies host tensors into live CUDA tensors through a ring of pinned buffers.

The only module of a restore that touches streams and events. ``runtime`` is ``torch.cuda`` or, in tests, a
fake that records the order of calls. Why a restore goes through host memory and not through a second copy on
the device is argued in ``docs/decisions/022-restore-to-gpu.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch

from asyncckpt.logs import get_logger
from asyncckpt.memory import ALIGNMENT_BYTES, aligned
from asyncckpt.tensors import cut_alike, view_like

__all__ = ["Uploader"]

_logger = get_logger("asyncckpt.restore")

_Copy = tuple[torch.Tensor, torch.Tensor]


class Uploader:
    """One upload: `reserve` whatever may be refused, then `upload`. The ring is freed with it.

    While one buffer is filled, those before it are on their way. Tensors of any size share the buffers:
    large ones are cut, small ones lie side by side.

    Args:
        runtime: the ``torch.cuda`` namespace.
        buffer_bytes: size of one buffer at most; less is taken for less to copy.
        num_buffers: how many there are.
    """

    def __init__(self, runtime: Any = torch.cuda, buffer_bytes: int = 64 * 2**20, num_buffers: int = 4) -> None:
        self._runtime = runtime
        self._buffer_bytes = buffer_bytes
        self._num_buffers = num_buffers
        self._ring: list[_Buffer] = []
        self._turn = 0
        self._streams: dict[torch.device, Any] = {}
        # A strided copy across devices allocates on the device, and might be refused half-way.
        self._workspaces: dict[torch.device, torch.Tensor] = {}

    def reserve(self, copies: Iterable[_Copy]) -> None:
        """Take all memory that uploading *copies* needs, so that `upload` asks for none.

        Raises:
            torch.OutOfMemoryError: there is none; nothing was copied.
        """
        copies = list(copies)
        total = sum(aligned(target.nbytes) for target, _ in copies)
        self._buffer_bytes = min(self._buffer_bytes, max(total, ALIGNMENT_BYTES))
        num_buffers = min(self._num_buffers, -(-total // self._buffer_bytes))
        self._ring = [_Buffer(memory) for memory in _allocate(num_buffers, self._buffer_bytes)]
        for target, _ in copies:
            if not target.is_contiguous() and target.device not in self._workspaces:
                self._workspaces[target.device] = torch.empty(
                    self._buffer_bytes, dtype=torch.uint8, device=target.device
                )

    def upload(self, copies: Iterable[_Copy]) -> None:
        """Copy each source into its target; complete on return, and for the caller's streams.

        Args:
            copies: pairs of target and source, as given to `reserve`: of the same type and shape.
        """
        for target, source in copies:
            stream = self._stream(target.device)
            with torch.inference_mode() if target.is_inference() else nullcontext():
                _record_use(target, stream)
                for piece, values in cut_alike(target, source, self._buffer_bytes):
                    self._send(piece, values, stream)
        for device, stream in self._streams.items():
            self._runtime.current_stream(device).wait_stream(stream)
        for buffer in self._ring:
            self._close(buffer)
            buffer.wait()

    def _stream(self, device: torch.device) -> Any:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = self._runtime.Stream(device=device)
            # What the caller queued before may still read or write the targets.
            stream.wait_stream(self._runtime.current_stream(device))
        return stream

    def _send(self, piece: torch.Tensor, values: torch.Tensor, stream: Any) -> None:
        buffer = self._room(piece.nbytes)
        staged = buffer.place(piece)
        staged.copy_(values)
        buffer.streams.add(piece.device)
        with self._runtime.stream(stream):
            if piece.is_contiguous():
                piece.copy_(staged, non_blocking=True)
            else:
                workspace = view_like(self._workspaces[piece.device], 0, piece)
                workspace.copy_(staged, non_blocking=True)
                piece.copy_(workspace)

    def _room(self, num_bytes: int) -> _Buffer:
        """The buffer that takes *num_bytes* next, waiting until the devices have read what was in it."""
        buffer = self._ring[self._turn]
        if buffer.has_room(num_bytes):
            return buffer
        self._close(buffer)
        self._turn = (self._turn + 1) % len(self._ring)
        buffer = self._ring[self._turn]
        buffer.wait()
        return buffer

    def _close(self, buffer: _Buffer) -> None:
        for device in buffer.streams:
            stream = self._streams[device]
            with self._runtime.stream(stream):
                event = self._runtime.Event()
                event.record(stream)
            buffer.events.append(event)
        buffer.streams.clear()


class _Buffer:
    """A part of the ring.

    Attributes:
        streams: devices that were told to read from it since it was last closed.
        events: what to wait for before it is filled again.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._filled = 0
        self.streams: set[torch.device] = set()
        self.events: list[Any] = []

    def has_room(self, num_bytes: int) -> bool:
        return self._filled + num_bytes <= self._memory.numel()

    def place(self, like: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor in the free part with type and shape of *like*."""
        view = view_like(self._memory, self._filled, like)
        self._filled += aligned(like.nbytes)
        return view

    def wait(self) -> None:
        for event in self.events:
            event.synchronize()
        self.events.clear()
        self._filled = 0


def _record_use(target: torch.Tensor, stream: Any) -> None:
    # Should the caller be interrupted and drop the tensor, its memory outlives the copies that are under way.
    target.record_stream(stream)


def _allocate(count: int, num_bytes: int) -> list[torch.Tensor]:
    # Torch keeps pinned memory that is freed, for the next restore or a data loader, but rounds it up to powers of two.
    try:
        return [_pinned(num_bytes) for _ in range(count)]
    except RuntimeError as error:
        _logger.warning(
            "the CUDA driver refused %d bytes of pinned memory, so the restore is slower: %s", count * num_bytes, error
        )
        return [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(count)]


def _pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
