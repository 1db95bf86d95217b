"""How the local store copes with file systems that refuse, shorten or fail writes."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncckpt.errors import CheckpointNotFoundError, InvalidOptionError, StorageError
from asyncckpt.stores import LocalStore, buffers, open_store
from asyncckpt.stores.buffers import BUFFER_BYTES, BufferPool
from asyncckpt.stores.durability import choose_flush_mode
from asyncckpt.stores.sinks import O_DIRECT

MiB = 2**20
DATA = bytes(range(256)) * (9 * MiB // 256) + b"tail"

Write = Callable[[int, memoryview, int], int]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def write_in_pieces(store: LocalStore, key: str = "file") -> None:
    with store.create(key, len(DATA)) as sink:
        for start in range(0, len(DATA), 3_000_001):
            sink.write(memoryview(DATA)[start : start + 3_000_001])


def replace_pwrite(monkeypatch: pytest.MonkeyPatch, fake: Callable[[Write, int, memoryview, int], int]) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: fake(real, fd, view, offset))


def is_direct(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT)


@pytest.fixture
def direct_works(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | O_DIRECT))
    except OSError:
        pytest.skip("the file system of the temporary directory refuses O_DIRECT")
    os.unlink(tmp_path / "probe")


@pytest.mark.usefixtures("direct_works")
def test_large_files_are_written_directly_and_only_the_tail_is_not(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct: list[tuple[bool, int]] = []

    def spy(real: Write, fd: int, view: memoryview, offset: int) -> int:
        direct.append((is_direct(fd), len(view)))
        return real(fd, view, offset)

    replace_pwrite(monkeypatch, spy)
    write_in_pieces(store)
    assert direct == [(True, 4 * MiB), (True, 4 * MiB), (True, MiB), (False, 4)]
    assert (tmp_path / "file").read_bytes() == DATA


def test_o_direct_refused_at_open_falls_back(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **options: int) -> int:
        if O_DIRECT and flags & O_DIRECT:
            os.close(real(path, flags & ~O_DIRECT, *rest, **options))  # Linux may create the file before it refuses
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    write_in_pieces(store)
    assert (tmp_path / "file").read_bytes() == DATA
    assert "free=16" in repr(store._pool)


@pytest.mark.usefixtures("direct_works")
@pytest.mark.parametrize("refused_write", [0, 1, 2])
def test_o_direct_refused_at_write_goes_on_at_the_same_offset(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_write: int
) -> None:
    direct_writes = 0

    def refuse(real: Write, fd: int, view: memoryview, offset: int) -> int:
        nonlocal direct_writes
        if is_direct(fd):
            direct_writes += 1
            if direct_writes > refused_write:
                raise OSError(errno.EINVAL, "not aligned enough")
        return real(fd, view, offset)

    replace_pwrite(monkeypatch, refuse)
    write_in_pieces(store)
    assert direct_writes == refused_write + 1
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("piece", [1_000_003, 8192])
def test_short_writes_are_continued(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    replace_pwrite(monkeypatch, lambda real, fd, view, offset: real(fd, view[:piece], offset))
    write_in_pieces(store)
    assert (tmp_path / "file").read_bytes() == DATA


def test_short_writes_of_small_files_are_continued(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, view: real(fd, view[:3]))
    store.put("small", b"0123456789")
    assert (tmp_path / "small").read_bytes() == b"0123456789"


def test_a_write_that_accepts_nothing_fails_instead_of_looping(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_pwrite(monkeypatch, lambda real, fd, view, offset: 0)
    monkeypatch.setattr(os, "write", lambda fd, view: 0)
    with pytest.raises(StorageError, match="accepted no byte"):
        write_in_pieces(store)
    with pytest.raises(StorageError, match="accepted no byte"):
        store.put("small", b"1")


@pytest.mark.parametrize("hint", [0, len(DATA)])
def test_a_failed_write_is_final_and_leaves_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, hint: int
) -> None:
    sink = store.create("file", hint)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, view, offset: _raise(errno.ENOSPC))
        with pytest.raises(StorageError) as error:
            sink.write(DATA)
    assert error.value.errno == errno.ENOSPC
    assert error.value.fields["key"] == "file"
    with pytest.raises(StorageError) as again:
        sink.write(b"more")
    assert again.value is error.value
    with pytest.raises(StorageError) as closing:
        sink.close()
    assert closing.value is error.value
    assert store.entries("") == []
    assert "free=16" in repr(store._pool)


def test_an_error_of_close_is_reported(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.close

    def fail(fd: int) -> None:
        real(fd)
        _raise(errno.EDQUOT)

    for key, size in (("small", 1), ("large", 2 * MiB)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "close", fail)
            with pytest.raises(StorageError) as error:
                store.put(key, bytes(size))
        assert error.value.errno == errno.EDQUOT


def test_in_mode_each_a_file_is_fsynced_before_it_is_closed_and_never_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fail(fd: int) -> None:
        calls.append("fsync")
        _raise(errno.EIO)

    store = LocalStore(tmp_path, flush="each")
    monkeypatch.setattr(os, "fsync", fail)
    for key, size in (("small", 1), ("large", 2 * MiB)):
        with pytest.raises(StorageError) as error:
            store.put(key, bytes(size))
        assert error.value.errno == errno.EIO
    assert calls == ["fsync", "fsync"]


def test_in_mode_syncfs_nothing_is_fsynced_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if choose_flush_mode(str(tmp_path)) != "syncfs":
        pytest.skip("syncfs is not used on this file system")
    store = LocalStore(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: _raise(errno.EIO))
    store.put("small", b"1")
    if O_DIRECT:
        store.put("large", bytes(2 * MiB))


def test_large_buffered_files_are_on_disk_before_they_leave_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: calls.append("drop"))
    store = LocalStore(tmp_path, direct=False)
    store.put("small", b"1")
    store.put("large", bytes(2 * MiB))
    assert calls[-2:] == ["fsync", "drop"]
    assert calls.count("drop") == 1


def test_the_pool_is_bounded_and_more_files_go_through_the_page_cache(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    sinks = [store.create(f"file-{number}", 2 * MiB) for number in range(20)]
    for number, sink in enumerate(sinks):
        sink.write(bytes([number]) * (MiB + number))
    assert [repr(sink).split(", ")[1] for sink in sinks] == ["direct"] * 16 + ["buffered"] * 4
    for sink in sinks:
        sink.close()
    for number in range(20):
        assert (tmp_path / f"file-{number}").read_bytes() == bytes([number]) * (MiB + number)
    assert "free=16" in repr(store._pool)


def test_pool_buffers_are_aligned_and_reused() -> None:
    pool = BufferPool(1)
    first = pool.acquire()
    assert first is not None
    assert len(first.view) == BUFFER_BYTES
    assert ctypes.addressof(ctypes.c_char.from_buffer(first.view)) % 4096 == 0
    assert pool.acquire() is None
    view = first.view
    first.release()
    second = pool.acquire()
    assert second is not None
    assert second.view is view


def test_a_forked_child_has_its_own_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = BufferPool(1)
    parents = pool.acquire()
    assert parents is not None
    monkeypatch.setattr(os, "getpid", lambda: -1)
    childs = pool.acquire()
    assert childs is not None
    assert childs.view is not parents.view
    parents.release()
    assert pool.acquire() is None


FORK = """
import mmap, os
from asyncckpt.stores.buffers import BufferPool

