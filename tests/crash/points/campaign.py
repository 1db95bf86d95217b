"""Strikes one save after the other and checks after each what the user was promised."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from plan import Fault, Point, Scenario, Strike
from tracing import Call, Tracer, read_calls

import asyncckpt as ac
from asyncckpt.repository import clean_partials
from asyncckpt.stores import LocalStore

__all__ = ["Broken", "Campaign"]

NUM_SMALL = 12
LARGE_ELEMENTS = 5 * 2**20 // 4 + 77
NUM_KEPT = 2
_TIMEOUT_S = 60
_POOL_ELEMENTS = LARGE_ELEMENTS + 100_003


class Broken(AssertionError):
    """A promise was not kept, or the fault did not strike where it was planned."""


class _Ear(logging.Handler):
    """Hears what the writer says, and what becomes of steps."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._pruned: set[int] = set()
        self._num_failures = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "retention failed" in record.getMessage():
            with self._changed:
                self._num_failures += 1
                self._changed.notify_all()

    def on_event(self, event: ac.Event) -> None:
        if event.name == "checkpoint.pruned" and event.step is not None:
            with self._changed:
                self._pruned.add(event.step)
                self._changed.notify_all()

    def expecting_retention(self, steps: set[int]) -> Callable[[], None]:
        """Remember what retention has done so far; the result waits until it removed *steps* or failed.

        Without *steps* there is nothing to wait for: the writer is silent about removing nothing.
        """
        before = self._num_failures

        def wait() -> None:
            with self._changed:
                ended = self._changed.wait_for(
                    lambda: steps <= self._pruned or self._num_failures > before, timeout=_TIMEOUT_S
                )
            _require(ended, "retention neither removed what it should nor failed")

        return wait


