"""Barriers, durable writes and directories, as far as they can be seen without pulling the plug."""

from __future__ import annotations

from asyncckpt.stores.contract import Store
from asyncckpt.testing.raw import RawAccess
from asyncckpt.testing.suite.checks import MiB, difference, pattern


class DurabilityTests:
    """Part of `StoreSuite`."""

    def test_a_barrier_creates_its_directory_and_waits(self, store: Store, raw: RawAccess) -> None:
        barrier = store.open_barrier("area/part")
        store.put("area/part/state/x/c.0", pattern(2 * MiB))
        store.put("area/part/state/x/zarr.json", b"{}")
        barrier.wait()
        barrier.close()
        barrier.close()
        assert difference(raw.read("area/part/state/x/c.0"), pattern(2 * MiB)) is None
        assert raw.read("area/part/state/x/zarr.json") == b"{}"

    def test_a_barrier_may_wait_for_nothing(self, store: Store) -> None:
        barrier = store.open_barrier("area/part")
        store.sync_directory("area/part")
        barrier.wait()
        barrier.close()
        assert store.entries("area/part") == []

    def test_a_barrier_waits_for_files_of_sinks(self, store: Store, raw: RawAccess) -> None:
        barrier = store.open_barrier("area")
        for name, hint in (("small", 0), ("large", 3 * MiB)):
            with store.create(f"area/{name}", hint) as sink:
                sink.write(pattern(hint + 100))
        barrier.wait()
        barrier.close()
        assert difference(raw.read("area/small"), pattern(100)) is None
        assert difference(raw.read("area/large"), pattern(3 * MiB + 100)) is None

    def test_a_barrier_can_be_opened_where_something_is(self, store: Store, raw: RawAccess) -> None:
        store.put("area/before", b"1")
        barrier = store.open_barrier("area")
        store.put("area/after", b"2")
        barrier.wait()
        barrier.close()
        assert (raw.read("area/before"), raw.read("area/after")) == (b"1", b"2")

    def test_a_barrier_may_be_given_up(self, store: Store) -> None:
        barrier = store.open_barrier("area")
        barrier.close()
        barrier.close()

    def test_barriers_do_not_disturb_each_other(self, store: Store, raw: RawAccess) -> None:
        first, second = store.open_barrier("one"), store.open_barrier("two")
        store.put("one/x", b"1")
        first.wait()
        first.close()
        store.put("two/x", b"2")
        second.wait()
        second.close()
        assert (raw.read("one/x"), raw.read("two/x")) == (b"1", b"2")

    def test_the_root_itself_can_be_watched(self, store: Store, raw: RawAccess) -> None:
        barrier = store.open_barrier("")
        store.put("key", b"1")
        barrier.wait()
        barrier.close()
        assert raw.read("key") == b"1"

    def test_durable_put_works_at_any_size(self, store: Store, raw: RawAccess) -> None:
        for size in (0, 1, 3 * MiB):
            store.put(f"a/{size}", pattern(size), durable=True)
            assert difference(raw.read(f"a/{size}"), pattern(size)) is None

    def test_directories_can_be_synced_at_any_depth(self, store: Store) -> None:
        store.put("a/b/c", b"1", durable=True)
        for prefix in ("a/b", "a", ""):
            store.sync_directory(prefix)
