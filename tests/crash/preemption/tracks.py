"""What the driver knows of one kind of training, all of whose lives share their roots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from audit import audit_root, is_unlocked, num_partials
from content import Content
from gpt import Gpt, reference
from journal import Journal, JournalReader
from procs import fork
from told import Fills, Life, Task, live

__all__ = ["FillsTrack", "GptTrack", "RanksTrack", "Track"]


class _Unknown(Content):
    """For states whose values the auditor does not know; the next life compares them."""

    def __init__(self) -> None:
        pass

    def differences(self, state: object, step: int) -> list[str]:
        return []


class _News:
    """What one trainer has told in this life."""

    def __init__(self, path: Path) -> None:
        self.reader = JournalReader(path)
        self.begin_life()

    def begin_life(self) -> None:
        self.last: dict[str, int] = {}
        self.saving: set[int] = set()


class Track:
    """The base: one or more trainers, each with its root and its journal.

    Attributes:
        start_s: about how long it takes to get to the checkpointer.
        expected: the fingerprint of each step, as it was trained first.
    """

    start_s = 0.3

    def __init__(self, directory: Path, content: Content, num_trainers: int = 1) -> None:
        directory.mkdir()
        self.directory = directory
        self.roots = [directory / f"root-{rank}" for rank in range(num_trainers)]
        self._news = [_News(directory / f"journal-{rank}") for rank in range(num_trainers)]
        self._content = content
        self.expected: dict[int, str] = {}
        self._newest = -1

    def start(self, life: Life) -> int:
        """Start a trainer; the pid."""
        raise NotImplementedError

    def begin_life(self) -> None:
        """Forget what the last one told."""
        for news in self._news:
            news.begin_life()

    def read(self) -> tuple[int, int, list[str]]:
        """Take the news in: how many steps were completed, how many saves began, and what is wrong."""
        num_trained, num_begun, wrong = 0, 0, []
        for news in self._news:
            for note in news.reader.read():
                news.last[note.event] = max(note.number, news.last.get(note.event, -1))
                num_trained += note.event == "trained"
                num_begun += note.event == "save.started"
                if note.event == "save.started":
                    news.saving.add(note.number)
                if note.event == "save.durable":
                    news.saving.discard(note.number)
                wrong += self._check(note.event, note.number, note.detail)
        return num_trained, num_begun, wrong

    def _check(self, event: str, step: int, detail: str) -> list[str]:
        if event == "error":
            return [detail]
        if event == "trained" and self.expected.setdefault(step, detail) != detail:
            return [f"trained step {step}: {detail}, not {self.expected[step]}"]
        if event == "restored" and step >= 0 and self.expected.get(step) != detail:
            return [f"restored step {step}: {detail}, not {self.expected.get(step)}"]
        return []

    def has_told(self, event: str) -> bool:
        """Whether any trainer has told of *event* in this life."""
        return any(event in news.last for news in self._news)

    def is_worker(self, pid: int) -> bool:
        """Whether it is a DataLoader worker: these end with 1 when their trainer ends first."""
        return self.has_told("opened") and all(pid != news.last.get("opened") for news in self._news)

    @property
    def is_saving(self) -> bool:
        return any(news.saving for news in self._news)

    @property
    def moment(self) -> str:
        """What the training is doing as far as it has told."""
        if not all("opened" in news.last for news in self._news):
            return "before the handler exists"
        if not all("restored" in news.last for news in self._news):
            return "during restore"
        if not self.has_told("trained"):
            return "before the first step"
        return "in a step and a save" if self.is_saving else "in a step"

    def audit(self, life: Life) -> tuple[int, list[str]]:
        """After a life: how many steps are lost, and what is wrong."""
        lost, wrong = 0, []
        trained = max(self._newest, *(news.last.get("trained", -1) for news in self._news))
        newest_of = []
        for root, news in zip(self.roots, self._news, strict=True):
            found = audit_root(root, self._content, everything=False)
            newest = max(found.steps, default=-1)
            newest_of.append(newest)
            lost = max(lost, trained - newest)
            wrong += [f"torn: {found.torn}"] if found.torn else []
            wrong += [] if is_unlocked(root) else ["the root is locked"]
            wrong += ["partial steps are left"] if num_partials(root) else []
            if newest < max(news.last.get("stopped", -1), news.last.get("save.staged", -1)):
                wrong.append(f"what was staged last is not there: {news.last}, but {found.steps}")
        if len(set(newest_of)) > 1:
            wrong.append(f"the ranks stopped after different steps: {newest_of}")
        if lost > 1 and not life.leaves_now:
            wrong.append(f"{lost} steps are lost")
        self._newest = max(newest_of)
        return lost, wrong


class FillsTrack(Track):
    """Values that follow from the step."""

    def start(self, life: Life) -> int:
        return _fork(lambda: Fills(self._content, is_fork_shielded=life.is_fork_shielded), life, self.directory)


class GptTrack(Track):
    """A real training run, to be compared with one that nobody interrupts."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, _Unknown())

    def start(self, life: Life) -> int:
        return _fork(lambda: Gpt(is_fork_shielded=life.is_fork_shielded), life, self.directory)

    def compare_with_reference(self) -> list[str]:
        """The steps that any life trained with another result than a run without an interruption."""
        path = self.directory / "reference"

        def write() -> None:
            try:
                with path.open("w") as file:
                    file.writelines(f"{line}\n" for line in reference(max(self.expected) + 1))
            finally:
                os._exit(0)

        if not self.expected:
            return []
        os.waitpid(fork(write), 0)  # type: ignore[arg-type]
        found = path.read_text().splitlines()
        if len(found) <= max(self.expected):
            return ["the reference run failed"]
        return [f"step {step} differs" for step, line in sorted(self.expected.items()) if repr(found[step]) != line]


class RanksTrack(Track):
    """Two ranks under torchrun."""

    start_s = 6.0

    def __init__(self, directory: Path, content: Content) -> None:
        super().__init__(directory, content, num_trainers=2)

    def start(self, life: Life) -> int:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        script = str(Path(__file__).with_name("ranks.py"))
        with (self.directory / "log").open("a") as log:
            return subprocess.Popen(
                [*command, script, str(self.directory), json.dumps(asdict(life))],
                stdout=log,
                stderr=log,
                process_group=0,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            ).pid

    def _check(self, event: str, step: int, detail: str) -> list[str]:
        # Torch breaks the others' collectives off when one was killed before it could hear.
        if event == "error" and not self.has_told("trained"):
            return []
        return super()._check(event, step, detail)


def _fork(make_task: Callable[[], Task], life: Life, directory: Path) -> int:
    journal, root = Journal(directory / "journal-0"), directory / "root-0"
    return fork(lambda: live(make_task, life, root, journal))
