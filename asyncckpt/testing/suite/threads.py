"""Every method may be called from any thread."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

from asyncckpt.errors import StorageError
from asyncckpt.stores.contract import Entry, Store
from asyncckpt.testing.raw import RawAccess
from asyncckpt.testing.suite.checks import MiB, difference, pattern, require


class ThreadTests:
    """Part of `StoreSuite`."""

    def test_of_concurrent_creators_one_wins(self, store: Store, raw: RawAccess) -> None:
        require(store, "atomic_create")
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
        assert raw.read("new/key") == str(outcomes.index(None)).encode()
        assert outcomes.count(errno.EEXIST) == 3

    def test_threads_write_many_files_at_once(self, store: Store, raw: RawAccess) -> None:
        def write(number: int) -> None:
            store.put(f"state/{number % 7}/{number}/zarr.json", str(number).encode())
            with store.create(f"state/{number % 7}/{number}/c.0", 2 * MiB) as sink:
                sink.write(pattern(MiB + number))

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(write, range(40)))
        for number in range(40):
            assert raw.read(f"state/{number % 7}/{number}/zarr.json") == str(number).encode()
            assert difference(raw.read(f"state/{number % 7}/{number}/c.0"), pattern(MiB + number)) is None

    def test_threads_read_one_file_at_once(self, store: Store) -> None:
        data = pattern(3 * MiB)
        store.put("key", data)

        def read(number: int) -> bool:
            out = bytearray(MiB)
            offset = number * 100_003
            count = store.read_into("key", memoryview(out), offset, cache=number % 2 == 0)
            return count == MiB and out == data[offset : offset + MiB] == store.read("key", offset, MiB)

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(read, range(20)))

    def test_a_sink_may_move_from_thread_to_thread(self, store: Store, raw: RawAccess) -> None:
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            sink = one.submit(store.create, "file", 2 * MiB).result()
            for piece, pool in ((b"first ", other), (b"second ", one), (b"third", other)):
                pool.submit(sink.write, piece).result()
            one.submit(sink.close).result()
        assert raw.read("file") == b"first second third"

    def test_threads_delete_one_tree_at_once(self, store: Store) -> None:
        for number in range(30):
            store.put(f"tree/{number % 3}/{number}", b"1")
        store.put("other", b"1")
        barrier = threading.Barrier(4)

        def delete(_: int) -> None:
            barrier.wait()
            store.delete("tree")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(delete, range(4)))
        assert store.entries("") == [Entry("other", False, 1)]

    def test_a_tree_is_listed_while_it_is_deleted(self, store: Store) -> None:
        names = [f"file-{number:02}" for number in range(40)]
        for name in names:
            store.put(f"tree/{name}", b"1")
        with ThreadPoolExecutor(1) as pool:
            deleting = pool.submit(store.delete, "tree")
            while not deleting.done():
                found = [entry.name for entry in store.entries("tree")]
                assert found == sorted(found)
                assert set(found) <= set(names)
            deleting.result()
        assert store.entries("tree") == []
