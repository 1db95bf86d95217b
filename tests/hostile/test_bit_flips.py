"""One bit of a step is wrong, or one file: noticed, or a byte that no restore reads; never a wrong value.

Groups (``zarr.json`` without an array) are for other readers: ours never opens them. Of arrays whose ``zarr.json`` are
the same, it opens one. A flip in what it never opens leaves what is restored as it was, and `verify` tells.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import victim

import asyncckpt as ac

OLD, NEW = 4, 5
SEED = 20260101
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "bit_flips.json"

pytestmark = pytest.mark.timeout(1800)


class Lab:
    """A root with two steps, of which the newer one is damaged and mended again and again."""

    def __init__(self, root: Path) -> None:
        for step in (OLD, NEW):
            victim.save(root, step, seed=step)
        self.root = root
        self.step = root / f"step-{NEW:08d}"
        self.old = root / f"step-{OLD:08d}"
        self.files = sorted(path.relative_to(self.step).as_posix() for path in self.step.rglob("*") if path.is_file())
        # Whole chunks of the same size in both steps: only the index tells one from the other.
        self.twins = [key for key in self.files if key.startswith("state/") and self._is_twin(key)]
        self.spares = self._find_spares()
        self.wanted = {step: victim.fingerprint(victim.make_state(step)) for step in (OLD, NEW)}
        self.loaded = victim.fingerprint(ac.load(root, NEW))
        self.state = victim.make_state(99)
        self.checkpointer = ac.Checkpointer(root, self.state, writer=ac.Writer(kind="thread"))

    def _is_twin(self, key: str) -> bool:
        new, old = (self.step / key).read_bytes(), (self.old / key).read_bytes()
        return len(new) == len(old) and new != old

    def _find_spares(self) -> set[str]:
        """Files that no restore opens: those of groups, and those that say the same as that of an earlier array."""
        groups = [key for key in self.files if key.endswith("/zarr.json") and b'"node_type":"group"' in self.read(key)]
        arrays = sorted(
            key.removesuffix("/zarr.json") for key in {*self.files} - {*groups} if key.endswith("/zarr.json")
        )
        firsts: dict[bytes, str] = {}
        for array in arrays:
            firsts.setdefault(self.read(f"{array}/zarr.json"), array)
        assert len(firsts) < len(arrays)
        return {*groups, *(f"{array}/zarr.json" for array in {*arrays} - {*firsts.values()})}

    def read(self, key: str) -> bytes:
        return (self.step / key).read_bytes()

    def load(self) -> str:
        """``"refused"``, or ``"unread"`` when the right values came back."""
        try:
            found = ac.load(self.root, NEW)
        except ac.CorruptCheckpointError:
            return "refused"
        return "unread" if victim.fingerprint(found) == self.loaded else "WRONG"

    def restore(self) -> str:
        before = victim.fingerprint(self.state)
        try:
            self.checkpointer.restore(NEW)
        except ac.CorruptCheckpointError:
            return "refused" if victim.fingerprint(self.state) == before else "MIXED"
        return "unread" if victim.fingerprint(self.state) == self.wanted[NEW] else "WRONG"

    def restore_latest(self) -> tuple[ac.CheckpointInfo, bool]:
        """What was restored, and whether all of it is right; a step that was set aside is put back."""
        info = self.checkpointer.restore()
        assert info is not None
        for aside in (self.root / ".asyncckpt/damaged").glob("*"):
            aside.rename(self.step)
        return info, victim.fingerprint(self.state) == self.wanted[info.step]

    def verify(self) -> set[str]:
        return {damage.key for damage in ac.open(self.root).verify(NEW).damaged}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("flips") / "run")
    yield lab
    lab.checkpointer.close()


def draw_flips(lab: Lab, count: int) -> Iterator[tuple[str, int, int]]:
    """File, byte and bit; half of them anywhere, half in any file, or the small ones would hardly be hit."""
    draw = random.Random(SEED)
    sizes = {key: (lab.step / key).stat().st_size for key in lab.files}
    for number in range(count):
        weights = list(sizes.values()) if number % 2 else None
        key = draw.choices(lab.files, weights)[0]
        yield key, draw.randrange(sizes[key]), draw.randrange(8)


def test_every_flipped_bit_is_noticed_or_never_read(lab: Lab, full: bool) -> None:
    outcomes: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    for key, position, bit in draw_flips(lab, 1000 if full else 150):
        path = lab.step / key
        intact = path.read_bytes()
        flipped = bytearray(intact)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        outcome = lab.load()
        where = (key, position, bit)
        assert outcome == ("unread" if key in lab.spares else "refused"), where
        assert lab.restore() == outcome, where
        named = lab.verify()
        assert {key, key.rpartition("/")[0]} & named, (where, named)
        path.write_bytes(intact)
        outcomes[outcome] += 1
        hit["header" if key == "zarr.json" else key.rpartition("/")[2].partition(".")[0]] += 1
    assert lab.verify() == set()
    assert outcomes["refused"] > 0 < outcomes["unread"]
    if full:
        report = {
            "flips": sum(outcomes.values()),
            "seed": SEED,
            "outcomes": dict(outcomes),
            "files": dict(hit),
            "wrong": 0,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")


def delete(lab: Lab, path: Path) -> None:
    path.unlink()


def truncate(lab: Lab, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(lab: Lab, path: Path) -> None:
    path.write_bytes(b"")


def take_from_the_older_step(lab: Lab, path: Path) -> None:
    shutil.copy(lab.old / path.relative_to(lab.step), path)


def exchange(lab: Lab, path: Path) -> None:
    """With the next file that differs."""
    start = lab.files.index(path.relative_to(lab.step).as_posix())
    others = [lab.step / key for key in lab.files[start + 1 :] + lab.files[:start]]
    other = next(other for other in others if other.read_bytes() != path.read_bytes())
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


@pytest.mark.parametrize("damage", [delete, truncate, empty, take_from_the_older_step, exchange])
def test_a_damaged_file_makes_restore_fall_back(
    lab: Lab, damage: Callable[[Lab, Path], None], full: bool, recwarn: pytest.WarningsRecorder
) -> None:
    keys = lab.files if full else [*lab.twins, *random.Random(damage.__name__).sample(lab.files, 5)]
    for key in dict.fromkeys(["zarr.json", *keys]):
        intact: dict[str, Any] = {name: (lab.step / name).read_bytes() for name in lab.files}
        damage(lab, lab.step / key)
        changed = [
            name
            for name in lab.files
            if not (lab.step / name).exists() or (lab.step / name).read_bytes() != intact[name]
        ]
        recwarn.clear()
        info, is_right = lab.restore_latest()
        warned = [str(warning.message) for warning in recwarn if f"step {NEW} is damaged" in str(warning.message)]
        assert is_right, (damage, key)
        if lab.spares.issuperset(changed):  # also when nothing changed: some files are the same in both steps
            assert (info.step, info.fell_back_from, warned) == (NEW, (), []), (damage, key)
        elif key == "zarr.json" and damage is delete:
            # Deleting a step begins like this: such a step is no longer offered, and no reason to warn.
            assert (info.step, info.fell_back_from, warned) == (OLD, (), []), (damage, key)
        else:
            assert (info.step, info.fell_back_from) == (OLD, (NEW,)), (damage, key)
            assert len(warned) == 1
        for name, data in intact.items():
            (lab.step / name).write_bytes(data)
    assert lab.verify() == set()
