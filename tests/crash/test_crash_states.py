"""After a power cut at any moment, no acknowledged checkpoint is lost and no torn one is offered; see `crashstates`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import asyncckpt

sys.path.insert(0, str(Path(__file__).parent))

from crashstates.campaign import explore, load_history
from crashstates.corruption import accepted_damage
from crashstates.full import ALL_MUTANTS, SCENARIOS, run_full
from crashstates.history import History, replay
from crashstates.mutants import Mutant, run_mutant
from crashstates.states import Choice, Disk
from crashstates.trace import Call, Descriptor, TracingRefusedError, record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs strace")

RealTrace = Callable[[str, str], Path]
PACKAGE = Path(asyncckpt.__file__).parent.parent
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "crash_states.json"

STATES = 600  # of each scenario and flush mode: 2,400 in all
STATES_PER_MUTANT = 2_000
HANDFUL = (
    ("commit: data not flushed", "syncfs"),
    ("commit: renamed before the header is written", "each"),
    ("commit: acknowledged before the root is flushed", "syncfs"),
    ("sink: flushed before its tail", "each"),
    ("delete: data first", "syncfs"),
    ("retention: what is kept is not flushed", "syncfs"),
    ("pipeline: of a commit found done, only the root is flushed", "syncfs"),
    ("index: digest not checked", "syncfs"),
    ("clean: every step removed", "syncfs"),
)


@pytest.fixture(scope="module")
def real_trace(tmp_path_factory: pytest.TempPathFactory) -> RealTrace:
    """Records a scenario in a flush mode once; skips where nothing may be traced."""

    @cache
    def trace(scenario: str, flush: str) -> Path:
        try:
            return record(scenario, flush, tmp_path_factory.mktemp("real") / "run", PACKAGE)
        except TracingRefusedError as error:
            pytest.skip(str(error))

    return trace


@pytest.mark.parametrize(("scenario", "flush"), SCENARIOS)
def test_the_model_ends_where_the_program_ended(real_trace: RealTrace, scenario: str, flush: str) -> None:
    trace = real_trace(scenario, flush)
    disk = Disk(load_history(trace))
    found = disk.image(disk.everything(disk.history.moments[-1])).tree(0)
    top = trace.parent / "top"
    assert {key: content.data for key, content in found.items()} == {
        str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(("scenario", "flush"), SCENARIOS)
def test_every_crash_state_keeps_the_promises(real_trace: RealTrace, tmp_path: Path, scenario: str, flush: str) -> None:
    outcome = explore(load_history(real_trace(scenario, flush)), STATES, scratch=tmp_path)
    print(f"{outcome.num_states} states after {outcome.num_calls} calls, {outcome.num_on_disk} also on a real disk")
    assert outcome.violations == []
    assert outcome.num_states == STATES
    assert outcome.num_on_disk > 10


def test_no_damage_passes_verification(real_trace: RealTrace) -> None:
    num_damaged, accepted = accepted_damage(load_history(real_trace("direct", "syncfs")))
    assert accepted == []
    assert num_damaged > 300


def mutant_named(name: str) -> Mutant:
    (found,) = (mutant for mutant in ALL_MUTANTS if mutant.name == name)
    return found


@pytest.mark.parametrize(("name", "flush"), HANDFUL)
def test_a_planted_bug_is_noticed(real_trace: RealTrace, tmp_path: Path, name: str, flush: str) -> None:
    real_trace("direct", "syncfs")  # skips where nothing may be traced
    result = run_mutant(mutant_named(name), flush, tmp_path / "mutant", STATES_PER_MUTANT, real_trace)
    assert result.evidence is not None


@pytest.mark.parametrize("mutant", ALL_MUTANTS, ids=lambda mutant: mutant.name)
def test_every_planted_bug_still_fits_the_package(mutant: Mutant) -> None:
    sources: dict[str, str] = {}
    for file, old, new in mutant.edits:
        source = sources.setdefault(file, (PACKAGE / "asyncckpt" / file).read_text())
        assert source.count(old) == 1
        sources[file] = source.replace(old, new)
    for file, source in sources.items():
        compile(source, file, "exec")


def test_mutants_have_names_of_their_own() -> None:
    assert len({mutant.name for mutant in ALL_MUTANTS}) == len(ALL_MUTANTS)


@pytest.mark.timeout(6 * 3600)
def test_the_full_campaign(real_trace: RealTrace, tmp_path: Path, full: bool) -> None:
    if not full:
        pytest.skip("only with --full")
    summary = run_full(tmp_path, real_trace)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    assert (summary["violations"], summary["damage_accepted"]) == (0, [])
    assert summary["mutants_caught"] >= 0.95 * summary["mutants"]
    assert summary["equivalent_mutants_silent"] == summary["equivalent_mutants"]


# The model itself, on histories written by hand.

TOP = "/top"


def history_of(*calls: tuple[object, ...]) -> History:
    """A history of calls like ``("mkdir", "a")`` below the top, one after the other."""
    return replay([_call(number, *call) for number, call in enumerate(calls)], TOP, "/marks")


def _call(number: int, name: str, *arguments: object) -> Call:
    path = os.path.normpath(f"{TOP}/{arguments[0]}")
    match name:
        case "create":
            given = (Descriptor(-1, "/"), path.encode(), "O_WRONLY|O_CREAT|O_EXCL", "0666")
            return Call("openat", given, 3, number, number)
        case "write":
            return Call("write", (Descriptor(3, path), arguments[1]), len(arguments[1]), number, number)
        case "fsync" | "syncfs":
            return Call(name, (Descriptor(3, path),), 0, number, number)
        case "rename":
            return Call(name, (path.encode(), f"{TOP}/{arguments[1]}".encode()), 0, number, number)
    return Call(name, (path.encode(),), 0, number, number)


def trees(history: History, moment: int | None = None) -> list[dict[str, bytes]]:
    """The files of every state of all subsets of names and all variants of files, without repetition."""
    disk = Disk(history)
    moment = history.moments[-1] if moment is None else moment
    at = disk.at(moment)
    states = [Choice(moment)]
    for unit in at.units:
        states += [Choice(moment, state.units | {unit}, state.files) for state in states]
    for inode, count in at.pending_files.items():
        states += [Choice(moment, s.units, (*s.files, (inode, n))) for s in states for n in range(1, count)]
    found: list[dict[str, bytes]] = []
    for state in states:
        tree = {key: content.data for key, content in disk.image(state).tree(0).items()}
        found += [tree] if tree not in found else []
    return found


DATA = bytes(range(1, 251)) * 40  # 10,000 bytes without a zero


def test_nothing_is_durable_by_itself() -> None:
    found = trees(history_of(("create", "f"), ("write", "f", DATA)))
    assert {} in found
    assert {"f": b""} in found
    assert {"f": bytes(10_000)} in found, "size without data"
    assert {"f": DATA[:512] + bytes(9488)} in found, "torn after a sector"
    assert {"f": DATA[:4096] + bytes(4096) + DATA[8192:]} in found, "a hole"
    assert {"f": DATA[:4096]} in found, "a size in between"
    assert {"f": DATA} in found


def test_fsync_of_a_file_does_not_keep_its_name_nor_of_a_directory_its_data() -> None:
    assert trees(history_of(("create", "f"), ("write", "f", DATA), ("fsync", "f"))) == [{}, {"f": DATA}]
    found = trees(history_of(("create", "f"), ("write", "f", b"1"), ("fsync", ".")))
    assert {} not in found
    assert {"f": b""} in found


@pytest.mark.parametrize("flush", [[("fsync", "f"), ("fsync", ".")], [("syncfs", ".")]], ids=["each", "syncfs"])
def test_what_is_flushed_stays(flush: list[tuple[object, ...]]) -> None:
    assert trees(history_of(("create", "f"), ("write", "f", DATA), *flush)) == [{"f": DATA}]


def test_a_flush_covers_only_what_came_before() -> None:
    found = trees(history_of(("create", "f"), ("syncfs", "."), ("write", "f", b"1"), ("create", "g")))
    assert all("f" in tree for tree in found)
    assert {"f": b""} in found
    assert {"f": b"", "g": b""} in found


MOVED = (("mkdir", "a"), ("mkdir", "b"), ("create", "a/f"), ("syncfs", "."), ("rename", "a/f", "b/g"))


@pytest.mark.parametrize(
    ("flush", "expected"),
    [
        ([], [{"a/f"}, {"b/g"}, {"a/f", "b/g"}]),
        ([("fsync", "b")], [{"a/f", "b/g"}, {"b/g"}]),
        ([("fsync", "a")], [set(), {"b/g"}]),
        ([("fsync", "b"), ("fsync", "a")], [{"b/g"}]),
    ],
    ids=["nothing", "new directory", "old directory", "both"],
)
def test_a_rename_between_directories(flush: list[tuple[object, ...]], expected: list[set[str]]) -> None:
    found = [set(tree) for tree in trees(history_of(*MOVED, *flush))]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_a_rename_inside_a_directory_is_atomic() -> None:
    found = trees(history_of(("create", "f"), ("syncfs", "."), ("rename", "f", "g")))
    assert found == [{"f": b""}, {"g": b""}]


def test_a_call_may_be_issued_before_the_directory_it_needs() -> None:
    create, make = _call(0, "create", "d/f"), _call(1, "mkdir", "d")
    found = trees(replay([create, make], TOP, "/marks"))
    assert found == [{}, {"d/f": b""}]


def test_a_call_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(ValueError, match="did unlink where the model knows no such place"):
        history_of(("unlink", "nothing"))
