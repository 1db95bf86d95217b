"""The commit protocol: what is there after every failure, and in which order the system is called."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import asyncckpt
from asyncckpt.errors import ClosedError, StepExistsError, StorageError, WriterError
from asyncckpt.repository.commit import StepWriter
from asyncckpt.repository.root import clean_partials, prepare_root
from asyncckpt.stores import LocalStore
from asyncckpt.stores.contract import Store
from asyncckpt.testing import Fault, FaultPoint, FaultStore, SimulatedCrash, every_crash_point, every_error_point

MiB = 2**20
FILES = {"state/zarr.json": b"{}", "state/w/zarr.json": b"{w}", "state/w/c.0": bytes(2 * MiB)}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return prepare_root(tmp_path / "root")


def write(store: Store, step: int = 500, nonce: str = "abc") -> StepWriter:
    writer = StepWriter.begin(store, step, nonce)
    _write_files(writer)
    return writer


def _write_files(writer: StepWriter) -> None:
    for key, data in FILES.items():
        if len(data) >= MiB:
            with writer.create(key, len(data)) as sink:
                sink.write(data)
        else:
            writer.put(key, data)


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def steps(store: LocalStore) -> list[str]:
    return sorted(path.name for path in Path(store.root).glob("step-*"))


def partials(store: LocalStore) -> list[str]:
    return os.listdir(f"{store.root}/.asyncckpt/partial")


def test_a_committed_step_has_all_files_and_the_header(store: LocalStore) -> None:
    write(store).commit(b"header")
    assert tree(Path(store.root) / "step-00000500") == {**FILES, "zarr.json": b"header"}
    assert partials(store) == []


def test_nothing_is_visible_before_the_commit(store: LocalStore) -> None:
    write(store)
    assert steps(store) == []
    assert partials(store) == ["step-00000500-abc"]


def test_abort_leaves_nothing_and_ends_the_writer(store: LocalStore) -> None:
    writer = write(store)
    sink = writer.create("state/v/c.0")
    writer.abort()
    writer.abort()
    assert partials(store) == []
    assert steps(store) == []
    for call in (
        lambda: writer.put("x", b""),
        lambda: writer.create("x"),
        lambda: writer.link("x", "y"),
        lambda: writer.commit(b""),
    ):
        with pytest.raises(ClosedError, match="step 500"):
            call()
    sink.close()


def test_abort_removes_the_name_of_a_linked_file_and_leaves_the_file(store: LocalStore) -> None:
    write(store).commit(b"header")
    writer = write(store, step=600)
    assert writer.link("step-00000500/state/w/c.0", "state/v/c.0")
    linked = Path(store.root) / "step-00000500" / "state" / "w" / "c.0"
    assert linked.stat().st_nlink == 2
    writer.abort()
    assert linked.stat().st_nlink == 1
    assert tree(Path(store.root) / "step-00000500") == {**FILES, "zarr.json": b"header"}


def test_a_file_that_cannot_be_linked_may_be_written(store: LocalStore) -> None:
    write(store).commit(b"header")
    faulty = FaultStore(store, [Fault("link", error=errno.EMLINK)])
    writer = write(faulty, step=600)
    assert not writer.link("step-00000500/state/w/c.0", "state/v/c.0")
    writer.put("state/v/c.0", b"written")
    writer.commit(b"header")
    assert tree(Path(store.root) / "step-00000600")["state/v/c.0"] == b"written"


def test_abort_after_a_commit_removes_nothing(store: LocalStore) -> None:
    writer = write(store)
    writer.commit(b"header")
    writer.abort()
    assert steps(store) == ["step-00000500"]


def test_abort_never_raises(store: LocalStore) -> None:
    faulty = FaultStore(store)
    writer = write(faulty)
    faulty.inject(Fault("delete", error=errno.EACCES))
    writer.abort()
    assert partials(store) == ["step-00000500-abc"]


def test_a_committed_step_cannot_be_begun_again(store: LocalStore) -> None:
    write(store).commit(b"header")
    with pytest.raises(StepExistsError) as error:
        StepWriter.begin(store, 500, "def")
    assert error.value.fields["step"] == 500
    assert partials(store) == []


def test_of_two_writers_of_a_step_one_commits(store: LocalStore) -> None:
    first, second = write(store, nonce="one"), write(store, nonce="two")
    second.commit(b"second")
    with pytest.raises(StepExistsError):
        first.commit(b"first")
    first.abort()
    assert tree(Path(store.root) / "step-00000500")["zarr.json"] == b"second"
    assert partials(store) == []


def test_an_attempt_with_the_same_nonce_starts_anew(store: LocalStore) -> None:
    killed = StepWriter.begin(store, 500, "abc")
    killed.put("state/old/zarr.json", b"old")
    write(store).commit(b"header")
    assert "state/old/zarr.json" not in tree(Path(store.root) / "step-00000500")


def test_the_rest_of_an_interrupted_deletion_is_replaced(store: LocalStore) -> None:
    store.put("step-00000500/state/old/zarr.json", b"old")
    write(store).commit(b"header")
    assert tree(Path(store.root) / "step-00000500") == {**FILES, "zarr.json": b"header"}


def test_an_open_file_prevents_the_commit(store: LocalStore) -> None:
    writer = write(store)
    sink = writer.create("state/v/c.0")
    with pytest.raises(WriterError, match="1 files are not closed"):
        writer.commit(b"header")
    sink.close()
    writer.commit(b"header")
    assert steps(store) == ["step-00000500"]


def test_an_aborted_file_does_not_prevent_the_commit(store: LocalStore) -> None:
    writer = write(store)
    with pytest.raises(ZeroDivisionError), writer.create("state/v/c.0"):
        raise ZeroDivisionError
    writer.commit(b"header")
    assert tree(Path(store.root) / "step-00000500") == {**FILES, "zarr.json": b"header"}


@pytest.mark.parametrize("fails", ["put", "create", "write", "close", "link"])
def test_a_failed_file_prevents_the_commit_even_if_nobody_looked(store: LocalStore, fails: str) -> None:
    faulty = FaultStore(store)
    writer = write(faulty)
    sink = writer.create("state/v/c.0")
    faulty.inject(Fault(fails, error=errno.ENOSPC))
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: writer.put("x", b"1"),
        "create": lambda: writer.create("x"),
        "write": lambda: sink.write(b"1"),
        "close": sink.close,
        "link": lambda: writer.link("step-00000400/x", "x"),
    }
    with pytest.raises(StorageError) as first:
        calls[fails]()
    sink.abort()
    with pytest.raises(StorageError) as error:
        writer.commit(b"header")
    assert error.value is first.value
    writer.abort()
    assert steps(store) == []


def test_put_and_create_work_from_many_threads(store: LocalStore) -> None:
    writer = StepWriter.begin(store, 1, "abc")
    ready = threading.Barrier(4)

    def work(thread: int) -> None:
        ready.wait()
        for number in range(25):
            writer.put(f"state/{number}/{thread}/zarr.json", b"{}")
            with writer.create(f"state/{number}/{thread}/c.0") as sink:
                sink.write(b"data")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    writer.commit(b"header")
    assert len(tree(Path(store.root) / "step-00000001")) == 201
    assert repr(writer) == "StepWriter(step=1, ended, open_sinks=0)"


def _save_as_the_writer_does(store: Store) -> None:
    writer = StepWriter.begin(store, 500, "abc")
    try:
        _write_files(writer)
        writer.commit(b"header")
    except StorageError:
        writer.abort()
        raise


def _whole_or_none(store: LocalStore, point: FaultPoint) -> None:
    trees = [tree(Path(store.root) / name) for name in steps(store)]
    found = [files for files in trees if "zarr.json" in files]  # readers are offered no other
    assert found in ([], [{**FILES, "zarr.json": b"header"}])
    if point.raised is None:
        assert found, "it was acknowledged"
    # The next run starts by cleaning, and can save the step unless it is there.
    clean_partials(store)
    assert partials(store) == []
    assert [tree(Path(store.root) / name) for name in steps(store)] == found
    if not found:
        write(store).commit(b"header")


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[[], LocalStore]:
    numbers = itertools.count()
    return lambda: prepare_root(tmp_path / f"root-{next(numbers)}")


def test_a_writer_killed_at_any_call_leaves_the_whole_step_or_none(make_store: Callable[[], LocalStore]) -> None:
    points = every_crash_point(make_store, _save_as_the_writer_does, _whole_or_none)
    assert all(isinstance(point.raised, SimulatedCrash) for point in points)
    changes = {"put", "create", "write", "close", "delete", "open_barrier", "wait", "sync_directory", "rename"}
    assert changes <= {point.call.name for point in points}


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "for good"])
def test_an_error_at_any_call_leaves_the_whole_step_or_none(
    make_store: Callable[[], LocalStore], persistent: bool
) -> None:
    points = every_error_point(make_store, _save_as_the_writer_does, _whole_or_none, persistent=persistent)
    # Only releasing the barrier may fail unheard: everything is durable by then.
    unheard = {point.call.name for point in points if point.raised is None}
    assert unheard == {"close_barrier"}


# What the system sees. The traced program saves one small step of two small files and a large one.

SAVE = textwrap.dedent("""
    import sys
    from asyncckpt.repository.commit import StepWriter
    from asyncckpt.stores import LocalStore

    store = LocalStore(sys.argv[1], flush=sys.argv[2])
    writer = StepWriter.begin(store, 500, "abc")
    writer.put("state/zarr.json", b"{}")
    writer.put("state/w/zarr.json", b"{}")
    with writer.create("state/w/c.0", 2**21) as sink:
        sink.write(bytes(2**21 + 5))
    writer.commit(b"header")
    print("acknowledged")
