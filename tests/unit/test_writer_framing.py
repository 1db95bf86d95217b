"""Frames survive any split of the byte stream."""

from __future__ import annotations

import os
import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import WriterError
from asyncckpt.writer import framing
from asyncckpt.writer.framing import BlockingChannel, FrameBuffer, encode_frame
from asyncckpt.writer.messages import Attach, Close, Drop, Progress, ToWriter

MESSAGES = [Drop(1), Close(), Drop(2**31), Attach(3, 4096, True)]


def new_buffer() -> FrameBuffer[ToWriter]:
    return FrameBuffer(msgspec.json.Decoder(ToWriter))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_messages_come_out_however_the_stream_is_cut(cuts: list[int]) -> None:
    stream = b"".join(encode_frame(message) for message in MESSAGES)
    frames = new_buffer()
    received = []
    for cut in cuts:
        received += frames.feed(stream[:cut])
        stream = stream[cut:]
    received += frames.feed(stream)
    assert received == MESSAGES


def test_absurd_length_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(WriterError, match="out of step"):
        list(new_buffer().feed(b"\xff\xff\xff\xff"))


def test_message_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_FRAME_BYTES", 4)
    with pytest.raises(WriterError, match="limit"):
        encode_frame(Close())


def test_descriptor_travels_with_its_frame() -> None:
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    channel = BlockingChannel(ours)
    channel.send(Attach(1, 10, False), read_end)
    frames = new_buffer()
    data, descriptors = framing._receive(theirs)
    assert list(frames.feed(data, descriptors)) == [Attach(1, 10, False)]
    os.write(write_end, b"x")
    assert os.read(frames.descriptors[0], 1) == b"x"
    for descriptor in (read_end, write_end, *frames.descriptors):
        os.close(descriptor)
    channel.close()
    theirs.close()


def test_receive_ends_quietly_when_the_peer_is_gone() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(encode_frame(Progress(1, 2)) + b"\x10\x00")
    theirs.close()
    channel = BlockingChannel(ours)
    assert list(channel.receive(60)) == [Progress(1, 2)]
    channel.close()


def test_shutdown_wakes_a_receiver() -> None:
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(ours)
    channel.shutdown()
    channel.shutdown()
    assert list(channel.receive(60)) == []
    channel.close()
    theirs.close()