pool = BufferPool(2)
buffers = [pool.acquire(), pool.acquire()]
kept = buffers.pop()
kept.view[0] = 1
buffers.pop().release()
child = os.fork()
if child == 0:
    # It does not share the pages: else a write of the parent could go astray while they are copied.
    assert kept.view[0] == 0
    # Memory of its own, the first of which lie where the parent's mappings would if they were not inherited.
    own = [mmap.mmap(-1, 2**21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(64)]
    assert pool.acquire() is not None  # lets go of the buffer that the parent's pool held
    for mapping in own:
        mapping[:1] = b"x"
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, os.waitstatus_to_exitcode(status)
assert kept.view[0] == 1
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere buffers are shared memory")
def test_a_forked_child_keeps_its_memory_when_it_lets_go_of_the_buffers_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_old_kernel_gets_shared_memory_which_a_fork_does_not_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_MADV_WIPEONFORK", 9999)
    buffer = BufferPool(1).acquire()
    assert buffer is not None
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer.view))
    with open("/proc/self/maps") as file:
        permissions = next(
            fields[1]
            for fields in map(str.split, file)
            if int(fields[0].split("-")[0], 16) <= address < int(fields[0].split("-")[1], 16)
        )
    assert permissions == "rw-s"


def test_a_deleted_root_is_not_recreated(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    store = LocalStore(root, flush="each")
    root.rmdir()
    for call in (
        lambda: store.put("a/b", b""),
        lambda: store.create("c"),
        lambda: store.open_barrier("a/b"),
    ):
        with pytest.raises(StorageError) as error:
            call()
        assert error.value.errno == errno.ENOENT
    assert not root.exists()


def test_a_file_where_a_directory_should_be(store: LocalStore) -> None:
    store.put("file", b"1")
    with pytest.raises(StorageError) as put:
        store.put("file/below", b"2")
    with pytest.raises(StorageError) as listing:
        store.entries("file")
    assert (put.value.errno, listing.value.errno) == (errno.ENOTDIR, errno.ENOTDIR)


def test_a_directory_without_fsync_is_no_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: _raise(errno.EINVAL))
    store.sync_directory("")


