"""`Store.put`, and what holds for everything that is written."""

from __future__ import annotations

import errno

import pytest

from asyncckpt.stores.contract import Store
from asyncckpt.testing.raw import RawAccess
from asyncckpt.testing.suite.checks import MiB, difference, pattern, refused


class WritingTests:
    """Part of `StoreSuite`."""

    @pytest.mark.parametrize("size", [0, 1, 511, 4096, MiB - 1, MiB, 4 * MiB, 4 * MiB + 1, 9 * MiB + 4095])
    def test_put_stores_exactly_the_bytes(self, store: Store, raw: RawAccess, size: int) -> None:
        store.put("a/b/c", pattern(size))
        assert difference(raw.read("a/b/c"), pattern(size)) is None

    def test_put_takes_any_contiguous_buffer(self, store: Store, raw: RawAccess) -> None:
        store.put("shaped", memoryview(bytes(range(64))).cast("I", (4, 4)))
        store.put("empty", memoryview(b"").cast("B"))
        store.put("mutable", bytearray(b"bytes"))
        assert raw.read("shaped") == bytes(range(64))
        assert raw.read("empty") == b""
        assert raw.read("mutable") == b"bytes"

    def test_the_buffer_may_be_reused_after_put(self, store: Store, raw: RawAccess) -> None:
        for size in (100, 2 * MiB):
            block = bytearray(b"a" * size)
            store.put(f"key-{size}", block)
            block[:] = b"b" * size
            assert difference(raw.read(f"key-{size}"), b"a" * size) is None

    def test_put_can_be_read_at_once(self, store: Store) -> None:
        store.put("a/key", b"data")
        assert store.read("a/key") == b"data"

    def test_parents_appear_as_needed_beside_what_is_there(self, store: Store, raw: RawAccess) -> None:
        store.put("a/b/1", b"1")
        store.put("a/b/c/d/2", b"2")
        store.put("a/3", b"3")
        assert [raw.read(key) for key in ("a/b/1", "a/b/c/d/2", "a/3")] == [b"1", b"2", b"3"]

    @pytest.mark.parametrize("size", [3, 2 * MiB])
    def test_put_never_replaces_a_key(self, store: Store, raw: RawAccess, size: int) -> None:
        store.put("key", b"first")
        with refused(errno.EEXIST, key="key"):
            store.put("key", pattern(size))
        assert difference(raw.read("key"), b"first") is None

    @pytest.mark.parametrize("size", [3, 2 * MiB])
    def test_create_never_replaces_a_key(self, store: Store, raw: RawAccess, size: int) -> None:
        store.put("key", b"first")
        # An object store may notice no sooner than when the object is complete.
        with refused(errno.EEXIST, key="key"), store.create("key", size) as sink:
            sink.write(pattern(size))
        assert difference(raw.read("key"), b"first") is None

    def test_put_durable_never_replaces_a_key(self, store: Store, raw: RawAccess) -> None:
        store.put("key", b"first")
        with refused(errno.EEXIST, key="key"):
            store.put("key", b"second", durable=True)
        assert difference(raw.read("key"), b"first") is None

    def test_a_key_that_somebody_else_wrote_is_not_replaced(self, store: Store, raw: RawAccess) -> None:
        raw.write("a/key", b"theirs")
        with refused(errno.EEXIST, key="a/key"):
            store.put("a/key", b"ours")
        assert raw.read("a/key") == b"theirs"

    def test_a_deleted_key_can_be_written_again(self, store: Store, raw: RawAccess) -> None:
        store.put("a/key", b"first")
        store.delete("a")
        store.put("a/key", b"second")
        assert raw.read("a/key") == b"second"
