"""`Store.create` and `FileSink`."""

from __future__ import annotations

import pytest

from asyncckpt.stores.contract import Store
from asyncckpt.testing.raw import RawAccess
from asyncckpt.testing.suite.checks import MiB, difference, pattern


class SinkTests:
    """Part of `StoreSuite`."""

    @pytest.mark.parametrize("size", [0, 17, 4 * MiB, 4 * MiB + 1, 8 * MiB - 1])
    @pytest.mark.parametrize("hint", [0, 64 * MiB])
    def test_a_sink_stores_what_is_written_in_any_pieces(
        self, store: Store, raw: RawAccess, size: int, hint: int
    ) -> None:
        data = pattern(size)
        with store.create("deep/er/file", hint) as sink:
            for start in range(0, size, 1_234_567):
                sink.write(memoryview(data)[start : start + 1_234_567])
        assert difference(raw.read("deep/er/file"), data) is None

    def test_a_sink_takes_more_than_it_was_told_to_expect(self, store: Store, raw: RawAccess) -> None:
        with store.create("file", 10) as sink:
            sink.write(pattern(5 * MiB))
        assert difference(raw.read("file"), pattern(5 * MiB)) is None

    def test_a_sink_takes_any_contiguous_buffer(self, store: Store, raw: RawAccess) -> None:
        with store.create("file", 2 * MiB) as sink:
            sink.write(memoryview(bytearray(64)).cast("I", (4, 4)))
            sink.write(b"")
            sink.write(bytearray(b"tail"))
        assert raw.read("file") == bytes(64) + b"tail"

    @pytest.mark.parametrize("hint", [0, 2 * MiB])
    def test_the_buffer_may_be_reused_after_write(self, store: Store, raw: RawAccess, hint: int) -> None:
        block = bytearray(b"a" * 100)
        with store.create("file", hint) as sink:
            sink.write(block)
            block[:] = b"b" * 100
            sink.write(block)
        assert raw.read("file") == b"a" * 100 + b"b" * 100

    def test_a_closed_file_can_be_read_at_once(self, store: Store) -> None:
        with store.create("a/file") as sink:
            sink.write(b"data")
        assert store.read("a/file") == b"data"

    def test_entering_a_sink_gives_the_sink(self, store: Store) -> None:
        sink = store.create("file")
        with sink as entered:
            assert entered is sink

    def test_several_files_can_be_written_at_a_time(self, store: Store, raw: RawAccess) -> None:
        sinks = [store.create(f"file-{number}", 2 * MiB) for number in range(20)]
        for number, sink in enumerate(sinks):
            sink.write(bytes([number]) * 1000)
        for sink in reversed(sinks):
            sink.close()
        assert [raw.read(f"file-{number}") for number in range(20)] == [bytes([n]) * 1000 for n in range(20)]

    def test_abort_removes_the_file_and_is_final(self, store: Store, raw: RawAccess) -> None:
        sink = store.create("file", 2 * MiB)
        sink.write(b"half")
        sink.abort()
        sink.abort()
        sink.close()
        assert raw.names("") == []

    def test_an_aborted_file_can_be_written_again(self, store: Store, raw: RawAccess) -> None:
        store.create("a/file").abort()
        store.put("a/file", b"whole")
        assert raw.read("a/file") == b"whole"

    def test_an_exception_in_the_block_passes_and_aborts(self, store: Store) -> None:
        def fail_midway() -> None:
            with store.create("file") as sink:
                sink.write(b"half")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail_midway()
        assert store.entries("") == []

    def test_close_twice_is_fine_and_abort_after_close_keeps_the_file(self, store: Store, raw: RawAccess) -> None:
        sink = store.create("file")
        sink.write(b"whole")
        sink.close()
        sink.close()
        sink.abort()
        assert raw.read("file") == b"whole"
