"""`FaultStore`: what it fails, when, what is left, and what it remembers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from asyncckpt.errors import InvalidOptionError, StorageError
from asyncckpt.stores import LocalStore, Store
from asyncckpt.testing import Call, Fault, FaultStore, Gate, RawDirectory, SimulatedCrash

MiB = 2**20
TIMEOUT_S = 60

# One call of each kind, on a store that holds "here", "tree/1" and "tree/2".
CALLS: dict[str, Callable[[Store], object]] = {
    "put": lambda store: store.put("key", b"data"),
    "create": lambda store: store.create("key"),
    "read": lambda store: store.read("here"),
    "read_into": lambda store: store.read_into("here", memoryview(bytearray(4))),
    "entries": lambda store: store.entries("tree"),
    "delete": lambda store: store.delete("tree"),
    "rename": lambda store: store.rename("tree", "moved"),
    "link": lambda store: store.link("here", "there"),
    "open_barrier": lambda store: store.open_barrier("area"),
    "sync_directory": lambda store: store.sync_directory("tree"),
}
CHANGES = {"put", "create", "delete", "rename", "link", "open_barrier"}


@pytest.fixture
def raw(tmp_path: Path) -> RawDirectory:
    raw = RawDirectory(tmp_path / "root")
    raw.write("here", b"here")
    raw.write("tree/1", b"1")
    raw.write("tree/2", b"2")
    return raw


@pytest.fixture
def inner(raw: RawDirectory) -> LocalStore:
    return LocalStore(raw.root)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def snapshot(raw: RawDirectory) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(raw.root)): path.read_bytes() if path.is_file() else None for path in raw.root.rglob("*")
    }


@pytest.mark.parametrize("name", CALLS)
def test_an_error_before_a_call_leaves_it_undone(inner: LocalStore, raw: RawDirectory, name: str) -> None:
    store = FaultStore(inner, [Fault(name, error=errno.ENOSPC)])
    before = snapshot(raw)
    with pytest.raises(StorageError, match="injected before") as error:
        CALLS[name](store)
    assert error.value.errno == errno.ENOSPC
    assert error.value.fields["key"] in ("key", "here", "tree", "area")
    assert snapshot(raw) == before
    assert [call.name for call in store.calls] == [name]
    CALLS[name](store)  # once is enough
    assert (snapshot(raw) != before) == (name in CHANGES)


@pytest.mark.parametrize("name", CALLS)
def test_an_error_after_a_call_is_a_lost_answer(
    inner: LocalStore, raw: RawDirectory, tmp_path: Path, name: str
) -> None:
    descriptors = num_descriptors()
    store = FaultStore(inner, [Fault(name, error=errno.EIO, moment="after")])
    before = snapshot(raw)
    with pytest.raises(StorageError, match="injected after") as error:
        CALLS[name](store)
    assert error.value.errno == errno.EIO
    assert (snapshot(raw) != before) == (name in CHANGES)
    assert num_descriptors() == descriptors


def test_what_is_half_done(inner: LocalStore, raw: RawDirectory) -> None:
    for key in ("step/attributes.json", "step/zarr.json", "step/state/w/c.0", "step/state/w/c.1"):
        raw.write(key, b"1")
    halfway: dict[str, Any] = {"error": errno.EIO, "moment": "halfway"}
    store = FaultStore(inner, [Fault(call, **halfway) for call in ("put", "write", "delete")])
    with pytest.raises(StorageError):
        store.put("key", b"12345")
    assert raw.read("key") == b"12"
    with pytest.raises(StorageError), store.create("file") as sink:
        sink.write(b"12345678")
    with pytest.raises(StorageError):
        store.delete("step")
    # The files next to the prefix go last: the header of a step survives half a deletion of the step.
    assert sorted(raw.names("step")) == ["attributes.json", "state", "zarr.json"]
    assert raw.names("step/state/w") == []


def test_half_a_write_is_in_the_file(inner: LocalStore, raw: RawDirectory) -> None:
    store = FaultStore(inner, [Fault("write", nth=2, crash=True, moment="halfway")])
    sink = store.create("file")
    sink.write(b"first ")
    with pytest.raises(SimulatedCrash):
        sink.write(memoryview(bytes(16)).cast("I", (2, 2)))
    assert raw.read("file") == b"first " + bytes(8)
    store.release()


@pytest.mark.parametrize("name", ["read", "rename", "link", "open_barrier", "sync_directory", "entries"])
def test_half_of_an_indivisible_call_is_nothing(inner: LocalStore, raw: RawDirectory, name: str) -> None:
    before = snapshot(raw)
    with pytest.raises(StorageError):
        CALLS[name](FaultStore(inner, [Fault(name, error=errno.EIO, moment="halfway")]))
    assert snapshot(raw) == before


def test_half_a_deletion_of_a_file_is_nothing(inner: LocalStore, raw: RawDirectory) -> None:
    store = FaultStore(inner, [Fault("delete", error=errno.EIO, moment="halfway", persistent=True)])
    for key in ("tree/1", "here", "nothing"):
        with pytest.raises(StorageError):
            store.delete(key)
    assert (raw.read("tree/1"), raw.read("here")) == (b"1", b"here")


def test_calls_are_chosen_by_name_key_and_number(inner: LocalStore) -> None:
    store = FaultStore(inner, [Fault("put", "*zarr.json", nth=2, error=errno.EIO)])
    store.put("a/zarr.json", b"")
    store.put("a/c.0", b"")
    store.sync_directory("a")
    with pytest.raises(StorageError) as error:
        store.put("deep/er/zarr.json", b"")
    assert error.value.fields["key"] == "deep/er/zarr.json"
    store.put("deep/er/zarr.json", b"")
    assert store.calls == [
        Call("put", "a/zarr.json"),
        Call("put", "a/c.0"),
        Call("sync_directory", "a"),
        Call("put", "deep/er/zarr.json"),
        Call("put", "deep/er/zarr.json"),
    ]


def test_both_keys_of_a_rename_count(inner: LocalStore) -> None:
    store = FaultStore(
        inner, [Fault("rename", "moved", error=errno.EIO), Fault("rename", "tr*", nth=2, error=errno.EACCES)]
    )
    for code in (errno.EIO, errno.EACCES):
        with pytest.raises(StorageError) as error:
            store.rename("tree", "moved")
        assert error.value.errno == code
    store.rename("tree", "moved")
    assert store.calls == [Call("rename", "tree", "moved")] * 3
    assert str(store.calls[0]) == "rename('tree', 'moved')"


def test_a_persistent_fault_stays(inner: LocalStore) -> None:
    store = FaultStore(inner, [Fault(nth=2, error=errno.EROFS, persistent=True)])
    store.put("one", b"")
    for _ in range(2):
        with pytest.raises(StorageError):
            store.put("two", b"")
    with pytest.raises(StorageError):
        store.read("one")


def test_the_first_of_several_faults_is_met_and_all_count(inner: LocalStore) -> None:
    store = FaultStore(
        inner, [Fault("put", error=errno.EIO), Fault(error=errno.EACCES), Fault(nth=2, error=errno.EROFS)]
    )
    codes = []
    for key in ("one", "two"):
        with pytest.raises(StorageError) as error:
            store.put(key, b"")
        codes.append(error.value.errno)
    assert codes == [errno.EIO, errno.EROFS]
    store.put("three", b"")


def test_an_exception_is_raised_as_it_is(inner: LocalStore) -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        FaultStore(inner, [Fault(error=error)]).entries("")
    assert caught.value is error


def test_faults_can_be_added_later(inner: LocalStore) -> None:
    store = FaultStore(inner)
    store.put("key", b"")
    store.inject(Fault("read", error=errno.EIO))
    with pytest.raises(StorageError):
        store.read("key")
    assert store.read("key") == b""


def test_sinks_and_barriers_are_recorded_and_fail(inner: LocalStore) -> None:
    store = FaultStore(inner)
    barrier = store.open_barrier("area")
    with store.create("area/x") as sink:
        sink.write(b"1")
    store.create("area/y").abort()
    barrier.wait()
    barrier.close()
    assert [str(call) for call in store.calls] == [
        "open_barrier('area')",
        "create('area/x')",
        "write('area/x')",
        "close('area/x')",
        "create('area/y')",
        "abort('area/y')",
        "wait('area')",
        "close_barrier('area')",
    ]
    store.inject(Fault("wait", error=errno.EIO))
    with pytest.raises(StorageError, match="wait area"):
        store.open_barrier("area").wait()
    store.release()


def test_a_failed_write_is_final_as_in_a_real_sink(inner: LocalStore, raw: RawDirectory) -> None:
    descriptors = num_descriptors()
    store = FaultStore(inner, [Fault("write", error=errno.ENOSPC)])
    sink = store.create("file")
    with pytest.raises(StorageError) as first:
        sink.write(b"lost")
    for again in (lambda: sink.write(b"more"), sink.close):
        with pytest.raises(StorageError) as error:
            again()
        assert error.value is first.value
    sink.close()
    sink.abort()
    assert "file" not in raw.names("")
    assert num_descriptors() == descriptors


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_failed_close_gives_the_descriptor_back(inner: LocalStore, raw: RawDirectory, moment: Any) -> None:
    descriptors = num_descriptors()
    store = FaultStore(inner, [Fault("close", error=errno.EDQUOT, moment=moment)])
    with pytest.raises(StorageError), store.create("file", 2 * MiB) as sink:
        sink.write(bytes(MiB))
    assert ("file" in raw.names("")) == (moment == "after")
    assert num_descriptors() == descriptors


def test_abort_and_the_close_of_a_barrier_never_raise(inner: LocalStore, raw: RawDirectory) -> None:
    store = FaultStore(inner, [Fault("abort", error=errno.EIO), Fault("close_barrier", error=errno.EIO)])
    sink, barrier = store.create("file"), store.open_barrier("area")
    sink.abort()
    barrier.close()
    assert "file" in raw.names("")
    store.release()
    assert "file" not in raw.names("")


@pytest.mark.parametrize("moment", ["before", "halfway", "after"])
@pytest.mark.parametrize("name", CALLS)
def test_after_a_crash_nothing_happens_any_more(inner: LocalStore, raw: RawDirectory, name: str, moment: Any) -> None:
    store = FaultStore(inner)
    sink, barrier = store.create("open/file"), store.open_barrier("open/area")
    store.inject(Fault(name, crash=True, moment=moment))
    with pytest.raises(SimulatedCrash, match=f"crashed {moment} {name}"):
        CALLS[name](store)
    left = snapshot(raw)
    handles = (lambda: sink.write(b""), sink.close, sink.abort, barrier.wait, barrier.close)
    for call in (*(lambda call=call: call(store) for call in CALLS.values()), *handles):
        with pytest.raises(SimulatedCrash, match="is dead: crashed"):
            call()
    assert snapshot(raw) == left
    assert [call.name for call in store.calls] == ["create", "open_barrier", name]
    assert store.is_crashed
    assert "crashed" in repr(store)
    store.release()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_while_a_handle_is_made(inner: LocalStore, raw: RawDirectory, moment: Any) -> None:
    descriptors = num_descriptors()
    for name, key in (("create", "key"), ("open_barrier", "area")):
        store = FaultStore(inner, [Fault(name, crash=True, moment=moment)])
        with pytest.raises(SimulatedCrash):
            CALLS[name](store)
        assert (key in raw.names("")) == (moment == "after")
        store.release()
    assert num_descriptors() == descriptors


def test_a_dead_process_aborts_nothing(inner: LocalStore, raw: RawDirectory) -> None:
    descriptors = num_descriptors()
    store = FaultStore(inner, [Fault("write", nth=2, crash=True)])

    def write() -> None:
        with store.create("file") as sink:
            sink.write(b"written")
            sink.write(b"never")

    with pytest.raises(SimulatedCrash):
        write()
    assert raw.read("file") == b"written"
    store.release()
    assert num_descriptors() == descriptors


def test_a_crash_after_a_call_that_failed_is_a_crash(inner: LocalStore) -> None:
    for moment in ("halfway", "after"):
        with pytest.raises(SimulatedCrash):
            FaultStore(inner, [Fault("put", crash=True, moment=moment)]).put("here", b"exists")


def test_a_crash_is_no_exception_that_handlers_swallow() -> None:
    assert not issubclass(SimulatedCrash, Exception)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_call_waits_at_its_gate(inner: LocalStore, raw: RawDirectory, moment: Any) -> None:
    with ThreadPoolExecutor(1) as pool, Gate() as gate:
        store = FaultStore(inner, [Fault("put", "key", gate=gate, moment=moment)])
        store.put("other", b"is not held up")
        assert not gate.wait_reached(0)
        putting = pool.submit(store.put, "key", b"data")
        assert gate.wait_reached(TIMEOUT_S)
        assert not putting.done()
        assert ("key" in raw.names("")) == (moment == "after")
        store.put("more", b"is not held up either")
        gate.open()
        putting.result(TIMEOUT_S)
        assert raw.read("key") == b"data"
        assert repr(gate) == "Gate(reached=True, open=True)"


def test_who_waits_at_a_gate_dies_with_the_process(inner: LocalStore, raw: RawDirectory) -> None:
    with ThreadPoolExecutor(1) as pool, Gate() as gate:
        store = FaultStore(inner, [Fault("put", gate=gate), Fault("delete", crash=True)])
        putting = pool.submit(store.put, "key", b"data")
        assert gate.wait_reached(TIMEOUT_S)
        with pytest.raises(SimulatedCrash):
            store.delete("here")
        gate.open()
        assert isinstance(putting.exception(TIMEOUT_S), SimulatedCrash)
    assert "key" not in raw.names("")


def test_calls_of_many_threads_are_counted_once_each(inner: LocalStore) -> None:
    store = FaultStore(inner, [Fault("put", nth=50, error=errno.EIO)])

    def put(number: int) -> bool:
        try:
            store.put(f"many/{number}", b"")
        except StorageError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(put, range(100))) == [False] + [True] * 99
    assert len(store.calls) == 100
    assert len(inner.entries("many")) == 99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"call": "putt", "crash": True}, "'putt' is no call"),
        ({"nth": 0, "crash": True}, "counts from 1"),
        ({"moment": "later", "crash": True}, "'later'"),
        ({}, "exactly one"),
        ({"crash": True, "error": errno.EIO}, "exactly one"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        Fault(**options)
