"""Frames on a stream socket: 4 bytes of length (little endian), then JSON; descriptors ride along.

Pure parsing (`FrameBuffer`) is apart from the two ways of moving bytes: blocking in the trainer,
whose threads may wait, and readiness-driven in the writer's event loop.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import anyio
import msgspec

from asyncckpt.errors import WriterError
from asyncckpt.writer.messages import FromWriter, ToWriter

__all__ = ["MAX_FRAME_BYTES", "BlockingChannel", "FrameBuffer", "receive_frames", "send_frame"]

MAX_FRAME_BYTES = 512 * 2**20
_LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 256 * 1024
_MAX_DESCRIPTORS = 4
_CAN_PASS_DESCRIPTORS = hasattr(socket, "send_fds") and sys.platform != "win32"

_encoder = msgspec.json.Encoder()
M = TypeVar("M")


def encode_frame(message: object) -> bytes:
    """The frame of *message*.

    Raises:
        WriterError: the message is larger than `MAX_FRAME_BYTES`.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WriterError(
            f"a message of {len(body)} bytes exceeds the {MAX_FRAME_BYTES} byte limit of the writer protocol"
        )
    return _LENGTH.pack(len(body)) + body


class FrameBuffer(Generic[M]):
    """Turns received bytes into messages. Descriptors are queued in the order they arrived."""

    def __init__(self, decoder: msgspec.json.Decoder[M]) -> None:
        self._decoder = decoder
        self._pending = bytearray()
        self.descriptors: list[int] = []

    def feed(self, data: bytes, descriptors: list[int] | None = None) -> Iterator[M]:
        """Add *data* and yield every message that is now complete."""
        self._pending += data
        self.descriptors.extend(descriptors or ())
        while len(self._pending) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._pending)
            if length > MAX_FRAME_BYTES:
                raise WriterError(f"a frame announces {length} bytes; the stream is out of step")
            end = _LENGTH.size + length
            if len(self._pending) < end:
                return
            body = bytes(memoryview(self._pending)[_LENGTH.size : end])
            del self._pending[:end]
            yield self._decoder.decode(body)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    if _CAN_PASS_DESCRIPTORS and sock.family == socket.AF_UNIX:
        data, descriptors, _, _ = socket.recv_fds(sock, _RECEIVE_BYTES, _MAX_DESCRIPTORS, _cloexec_flag())
        return data, descriptors
    return sock.recv(_RECEIVE_BYTES), []


def _cloexec_flag() -> int:
    return getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class BlockingChannel:
    """The trainer's end: `send` from one thread at a time, `receive` in another, `close` from any."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames: FrameBuffer[FromWriter] = FrameBuffer(msgspec.json.Decoder(FromWriter))

    def send(self, message: ToWriter, descriptor: int | None = None) -> None:
        """Hand the whole frame to the kernel; it then reaches the writer even if this process dies.

        Raises:
            OSError: the writer is gone.
        """
        frame = encode_frame(message)
        if descriptor is None:
            self._sock.sendall(frame)
            return
        # The descriptor arrives with the first byte of the frame, before the message is decoded.
        sent = socket.send_fds(self._sock, [frame], [descriptor])
        self._sock.sendall(frame[sent:])

    def receive(self, interval_s: float) -> Iterator[FromWriter | None]:
        """Yield messages until the writer closes its end, and None whenever *interval_s* passed without one.

        Never raises for a writer that died.
        """
        # Not a timeout of the socket, which would hold for `send` too and could cut a frame in two.
        with selectors.DefaultSelector() as selector:
            try:
                selector.register(self._sock, selectors.EVENT_READ)
            except (OSError, ValueError):
                return  # closed
            while True:
                if not selector.select(interval_s):
                    yield None
                    continue
                try:
                    data = self._sock.recv(_RECEIVE_BYTES)
                except OSError:
                    return
                if not data:
                    return
                yield from self._frames.feed(data)

    def shutdown(self) -> None:
        """Wake a blocked `receive` and fail further sends; idempotent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


async def receive_frames(sock: socket.socket, frames: FrameBuffer[Any]) -> list[Any] | None:
    """Wait for data on the non-blocking *sock*; the messages completed by it, or None at its end."""
    while True:
        try:
            data, descriptors = _receive(sock)
        except BlockingIOError:
            await anyio.wait_readable(sock)
            continue
        except ConnectionError:
            return None
        if not data:
            return None
        return list(frames.feed(data, descriptors))


async def send_frame(sock: socket.socket, message: FromWriter) -> None:
    """Send all of *message* on the non-blocking *sock*. A trainer that is gone is not an error."""
    rest = memoryview(encode_frame(message))
    while rest:
        try:
            rest = rest[sock.send(rest) :]
        except BlockingIOError:
            await anyio.wait_writable(sock)
        except OSError:
            return
