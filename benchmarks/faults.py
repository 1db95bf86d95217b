"""What faults do to a checkpoint: processes killed while saving, power cut at the acknowledgement, flipped bits.

    python benchmarks/faults.py               # asyncckpt and its peers, about ten minutes; root for the power cuts

The same faults for every saver, each as its documentation has it. README.md says what each number means.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine_facts, print_table, scratch_directory, write_results
from fault_savers import SAVERS, FaultSaver, make_state, remove

_SEED = 20
_IMAGE_BYTES = 192 * 2**20


def in_child(act: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Run *act* in a fork with a session of its own; it gets a function that sends a line.

    Returns:
        Process id, and the descriptor its lines come from.
    """
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_fd)
        return pid, read_fd
    status = 1
    try:
        os.setsid()
        os.close(read_fd)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        act(lambda line: os.write(write_fd, f"{line}\n".encode()))
        status = 0
    finally:
        os._exit(status)


def load_outcome(saver: FaultSaver, step: int) -> str:
    """``ok``, ``error`` or ``wrong``: what a user gets who loads *step*."""
    into = {name: torch.zeros_like(tensor) for name, tensor in make_state(step).items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saver.load(step, into)
    except Exception:
        return "error"
    same = all(torch.equal(into[name], tensor) for name, tensor in make_state(step).items())
    return "ok" if same else "wrong"


# Kills


def train_and_save(kind: type[FaultSaver], directory: Path, first: int) -> Callable[[Callable[[str], None]], None]:
    def act(tell: Callable[[str], None]) -> None:
        saver = kind(directory)
        for step in range(first, first + 1000):
            state = make_state(step)
            tell(f"saving {step} {' '.join(map(str, saver.survivors()))}")
            saver.save(step, state)
            tell(f"acked {step} 0")

    return act


def kill_one(
    kind: type[FaultSaver], directory: Path, first: int, chance: random.Random, everything: bool
) -> dict[str, Any]:
    """Let it save from step *first* on, kill it at a random moment after its first acknowledgement."""
    pid, lines = in_child(train_and_save(kind, directory, first))
    acked, survivors = 0, []
    deadline: float | None = None
    text = b""
    saved_in = 0.0
    started = time.monotonic()
    while deadline is None or time.monotonic() < deadline:
        rest = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([lines], [], [], rest)[0]:
            break
        data = os.read(lines, 4096)
        if not data:
            raise RuntimeError(f"{kind.name} ended by itself")
        text += data
        *complete, text = text.split(b"\n")
        for line in complete:
            word, step, *pids = line.decode().split()
            if word == "saving":
                started, survivors = time.monotonic(), [int(p) for p in pids]
            else:
                acked, saved_in = int(step), time.monotonic() - started
                if deadline is None:  # anywhere in the next two saves
                    deadline = time.monotonic() + chance.uniform(0.0, 2 * saved_in)
    os.killpg(pid, signal.SIGKILL)
    if everything:
        for survivor in survivors:
            with contextlib.suppress(ProcessLookupError):
                os.kill(survivor, signal.SIGKILL)
    os.waitpid(pid, 0)
    for line in (text + _drain(lines)).decode().splitlines():
        if line.startswith("acked "):
            acked = int(line.split()[1])
    os.close(lines)
    saver = kind(directory)
    try:
        saver.settle()
        offered = saver.offered()
        newest = load_outcome(saver, offered[-1]) if offered else "nothing"
        kept = load_outcome(saver, acked) if acked in offered else "error"
    finally:
        saver.close()
    return {
        "newest": newest,
        "acked": kept,
        "gained": bool(offered) and offered[-1] > acked,
        "last": max(offered or [acked]),
    }


def _drain(fd: int) -> bytes:
    data = b""
    while select.select([fd], [], [], 0)[0] and (more := os.read(fd, 65536)):
        data += more
    return data


def kill_test(kind: type[FaultSaver], directory: Path, kills: int) -> dict[str, Any]:
    """*kills* deaths, every second one of every process, the others of the trainer's process group."""
    chance = random.Random(_SEED)
    results = []
    first = 1
    for number in range(kills):
        result = kill_one(kind, directory, first, chance, everything=number % 2 == 1)
        results.append(result)
        first = result["last"] + 1
        remove(directory)
    newest = Counter(result["newest"] for result in results)
    return {
        "kills": kills,
        "acknowledged_lost": sum(result["acked"] != "ok" for result in results),
        "newest_torn": newest["error"] + newest["wrong"],
        "save_in_flight_completed": sum(result["gained"] for result in results),
    }


# Flipped bits


def flip_test(kind: type[FaultSaver], directory: Path, flips: int) -> dict[str, int]:
    """Flip one bit at a time anywhere in one checkpoint, load it, and flip it back."""
    chance = random.Random(_SEED)
    saver = kind(directory)
    try:
        saver.save(1, make_state(1))
        root = saver.path(1)
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        sizes = [path.stat().st_size for path in files]
        outcomes: Counter[str] = Counter()
        for _ in range(flips):
            (path,) = chance.choices(files, sizes)
            position, bit = chance.randrange(path.stat().st_size), 1 << chance.randrange(8)
            with _flipped(path, position, bit):
                outcomes[load_outcome(saver, 1)] += 1
        if load_outcome(saver, 1) != "ok":
            raise AssertionError(f"{kind.name}: the bits were not put back")
    finally:
        saver.close()
    return {
        "flips": flips,
        "detected": outcomes["error"],
        "harmless": outcomes["ok"],
        "silently_wrong": outcomes["wrong"],
    }


@contextlib.contextmanager
def _flipped(path: Path, position: int, bit: int) -> Iterator[None]:
    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ bit]))

    flip()
    try:
        yield
    finally:
        flip()


