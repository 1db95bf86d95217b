"""Kills trainers and writers at random moments, and holds what is left against what was promised."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audit import Audit, audit_root, is_unlocked, num_partials
from content import Content
from journal import Journal, JournalReader, Note
from procs import fork, kill, open_arenas, open_children, reap_all
from trainer import CLOSE_SIGNAL, Life, live

__all__ = ["Soak", "Summary"]

KEPT = 3
_END_TIMEOUT_S = 60.0
_NEWS_TIMEOUT_S = 30.0


@dataclass
class Summary:
    """What happened. Everything under ``lost_*``, ``torn``, ``left_*`` and ``errors`` ought to be zero.

    Attributes:
        kills: moments at which somebody was killed, by victim; ``both`` is one moment.
        lives: trainers that were started.
        saves: by what their trainer saw of them: staged, acked, failed (streamed ones whose writer died).
        lost_acknowledged: steps acknowledged and not there.
        lost_staged: steps staged by a trainer that was the only one to be killed, and not there.
        torn: damaged or wrong values in anything on offer.
        left_processes: writers that did not end.
        left_locks: roots that stayed locked.
        left_partials: unfinished steps where none may be.
        left_arenas: staging memory files beyond those in use.
        errors: exceptions in a trainer, exits of a writer that was not killed.
        violations: all of the above in words.
    """

    kills: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    saves: Counter[str] = field(default_factory=Counter)
    lost_acknowledged: int = 0
    lost_staged: int = 0
    torn: int = 0
    left_processes: int = 0
    left_locks: int = 0
    left_partials: int = 0
    left_arenas: int = 0
    errors: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values())

    def violate(self, counter: str, what: str) -> None:
        """Count and record something that must not happen."""
        setattr(self, counter, getattr(self, counter) + 1)
        self.violations.append(f"life {self.lives}, kill {self.num_kills}: {counter}: {what}")

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        counters = {"kills": dict(self.kills), "saves": dict(self.saves)}
        return {"num_kills": self.num_kills, **vars(self), **counters}


class Soak:
    """One campaign in one root.

    Args:
        directory: empty; holds root and journal.
        seed: decides who is killed and when, as far as a machine repeats itself.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self._root = directory / "root"
        self._rng = random.Random(seed)
        self._content = Content()
        self._journal = Journal(directory / "journal")
        self._reader = JournalReader(directory / "journal")
        self._acked: set[int] = set()
        self._promised = -1  # every step up to here must be there, or have been pruned for newer ones
        self._staged = -1  # the newest step that this trainer has staged
        self._is_open = False  # this trainer has the root
        self._killed_writers: set[int] = set()
        self.summary = Summary()

    def run(self, kills: int, seconds: float) -> Summary:
        """Go on until that many kills or seconds, then let everything end and look at all of it."""
        started = time.monotonic()
        while self.summary.num_kills < kills and time.monotonic() - started < seconds:
            self._run_life()
        self._settle(everything=True)
        self.summary.seconds = round(time.monotonic() - started, 1)
        return self.summary

    def _run_life(self) -> None:
        rng = self._rng
        life = Life.draw(rng)
        self._staged, self._is_open = -1, False
        self.summary.lives += 1
        trainer = fork(lambda: live(life, self._root, self._journal, self._content))
        num_writer_kills = rng.choice((0, 0, 1, 2, 4))
        for _ in range(num_writer_kills):
            self._wait_for_a_moment()
            self._kill_writer(trainer)
        for _ in range(rng.choice((1, 3))):
            self._wait_for_a_moment()
        self._check_arenas(trainer, life)
        victim = rng.choice(("trainer", "trainer", "both", "close"))
        self._end_life(trainer, victim)
        self._read_journal()
        if victim == "trainer" and not num_writer_kills:
            self._promise_staged()
        # The next life may begin while the writer of this one is still at work: the lock keeps them apart.
        if rng.random() < 0.5:
            self._settle(is_tidy=self._is_open and victim != "both" and not num_writer_kills)
        else:
            self._check(audit_root(self._root, self._content, everything=False))

    def _wait_for_a_moment(self) -> None:
        """Any moment, the start included; or one in the midst of saves."""
        if self._rng.random() < 0.3:
            time.sleep(self._rng.uniform(0, 0.6))
            return
        before = self.summary.saves.total()
        deadline = time.monotonic() + _NEWS_TIMEOUT_S
        while self.summary.saves.total() == before and time.monotonic() < deadline:
            time.sleep(0.002)
            self._read_journal()
        time.sleep(self._rng.uniform(0, 0.12))

    def _kill_writer(self, trainer: int) -> None:
        self.summary.kills["writer"] += kill(open_children(trainer))

    def _end_life(self, trainer: int, victim: str) -> None:
        if victim == "close":
            os.kill(trainer, CLOSE_SIGNAL)
            self._expect_exit(trainer, 0)
            return
        self.summary.kills[victim] += 1
        writers = open_children(trainer) if victim == "both" else []
        first = self._rng.choice(("trainer", "writer"))
        if first == "writer":
            kill(writers)
        os.kill(trainer, signal.SIGKILL)
        self._expect_exit(trainer, -signal.SIGKILL)
        if first == "trainer" and writers:
            time.sleep(self._rng.choice((0.0, self._rng.uniform(0, 0.1))))  # while it finishes
            kill(writers)

    def _expect_exit(self, trainer: int, expected: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(trainer, 0)[1])
        if code != expected:
            self.summary.violate("errors", f"the trainer exited with {code} instead of {expected}")

    # -- what must hold ------------------------------------------------------------------------

    def _read_journal(self) -> None:
        for note in self._reader.read():
            self._take_note(note)

    def _take_note(self, note: Note) -> None:
        match note.event:
            case "staged":
                self._staged = max(self._staged, note.number)
            case "acked":
                self._acked.add(note.number)
                self._promised = max(self._promised, note.number)
            case "failed" if "streamed" not in note.detail:
                self.summary.violate("errors", f"step {note.number} failed: {note.detail}")
            case "error":
                self.summary.violate("errors", note.detail)
            case "opened":
                self._is_open = True
                if note.number:
                    self.summary.violate("left_partials", f"{note.number} after a start")
            case "restored":
                self._check_restored(note)
        if note.event in ("staged", "acked", "failed"):
            self.summary.saves[note.event] += 1

    def _promise_staged(self) -> None:
        self._promised = max(self._promised, self._staged)

    def _check_restored(self, note: Note) -> None:
        self._require_promised(note.number, "restored")
        if note.detail != "''":
            self.summary.violate("torn", f"restored step {note.number}: {note.detail}")

    def _require_promised(self, newest: int, where: str) -> None:
        if newest < self._promised:
            kind = "lost_acknowledged" if self._promised in self._acked else "lost_staged"
            self.summary.violate(kind, f"{where} step {newest} is the newest, {self._promised} was promised")

    def _check(self, audit: Audit) -> None:
        for what in audit.torn:
            self.summary.violate("torn", what)
        for step in self._acked.difference(audit.steps):
            if sum(other > step for other in audit.steps) < KEPT:
                self.summary.violate("lost_acknowledged", f"step {step}; there are {audit.steps}")

    def _settle(self, *, is_tidy: bool = False, everything: bool = False) -> None:
        """Everybody ends by himself; nothing stays but what a killed writer could not clean up."""
        codes, left = reap_all(_END_TIMEOUT_S)
        if left:
            self.summary.violate("left_processes", f"{left}")
        for pid, code in codes.items():
            if code not in (0, -signal.SIGKILL):
                self.summary.violate("errors", f"writer {pid} exited with {code}")
        if not is_unlocked(self._root):
            self.summary.violate("left_locks", "the root is locked")
        if is_tidy and (count := num_partials(self._root)):
            self.summary.violate("left_partials", f"{count} after the writer has ended")
        audit = audit_root(self._root, self._content, everything=everything)
        self._check(audit)
        self._require_promised(max(audit.steps, default=-1), "offered")

    def _check_arenas(self, trainer: int, life: Life) -> None:
        allowed = life.slots * (2 if life.memory_limit else 1)
        if (count := open_arenas(trainer)) > allowed:
            self.summary.violate("left_arenas", f"the trainer has {count} open, {allowed} are in use")