""")
TRACED = "openat,mkdir,mkdirat,write,pwrite64,fsync,fdatasync,syncfs,rename,renameat,renameat2,ftruncate"


def traced_save(root: str, flush: str, *options: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """System calls of a save as ``name path``, the path relative to *root*, and how the save ended."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    log = Path(root).parent / "strace.log"
    tracer = [strace, "-f", "-y", "-e", f"trace={TRACED}", *options, "-o", str(log)]
    result = subprocess.run(
        [*tracer, sys.executable, "-c", SAVE, root, flush],
        env={**os.environ, "PYTHONPATH": str(Path(asyncckpt.__file__).parent.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in result.stderr.lower() and not log.read_text():
        pytest.skip(f"strace cannot trace here: {result.stderr.strip()}")
    calls = []
    for line in log.read_text().splitlines():
        found = re.match(r"\d+ +(\w+)\((.*)$", line)
        if found and f"{root}" in line:
            name = re.sub("at2?$|64$", "", found[1])
            paths = re.findall(re.escape(root) + r'([^">]*)[">]', found[2])
            calls.append(" ".join([name, *(path or "/" for path in paths[: 2 if name == "rename" else 1])]))
    return calls, result


PARTIAL = "/.asyncckpt/partial/step-00000500-abc"


def positions(calls: list[str], pattern: str) -> list[int]:
    found = [number for number, call in enumerate(calls) if re.fullmatch(pattern, call)]
    assert found, (pattern, calls)
    return found


@pytest.mark.parametrize("flush", ["syncfs", "each"])
def test_the_system_is_called_in_durable_order(store: LocalStore, flush: str) -> None:
    calls, result = traced_save(store.root, flush)
    assert result.stdout == "acknowledged\n", result.stderr
    header = f"{PARTIAL}/zarr.json"
    data = positions(calls, rf"p?write {PARTIAL}/state/.*")
    if flush == "syncfs":
        # The descriptor that reports write-back errors is opened before anything is written.
        assert positions(calls, rf"open {PARTIAL}")[0] < data[0]
        flushed = positions(calls, rf"syncfs {PARTIAL}")
        assert len(flushed) == 1
        assert not [call for call in calls if call.startswith("fsync") and "/state" in call]
    else:
        files = [f"{PARTIAL}/state/zarr.json", f"{PARTIAL}/state/w/zarr.json", f"{PARTIAL}/state/w/c.0"]
        directories = [f"{PARTIAL}/state/w", f"{PARTIAL}/state"]
        flushed = [positions(calls, f"fsync {path}") for path in (*files, *directories)]
        assert [len(found) for found in flushed] == [1] * 5, "nothing is fsynced twice"
        flushed = [found[0] for found in flushed]
        assert flushed[3:] == sorted(flushed[3:]), "directories bottom up"
        assert min(flushed[3:]) > data[-1]
    (rename,) = positions(calls, f"rename {PARTIAL} /step-00000500")
    order = [
        data[-1],
        *flushed[-1:],
        *positions(calls, f"write {header}"),
        *positions(calls, f"fsync {header}"),
        positions(calls, f"fsync {PARTIAL}")[-1],
        rename,
        *positions(calls, "fsync /"),
        *positions(calls, "fsync /.asyncckpt/partial"),
    ]
    assert order == sorted(order), calls
    # The header is not even created before the data is durable.
    assert positions(calls, f"open {header}")[0] > flushed[-1]


@pytest.mark.parametrize(
    "fault", ["syncfs:error=EIO", "rename:error=EIO", "pwrite64:error=ENOSPC", "mkdir:error=EDQUOT"]
)
def test_an_error_of_the_system_is_not_acknowledged_and_nothing_is_committed(store: LocalStore, fault: str) -> None:
    _, result = traced_save(store.root, "syncfs", "-e", f"inject={fault}")
    assert "acknowledged" not in result.stdout
    assert "StorageError" in result.stderr
    assert os.strerror(getattr(errno, fault.partition("=")[2])) in result.stderr
    assert steps(store) == []


@pytest.mark.parametrize(("flush", "num_fsyncs"), [("syncfs", 4), ("each", 10)])
def test_any_failed_fsync_is_not_acknowledged_and_not_repeated(store: LocalStore, flush: str, num_fsyncs: int) -> None:
    for failing in range(1, num_fsyncs + 1):
        root = prepare_root(f"{store.root}-{failing}").root
        calls, result = traced_save(root, flush, "-e", f"inject=fsync:error=EIO:when={failing}")
        assert "acknowledged" not in result.stdout
        assert "Input/output error" in result.stderr
        assert sum(call.startswith("fsync") for call in calls) == failing
    calls, result = traced_save(store.root, flush, "-e", f"inject=fsync:error=EIO:when={num_fsyncs + 1}")
    assert result.stdout == "acknowledged\n"