# Power cuts


def power_cut_test(kind: type[FaultSaver], scratch: Path, cuts: int) -> dict[str, Any] | None:
    """Copy the image of a mounted ext4 at the moment of the acknowledgement: what the disk was told by then."""
    outcomes: Counter[str] = Counter()
    for number in range(1, cuts + 1):
        image, point = scratch / "disk.img", scratch / "disk"
        with image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        if not _run("mkfs.ext4", "-q", "-F", image):
            return None
        with _mounted(image, point) as disk:
            if disk is None:
                return None
            pid, lines = in_child(_save_one(kind, disk / "run", number))
            if not select.select([lines], [], [], 120)[0] or not os.read(lines, 100):
                raise RuntimeError(f"{kind.name} did not acknowledge its save")
            copy = scratch / "copy.img"
            shutil.copyfile(image, copy)
            os.waitpid(pid, 0)
            os.close(lines)
        with _mounted(copy, point) as disk:
            assert disk is not None
            saver = kind(disk / "run")
            try:
                outcomes["ok" if number in saver.offered() and load_outcome(saver, number) == "ok" else "lost"] += 1
            finally:
                saver.close()
    return {"cuts": cuts, "lost": outcomes["lost"]}


def _save_one(kind: type[FaultSaver], directory: Path, step: int) -> Callable[[Callable[[str], None]], None]:
    def act(tell: Callable[[str], None]) -> None:
        saver = kind(directory)
        saver.save(step, make_state(step))
        tell("acked")
        saver.close()

    return act


@contextlib.contextmanager
def _mounted(image: Path, point: Path) -> Iterator[Path | None]:
    point.mkdir(exist_ok=True)
    if not _run("mount", "-o", "loop", image, point):
        yield None
        return
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


def _run(*command: str | Path) -> bool:
    return bool(shutil.which(str(command[0]))) and not subprocess.run(command, capture_output=True).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--savers", nargs="+", choices=SAVERS, default=list(SAVERS))
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--cuts", type=int, default=5)
    parser.add_argument("--directory", help="where to write; default: here")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/faults.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # children are forked, and must not find threads that are not there

    results: dict[str, Any] = {}
    with scratch_directory(arguments.directory) as scratch:
        facts = machine_facts(scratch)
        for name in arguments.savers:
            kind = SAVERS[name]
            if importlib.util.find_spec(kind.requires) is None:
                print(f"{name}: {kind.requires} is not installed, left out", file=sys.stderr)
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = {
                # Flips last: they save in this process, and what that starts must not be forked.
                "kill": kill_test(kind, scratch / "kill", arguments.kills),
                "power_cut": power_cut_test(kind, scratch, arguments.cuts),
                "flip": flip_test(kind, scratch / "flip", arguments.flips),
            }
            remove(scratch / "flip")

    header = (
        "saver", "kills", "acknowledged lost", "newest torn", "in flight completed",
        "bits flipped", "detected", "harmless", "silently wrong", "power cuts", "acknowledged lost",
    )  # fmt: skip
    print_table(header, [_row(name, result) for name, result in results.items()])
    target = write_results(
        "faults", {"machine": facts, "options": vars(arguments), "savers": results}, arguments.output
    )
    print(f"written to {target}")


def _row(name: str, result: dict[str, Any]) -> list[str]:
    cut = result["power_cut"] or {"cuts": "-", "lost": "-"}
    return [name, *map(str, (*result["kill"].values(), *result["flip"].values(), *cut.values()))]


if __name__ == "__main__":
    main()
