"""An acknowledged step is on the disk, not only in memory.

The step is saved on a file system of its own in an image file. At the moment of the acknowledgement,
with the file system still mounted, the image is copied: the copy holds what the disk was told, and
nothing that was only in the page cache. Then the copy is mounted, as after a power cut.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from asyncckpt.repository import Catalog, CommittedStep, clean_partials, prepare_root, verify_step
from asyncckpt.stores import LocalStore

CommitStep = Callable[..., CommittedStep]
IMAGE_BYTES = 96 * 2**20


def run(*command: str | Path) -> bool:
    if shutil.which(str(command[0])) is None:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    if not run("mount", "-o", "loop", image, at):
        pytest.skip("mounting an image is not allowed here")
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    if not run("mkfs.ext4", "-q", "-F", path):
        pytest.skip("mkfs.ext4 is not installed")
    return path


@pytest.fixture(params=["syncfs", "each", "each-buffered"])
def store(request: pytest.FixtureRequest, image: Path, tmp_path: Path) -> Iterator[LocalStore]:
    flush: Literal["syncfs", "each"] = "syncfs" if request.param == "syncfs" else "each"
    with mounted(image, tmp_path / "disk") as disk:
        root = prepare_root(disk / "new" / "root").root
        yield LocalStore(root, flush=flush, direct=request.param != "each-buffered")


@contextmanager
def after_power_cut(image: Path, tmp_path: Path) -> Iterator[LocalStore]:
    copy = tmp_path / "copy.img"
    shutil.copyfile(image, copy)
    with mounted(copy, tmp_path / "copy") as disk:
        yield LocalStore(disk / "new" / "root")


def test_an_acknowledged_step_survives(store: LocalStore, commit_step: CommitStep, image: Path, tmp_path: Path) -> None:
    commit_step(500)
    with after_power_cut(image, tmp_path) as found:
        assert Catalog(found).steps() == [500]
        assert verify_step(CommittedStep(found, 500)).ok
        assert clean_partials(found) == []


def test_a_step_of_links_survives_the_deletion_of_what_it_was_linked_to(
    store: LocalStore, commit_step: CommitStep, image: Path, tmp_path: Path
) -> None:
    first = commit_step(500)
    commit_step(600, link_to=first)
    first.delete()
    with after_power_cut(image, tmp_path) as found:
        assert verify_step(CommittedStep(found, 600)).ok
        assert Catalog(found).steps() == [600]


def test_a_step_that_was_not_committed_is_not_there(store: LocalStore, image: Path, tmp_path: Path) -> None:
    barrier = store.open_barrier(".asyncckpt/partial/step-00000500-abc")
    store.put(".asyncckpt/partial/step-00000500-abc/state/w/c.0", bytes(2**21))
    barrier.wait()
    barrier.close()
    with after_power_cut(image, tmp_path) as found:
        assert Catalog(found).steps() == []
        assert clean_partials(found) == [".asyncckpt/partial/step-00000500-abc"]


def test_a_deleted_step_is_not_offered_again(
    store: LocalStore, commit_step: CommitStep, image: Path, tmp_path: Path
) -> None:
    commit_step(500).delete()
    with after_power_cut(image, tmp_path) as found:
        assert Catalog(found).steps() == []
