"""The example's trainer as a real process that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from asyncckpt.errors import CheckpointError

__all__ = ["DemoError", "DemoSettings", "TrainerProcess", "find_example"]


class DemoError(CheckpointError):
    """The demo did not show what it promises."""

    code = "demo"


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What the demo trains; the same for every run of it."""

    config: str = "small"
    steps: int = 60
    save_every: int = 6
    batch_size: int = 2
    block_size: int = 64
    seed: int = 0


def find_example() -> Path:
    """The file of ``examples/train_gpt2.py``: of this checkout, or the one that a wheel brings along.

    Raises:
        DemoError: neither is there.
    """
    here = Path(__file__).resolve().parent
    for candidate in (here.parents[2] / "examples" / "train_gpt2.py", here / "train_gpt2.py"):
        if candidate.is_file():
            return candidate
    raise DemoError(f"examples/train_gpt2.py was not found near {here}; reinstall asyncckpt")


class TrainerProcess:
    """One run of the example.

    Args:
        settings: model and schedule.
        root: checkpoint root; a run goes on from its newest durable step.
        losses: JSON lines file that the losses are appended to.
    """

    def __init__(self, settings: DemoSettings, root: Path, losses: Path) -> None:
        command = [
            *(sys.executable, "-u", str(find_example())),
            *("--config", settings.config, "--steps", str(settings.steps), "--save-every", str(settings.save_every)),
            *("--batch-size", str(settings.batch_size), "--block-size", str(settings.block_size)),
            *("--seed", str(settings.seed), "--device", "cpu", "--log-every", str(settings.save_every)),
            *("--root", str(root), "--losses", str(losses)),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def lines(self) -> Iterator[str]:
        """What it prints, as it prints it; ends when it ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield line.rstrip("\n")

    def wait_success(self) -> None:
        """Wait for its end.

        Raises:
            DemoError: it failed.
        """
        if code := self._process.wait():
            raise DemoError(f"the training process failed with exit code {code}")

    def kill(self, *, with_writer: bool) -> int | None:
        """SIGKILL to the trainer, and to its writer process too when *with_writer*; returns the writer's pid."""
        writer = _find_writer(self._process.pid)
        self._process.kill()  # first: a living trainer would start a new writer
        if with_writer and writer is not None:
            os.kill(writer, signal.SIGKILL)
            _wait_gone(writer)  # a rename under way may still take effect until then
        self._process.wait()
        return writer


def _environment() -> dict[str, str]:
    """Ours, with this very asyncckpt importable, however it was found."""
    package_home = str(Path(__file__).resolve().parents[3])
    paths = [package_home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _find_writer(trainer: int) -> int | None:
    """Pid of the writer process that *trainer* started (proc(5): field 4 of ``stat`` is the parent)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == trainer and b"asyncckpt.writer" in (stat.parent / "cmdline").read_bytes():
                return int(stat.parent.name)
        except OSError:
            continue  # it ended meanwhile
    return None


def _wait_gone(pid: int) -> None:
    """Wait until process *pid*, which is no child of ours, has ended (a zombie has)."""
    deadline = time.monotonic() + 60.0
    stat = Path(f"/proc/{pid}/stat")
    while time.monotonic() < deadline:
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "ZX":
            return
        time.sleep(0.005)
    raise DemoError(f"process {pid} is still there a minute after SIGKILL")