def test_a_failed_directory_fsync_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: _raise(errno.EIO))
    with pytest.raises(StorageError, match="could not flush the checkpoint root"):
        store.sync_directory("")
    barrier = LocalStore(store.root, flush="each").open_barrier("part")
    with pytest.raises(StorageError, match="could not flush part to disk"):
        barrier.wait()


@pytest.mark.parametrize(
    ("release", "mode"), [("5.7.19-generic", "each"), ("4.18.0", "each"), ("5.8.0", "syncfs"), ("6.1-rc3", "syncfs")]
)
def test_syncfs_needs_a_kernel_that_reports_its_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, mode: str
) -> None:
    from asyncckpt.stores import durability

    monkeypatch.setattr(durability, "_file_system_magic", lambda path: 0xEF53)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", release, "", "x86_64")))
    assert choose_flush_mode(str(tmp_path)) == mode


def test_a_directory_that_somebody_else_deletes_meanwhile_does_not_end_a_deletion(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rmdir
    raced: list[str] = []

    def lose_the_race(path: str) -> None:
        real(path)
        if not raced:
            raced.append(path)
            real(path)

    for key in ("tree/a/x", "tree/b/x", "tree/c"):
        store.put(key, b"1")
    monkeypatch.setattr(os, "rmdir", lose_the_race)
    store.delete("tree")
    assert len(raced) == 1
    assert store.entries("") == []


def test_syncfs_is_not_used_where_its_meaning_is_unknown() -> None:
    assert choose_flush_mode("/proc") == "each"
    assert choose_flush_mode("/no/such/directory") == "each"


def test_open_store_takes_paths_and_file_urls(tmp_path: Path) -> None:
    root = tmp_path / "with space"
    root.mkdir()
    for name in (root, str(root), root.as_uri(), root.as_uri().replace("file://", "file://localhost")):
        store = open_store(name)
        assert store.root == str(root)
        assert open_store(store.url).root == str(root)


def test_open_store_is_not_moved_by_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root").mkdir()
    store = open_store("root")
    monkeypatch.chdir("/")
    store.put("key", b"1")
    assert (tmp_path / "root" / "key").exists()


@pytest.mark.parametrize("url", ["s3://bucket/run", "memory://", "file://elsewhere/run"])
def test_open_store_says_what_is_available(url: str) -> None:
    with pytest.raises(InvalidOptionError, match="file://"):
        open_store(url)


@pytest.mark.parametrize("name", ["missing", "file", "file/below", "with\0nul"])
def test_open_store_needs_an_existing_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint root"):
        open_store(tmp_path / name)


def test_open_store_does_not_take_a_broken_disk_for_an_absent_root(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError) as error:
        open_store(tmp_path / "loop")
    assert error.value.errno == errno.ELOOP


def _raise(code: int) -> int:
    raise OSError(code, os.strerror(code))
