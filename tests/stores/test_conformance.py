"""What every store promises (`asyncckpt.stores.contract`), checked through raw access to the directory."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asyncckpt.errors import InvalidOptionError, StorageError
from asyncckpt.stores import Entry, LocalStore

MiB = 2**20


@pytest.fixture(params=["syncfs", "each", "buffered"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore:
    root = tmp_path / "root"
    root.mkdir()
    if request.param == "buffered":
        return LocalStore(root, direct=False)
    return LocalStore(root, flush=request.param)


def raw(store: LocalStore, key: str) -> bytes:
    return (Path(store.root) / key).read_bytes()


def pattern(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


@pytest.mark.parametrize("size", [0, 1, 511, 4096, MiB - 1, MiB, 4 * MiB, 4 * MiB + 1, 9 * MiB + 4095])
def test_put_stores_exactly_the_bytes(store: LocalStore, size: int) -> None:
    store.put("a/b/c", pattern(size))
    assert raw(store, "a/b/c") == pattern(size)


@pytest.mark.parametrize("size", [0, 17, 4 * MiB, 4 * MiB + 1, 8 * MiB - 1])
@pytest.mark.parametrize("hint", [0, 64 * MiB])
def test_a_sink_stores_what_is_written_in_any_pieces(store: LocalStore, size: int, hint: int) -> None:
    data = pattern(size)
    with store.create("deep/er/file", hint) as sink:
        for start in range(0, size, 1_234_567):
            sink.write(memoryview(data)[start : start + 1_234_567])
    assert raw(store, "deep/er/file") == data


def test_a_sink_takes_any_contiguous_buffer(store: LocalStore) -> None:
    with store.create("file", 2 * MiB) as sink:
        sink.write(memoryview(bytearray(64)).cast("I", (4, 4)))
        sink.write(b"")
        sink.write(bytearray(b"tail"))
    assert raw(store, "file") == bytes(64) + b"tail"


def test_put_takes_any_contiguous_buffer(store: LocalStore) -> None:
    store.put("shaped", memoryview(bytes(range(64))).cast("I", (4, 4)))
    store.put("empty", memoryview(b"").cast("B"))
    assert raw(store, "shaped") == bytes(range(64))
    assert raw(store, "empty") == b""


def test_the_buffer_may_be_reused_after_write(store: LocalStore) -> None:
    block = bytearray(b"a" * 100)
    with store.create("file", 2 * MiB) as sink:
        sink.write(block)
        block[:] = b"b" * 100
        sink.write(block)
    assert raw(store, "file") == b"a" * 100 + b"b" * 100


@pytest.mark.parametrize("size", [3, 2 * MiB])
def test_a_key_is_written_once(store: LocalStore, size: int) -> None:
    store.put("key", b"first")
    with pytest.raises(StorageError) as put:
        store.put("key", pattern(size))
    with pytest.raises(StorageError) as create:
        store.create("key", size)
    assert (put.value.errno, create.value.errno) == (errno.EEXIST, errno.EEXIST)
    assert put.value.fields["key"] == "key"
    assert raw(store, "key") == b"first"


def test_of_concurrent_creators_one_wins(store: LocalStore) -> None:
    barrier = threading.Barrier(4)

    def attempt(number: int) -> int | None:
        barrier.wait()
        try:
            store.put("new/key", str(number).encode())
        except StorageError as error:
            return error.errno
        return None

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(attempt, range(4)))
    assert raw(store, "new/key") == str(outcomes.index(None)).encode()
    assert outcomes.count(errno.EEXIST) == 3


def test_abort_removes_the_file_and_is_final(store: LocalStore) -> None:
    sink = store.create("file", 2 * MiB)
    sink.write(b"half")
    sink.abort()
    sink.abort()
    sink.close()
    assert not os.path.exists(os.path.join(store.root, "file"))


def test_an_exception_in_the_block_aborts(store: LocalStore) -> None:
    def fail_midway() -> None:
        with store.create("file") as sink:
            sink.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert store.entries("") == []


def test_close_twice_is_fine_and_abort_after_close_keeps_the_file(store: LocalStore) -> None:
    sink = store.create("file")
    sink.write(b"whole")
    sink.close()
    sink.close()
    sink.abort()
    assert raw(store, "file") == b"whole"


def test_read_returns_ranges_and_stops_at_the_end(store: LocalStore) -> None:
    store.put("key", b"0123456789")
    assert store.read("key") == b"0123456789"
    assert store.read("key", 3, 4) == b"3456"
    assert store.read("key", 8, 100) == b"89"
    assert store.read("key", 100) == b""


@pytest.mark.parametrize("cache", [True, False])
def test_read_into_fills_the_view_and_says_how_much(store: LocalStore, cache: bool) -> None:
    store.put("key", b"0123456789")
    out = bytearray(b"." * 6)
    assert store.read_into("key", memoryview(out), 2, cache=cache) == 6
    assert out == b"234567"
    assert store.read_into("key", memoryview(out), 7, cache=cache) == 3
    assert out == b"789567"


def test_a_missing_key_is_enoent(store: LocalStore) -> None:
    with pytest.raises(StorageError) as read:
        store.read("no/such")
    with pytest.raises(StorageError) as read_into:
        store.read_into("no/such", memoryview(bytearray(1)))
    assert (read.value.errno, read_into.value.errno) == (errno.ENOENT, errno.ENOENT)


def test_entries_lists_one_level_sorted(store: LocalStore) -> None:
    store.put("d/b", b"22")
    store.put("d/a", b"1")
    store.put("d/c/x", b"")
    assert store.entries("d") == [Entry("a", False, 1), Entry("b", False, 2), Entry("c", True)]
    assert store.entries("") == [Entry("d", True)]


def test_entries_of_nothing_is_empty(store: LocalStore) -> None:
    assert store.entries("nowhere/at/all") == []


def test_special_files_are_listed_as_such_and_never_read(store: LocalStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    os.mkfifo(f"{store.root}/fifo")
    os.symlink(secret, f"{store.root}/link")
    assert [(entry.name, entry.is_special, entry.is_directory) for entry in store.entries("")] == [
        ("fifo", True, False),
        ("link", True, False),
    ]
    for key in ("fifo", "link", ""):
        with pytest.raises(StorageError):
            store.read(key)


def test_delete_removes_files_and_trees_and_is_idempotent(store: LocalStore) -> None:
    store.put("tree/a/b", b"1")
    store.put("tree/c", b"2")
    store.put("file", b"3")
    for _ in range(2):
        store.delete("tree")
        store.delete("file")
    assert store.entries("") == []


def test_delete_never_follows_links(store: LocalStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"1")
    store.put("tree/file", b"1")
    os.symlink(outside, f"{store.root}/tree/link")
    os.symlink(outside, f"{store.root}/link")
    store.delete("tree")
    store.delete("link")
    assert (outside / "precious").exists()
    assert store.entries("") == []


def test_the_root_itself_cannot_be_deleted(store: LocalStore) -> None:
    with pytest.raises(InvalidOptionError, match="refusing"):
        store.delete("")


@pytest.mark.parametrize("key", ["/etc/passwd", "..", "a/../b", "a//b", "./a", "a/", "a/.", "nul\0"])
def test_malformed_keys_are_refused_everywhere(store: LocalStore, key: str) -> None:
    for call in (
        lambda: store.put(key, b""),
        lambda: store.create(key),
        lambda: store.read(key),
        lambda: store.entries(key),
        lambda: store.delete(key),
        lambda: store.rename("a", key),
        lambda: store.link("a", key),
        lambda: store.open_barrier(key),
        lambda: store.sync_directory(key),
        lambda: store.location(key),
    ):
        with pytest.raises(InvalidOptionError, match="is not a key"):
            call()


def test_dots_inside_a_name_are_fine(store: LocalStore) -> None:
    store.put("a..b/...c/.d", b"1")
    assert raw(store, "a..b/...c/.d") == b"1"


def test_rename_moves_a_directory(store: LocalStore) -> None:
    store.put("from/x/y", b"1")
    store.rename("from", "to")
    assert raw(store, "to/x/y") == b"1"
    assert store.entries("from") == []


def test_rename_never_replaces(store: LocalStore) -> None:
    store.put("from/x", b"new")
    store.put("to/x", b"old")
    with pytest.raises(StorageError) as error:
        store.rename("from", "to")
    assert error.value.errno in (errno.EEXIST, errno.ENOTEMPTY)
    assert (raw(store, "to/x"), raw(store, "from/x")) == (b"old", b"new")


def test_link_shares_the_file_and_survives_the_first_name(store: LocalStore) -> None:
    store.put("one/x", b"1")
    store.link("one/x", "two/deep/x")
    assert os.path.samefile(f"{store.root}/one/x", f"{store.root}/two/deep/x")
    store.delete("one")
    assert raw(store, "two/deep/x") == b"1"


def test_link_never_replaces(store: LocalStore) -> None:
    store.put("one", b"1")
    store.put("two", b"2")
    with pytest.raises(StorageError) as error:
        store.link("one", "two")
    assert error.value.errno == errno.EEXIST


def test_a_barrier_creates_its_directory_and_waits(store: LocalStore) -> None:
    barrier = store.open_barrier("area/part")
    store.put("area/part/state/x/c.0", pattern(2 * MiB))
    store.put("area/part/state/x/zarr.json", b"{}")
    barrier.wait()
    barrier.close()
    barrier.close()
    assert raw(store, "area/part/state/x/c.0") == pattern(2 * MiB)


def test_durable_put_and_directory_sync_work_at_any_size(store: LocalStore) -> None:
    store.put("a/small", b"1", durable=True)
    store.put("a/large", pattern(3 * MiB), durable=True)
    store.sync_directory("a")
    store.sync_directory("")
    assert raw(store, "a/large") == pattern(3 * MiB)


def test_the_root_itself_can_be_watched(store: LocalStore) -> None:
    barrier = store.open_barrier("")
    store.put("key", b"1")
    barrier.wait()
    barrier.close()


def test_syncing_a_missing_directory_fails(store: LocalStore) -> None:
    with pytest.raises(StorageError) as error:
        store.sync_directory("missing")
    assert error.value.errno == errno.ENOENT


def test_threads_write_many_files_at_once(store: LocalStore) -> None:
    def write(number: int) -> None:
        store.put(f"state/{number % 7}/{number}/zarr.json", str(number).encode())
        with store.create(f"state/{number % 7}/{number}/c.0", 2 * MiB) as sink:
            sink.write(pattern(MiB + number))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(40)))
    for number in range(40):
        assert raw(store, f"state/{number % 7}/{number}/zarr.json") == str(number).encode()
        assert raw(store, f"state/{number % 7}/{number}/c.0") == pattern(MiB + number)


def test_location_and_url_name_the_place(store: LocalStore) -> None:
    assert store.location("") == store.root
    assert store.location("a/b") == f"{store.root}/a/b"
    assert store.url == f"file://{store.root}"
