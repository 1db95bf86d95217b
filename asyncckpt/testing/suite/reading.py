"""`Store.read` and `Store.read_into`."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from asyncckpt.stores.contract import Store
from asyncckpt.testing.raw import RawAccess
from asyncckpt.testing.suite.checks import MiB, difference, pattern, raw_files, refused


class ReadingTests:
    """Part of `StoreSuite`."""

    def test_read_returns_ranges_and_stops_at_the_end(self, store: Store) -> None:
        store.put("key", b"0123456789")
        assert store.read("key") == b"0123456789"
        assert store.read("key", 3) == b"3456789"
        assert store.read("key", 3, 4) == b"3456"
        assert store.read("key", 3, 0) == b""
        assert store.read("key", 8, 100) == b"89"
        assert store.read("key", 10) == b""
        assert store.read("key", 100) == b""
        assert store.read("key", 100, 5) == b""

    def test_an_empty_file_is_no_missing_file(self, store: Store) -> None:
        store.put("key", b"")
        assert store.read("key") == b""
        assert store.read("key", 0, 10) == b""
        assert store.read_into("key", memoryview(bytearray(3))) == 0

    def test_what_somebody_else_wrote_is_read(self, store: Store, raw: RawAccess) -> None:
        raw.write("a/key", b"theirs")
        assert store.read("a/key") == b"theirs"

    @pytest.mark.parametrize("cache", [True, False])
    def test_read_into_fills_the_view_and_says_how_much(self, store: Store, cache: bool) -> None:
        store.put("key", b"0123456789")
        out = bytearray(b"." * 6)
        assert store.read_into("key", memoryview(out), 2, cache=cache) == 6
        assert out == b"234567"
        assert store.read_into("key", memoryview(out), 7, cache=cache) == 3
        assert out == b"789567"
        assert store.read_into("key", memoryview(out), 50, cache=cache) == 0
        assert out == b"789567"

    def test_read_into_touches_nothing_outside_of_the_view(self, store: Store) -> None:
        store.put("key", b"0123456789")
        out = bytearray(b"." * 6)
        assert store.read_into("key", memoryview(out)[2:4], 5) == 2
        assert out == b"..56.."

    def test_read_into_takes_any_contiguous_view(self, store: Store) -> None:
        store.put("key", bytes(range(64)))
        out = bytearray(64)
        assert store.read_into("key", memoryview(out).cast("I", (4, 4))) == 64
        assert out == bytes(range(64))

    @pytest.mark.parametrize("offset", [0, 1, 4 * MiB - 1, 4 * MiB, 5 * MiB + 3])
    @pytest.mark.parametrize("cache", [True, False])
    def test_large_files_are_read_from_any_offset(self, store: Store, offset: int, cache: bool) -> None:
        data = pattern(9 * MiB + 17)
        store.put("key", data)
        out = bytearray(3 * MiB)
        assert store.read_into("key", memoryview(out), offset, cache=cache) == 3 * MiB
        assert difference(out, data[offset : offset + 3 * MiB]) is None
        assert difference(store.read("key", offset, 3 * MiB), data[offset : offset + 3 * MiB]) is None

    def test_a_missing_key_is_enoent(self, store: Store) -> None:
        store.put("here/file", b"1")
        for key in ("no/such", "here/no", "no"):
            with refused(errno.ENOENT, key=key):
                store.read(key)
            with refused(errno.ENOENT, key=key):
                store.read_into(key, memoryview(bytearray(1)))

    def test_a_directory_is_no_file(self, store: Store) -> None:
        store.put("a/b/c", b"1")
        for key in ("a", "a/b", ""):
            with refused(key=key):
                store.read(key)
            with refused(key=key):
                store.read_into(key, memoryview(bytearray(1)))

    def test_special_files_are_never_read(self, store: Store, raw: RawAccess, tmp_path: Path) -> None:
        files = raw_files(raw)
        secret = tmp_path / "secret"
        secret.write_bytes(b"secret")
        store.put("file", b"data")
        files.symlink("link", str(secret))
        files.symlink("dangling", str(tmp_path / "nothing"))
        files.fifo("fifo")
        for key in ("link", "dangling", "fifo"):
            with refused(key=key):
                store.read(key)
            with refused(key=key):
                store.read_into(key, memoryview(bytearray(1)))

    def test_a_link_inside_the_store_is_not_followed_either(self, store: Store, raw: RawAccess) -> None:
        files = raw_files(raw)
        store.put("file", b"data")
        files.symlink("link", store.location("file"))
        with refused(key="link"):
            store.read("link")

    def test_sockets_are_never_read(self, store: Store, raw: RawAccess) -> None:
        files = raw_files(raw)
        try:
            files.socket("socket")
        except PermissionError as error:
            pytest.skip(f"no socket can be made here: {error}")
        with refused(key="socket"):
            store.read("socket")