class Campaign:
    """One trainer with one root, saving again and again while its writer is struck.

    Args:
        directory: for the root and the logs of strace; exists.
    """

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self._log = directory / "strace.log"
        self._store = LocalStore(self.root)
        self._pool = torch.randn(_POOL_ELEMENTS, generator=torch.Generator().manual_seed(0))
        self._state = {
            "big": torch.empty(LARGE_ELEMENTS),
            "inline": torch.empty(5),
            "frozen": torch.empty(3000),
            **{f"layer.{number}": torch.empty(200 + 70 * number) for number in range(NUM_SMALL)},
        }
        self._ear = _Ear()
        logging.getLogger("asyncckpt.writer").addHandler(self._ear)
        self._durable: list[int] = []
        self._compared: set[str] = set()
        self._step = 1  # the next to be saved; one that failed is saved again
        self._is_writer_at_rest = False
        self._checkpointer = self._start()
        # How often `stores.placement` tries another place depends on the disk; without the flag it never does.
        subprocess.run(["chattr", "-T", self.root / ".asyncckpt/partial"], stderr=subprocess.DEVNULL, check=False)
        self._save_undisturbed()  # a writer imports a few modules during its first save: those are calls too

    def _start(self) -> ac.Checkpointer:
        # One encode thread: then one thread makes all calls, and in the same order every time.
        return ac.Checkpointer(
            self.root,
            self._state,
            keep=ac.Keep(last=NUM_KEPT),
            writer=ac.Writer(threads=1, nice=0),
            on_event=self._ear.on_event,
        )

    def close(self) -> None:
        """End the trainer; what it leaves must be what the next one expects."""
        self._checkpointer.close()
        _require(not self._partials(), f"left behind at the end: {self._partials()}")
        self._start().close()
        self._check_offered()

    def record(self, scenario: Scenario) -> list[Call]:
        """The calls of an undisturbed save."""
        self._prepare(scenario)
        tracer = Tracer(self._checkpointer.health().writer_pid, self._log)
        self._save_undisturbed()
        tracer.detach()
        return read_calls(self._log, self.root, self._durable[-1])

    def strike(self, strike: Strike) -> str:
        """Let *strike* happen to one save, and check everything.

        Returns:
            The outcome of the save: "durable" or "failed".

        Raises:
            Broken: see there.
        """
        point, fault = strike.point, strike.fault
        self._prepare(point.scenario)
        step = self._step
        before = self._durable[-NUM_KEPT:]
        tracer = Tracer(self._checkpointer.health().writer_pid, self._log, fault.inject(point))
        outcome = self._save_struck(point, fault, tracer)
        self._check_struck(point, fault, step)
        offered = self._check_offered()
        _require(set(before if outcome == "failed" else self._durable[-NUM_KEPT:]) <= offered, "a durable step is gone")
        _require(offered <= set(self._durable), "a step that failed is offered")
        self._check_space(fault, point)
        self._save_undisturbed()
        _require(self._check_offered() == set(self._durable[-NUM_KEPT:]), "retention did not catch up")
        return outcome

    def _prepare(self, scenario: Scenario) -> None:
        """Bring the root into the state that *scenario* starts from, and the writer to rest."""
        while not self._is_writer_at_rest:
            self._save_undisturbed()
        if scenario == "fresh":
            for info in self._checkpointer.checkpoints():
                self._checkpointer.delete(info.step)
            self._durable.clear()

    def _save(self) -> ac.SaveFuture:
        for tensor, content in self._content(self._step):
            tensor.copy_(content)
        return self._checkpointer.save(self._step)

    def _content(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each tensor and what it holds at *step*: something new, but for one, whose file is linked."""
        start = step * 17 % (_POOL_ELEMENTS - LARGE_ELEMENTS)
        starts = {name: 0 if name == "frozen" else start for name in self._state}
        return [
            (tensor, self._pool[starts[name] : starts[name] + tensor.numel()]) for name, tensor in self._state.items()
        ]

    def _save_undisturbed(self) -> None:
        superfluous = self._superfluous()
        wait_retention = self._ear.expecting_retention(superfluous)
        self._save().result(_TIMEOUT_S)
        self._note_durable()
        wait_retention()
        # Otherwise it may still be looking whether there is anything to remove.
        self._is_writer_at_rest = bool(superfluous)

    def _note_durable(self) -> None:
        self._durable.append(self._step)
        self._step += 1

    def _superfluous(self) -> set[int]:
        """What retention removes after one more save."""
        offered = sorted(info.step for info in self._checkpointer.checkpoints())
        return set(offered[: max(len(offered) + 1 - NUM_KEPT, 0)])

    def _save_struck(self, point: Point, fault: Fault, tracer: Tracer) -> str:
        wait_retention = self._ear.expecting_retention(self._superfluous())
        saving = self._save()
        error = saving.exception(_TIMEOUT_S)
        if error is None:
            self._note_durable()
        is_killed = fault.code is None
        if is_killed:
            tracer.wait_gone()
        # Who dies in the middle of retention is replaced, but retention goes on after the next save only.
        if error is None and not (is_killed and point.is_acknowledged):
            wait_retention()
        if is_killed:
            _require(error is None, f"the writer that replaced the killed one failed: {error!r}")
        else:
            tracer.detach()
            self._check_error(point, fault, error)
        return saving.outcome

    def _check_error(self, point: Point, fault: Fault, error: BaseException | None) -> None:
        if error is None:
            survivable = point.is_acknowledged or (fault.name == "EIO once")
            _require(survivable, "the save is durable although the fault is permanent")
            return
        _require(not point.is_acknowledged, f"retention made the save fail: {error!r}")
        _require(isinstance(error, ac.StorageError), f"the save failed with {error!r}")
        _require(error.errno == fault.code, f"errno is {error.errno}")  # type: ignore[attr-defined]

    def _check_struck(self, point: Point, fault: Fault, step: int) -> None:
        """The log of strace, not hope, tells whether the fault struck where it was planned."""
        calls = read_calls(self._log, self.root, step)
        named = [call for call in calls if call.name == point.call and call.number == point.number]
        _require(len(named) == 1 and named[0].path == point.path, f"the writer did not get there: {named}")
        (call,) = named
        if fault.code is None:
            _require(call == calls[-1] and call.is_unanswered, "the writer lived on")
            return
        num_struck = self._log.read_text().count("(INJECTED)")
        _require(call.is_struck, "the fault did not strike")
        _require(num_struck == 1 or fault.is_persistent, f"the fault struck {num_struck} times")

    def _check_offered(self) -> set[int]:
        """Every offered step is whole and holds what was staged for it."""
        nonces = {info.step: info.nonce for info in self._checkpointer.checkpoints()}
        for step, nonce in nonces.items():
            report = self._checkpointer.verify(step)
            _require(report.ok, f"step {step} is torn: {report.damaged}")
            if nonce not in self._compared:  # from then on, digests tell whether it is still the same
                self._compare(step)
                self._compared.add(nonce)
        return set(nonces)

    def _compare(self, step: int) -> None:
        loaded = self._checkpointer.load(step)
        for name, (_, content) in zip(self._state, self._content(step), strict=True):
            _require(torch.equal(loaded[name], content), f"step {step} holds other contents in {name}")

    def _check_space(self, fault: Fault, point: Point) -> None:
        # Removing needs directories to be opened: while that fails for good, nothing can be removed.
        may_leave = fault.is_persistent and point.call == "openat"
        _require(may_leave or not self._partials(), f"left behind: {self._partials()}")
        clean_partials(self._store)  # as the next run does first
        _require(not self._partials(), f"not even the next run removes {self._partials()}")
        names = {path.name for path in self.root.glob("step-*")}
        offered = {Path(info.path).name for info in self._checkpointer.checkpoints()}
        _require(names == offered, f"the next run leaves {names - offered}")

    def _partials(self) -> list[str]:
        return [path.name for path in (self.root / ".asyncckpt" / "partial").iterdir()]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Broken(message)
