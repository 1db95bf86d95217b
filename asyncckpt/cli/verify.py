"""``asyncckpt verify``: reads whole steps and compares them with the digests taken when they were written."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from asyncckpt.cli.exits import ExitCode
from asyncckpt.cli.output import format_bytes, is_terminal, print_json, printable
from asyncckpt.cli.roots import LATEST, find_step, newest_step, open_catalog
from asyncckpt.errors import InvalidOptionError
from asyncckpt.model import VerifyReport
from asyncckpt.repository import Catalog, CommittedStep, verify_step

__all__ = ["VerifySettings", "parse_sample", "run"]

_MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class _Timed:
    report: VerifyReport
    seconds: float


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """How to verify.

    Attributes:
        threads: files read at once; None takes the CPUs, up to 8.
        deep: whether to decode what is read.
        sample: fraction of the bytes to read.
        seed: what draws the files of a sample.
    """

    threads: int | None = None
    deep: bool = False
    sample: float = 1.0
    seed: int = 0


def parse_sample(text: str) -> float:
    """The fraction that ``"5%"`` or ``"0.05"`` means.

    Raises:
        InvalidOptionError: it is neither.
    """
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise InvalidOptionError(f"--sample takes a percentage such as '5%', not {text!r}") from None


def run(root: str, which: str | None, settings: VerifySettings, *, as_json: bool) -> ExitCode:
    """Verify and print; `ExitCode.CORRUPT` when anything is damaged.

    Args:
        root: directory of the checkpoints.
        which: a step number, a tag, ``latest``, or None for every step. The latest is the newest that
            is there, not the newest that is whole: damage is what is being looked for.
        settings: how to verify.
        as_json: print JSON.

    Raises:
        InvalidOptionError: the sample is no fraction.
        NothingCommittedError: nothing is committed in *root*.
        CheckpointNotFoundError: no step answers to *which*.
        UnsupportedFormatError: written by a newer version.
        StorageError: the storage cannot be read.
    """
    chosen = _choose(open_catalog(root), which)
    results = _verify_all(chosen, settings)
    if as_json:
        timed = list(results)
        print_json({"root": root, "ok": all(one.report.ok for one in timed), "steps": [_entry(one) for one in timed]})
    else:
        timed = [_print_result(one) for one in _with_progress(results, len(chosen))]
    return ExitCode.OK if all(one.report.ok for one in timed) else ExitCode.CORRUPT


def _choose(catalog: Catalog, which: str | None) -> list[CommittedStep]:
    if which is None:
        return [CommittedStep(catalog.store, step) for step in reversed(catalog.steps())]
    if which == LATEST:
        return [newest_step(catalog)]
    if which.isdecimal():
        return [CommittedStep(catalog.store, int(which))]
    return [find_step(catalog, which)]


def _verify_all(steps: Iterable[CommittedStep], settings: VerifySettings) -> Iterator[_Timed]:
    verify = _load_deep() if settings.deep else verify_step
    threads = settings.threads or min(_MAX_THREADS, os.cpu_count() or 1)
    for committed in steps:
        started = time.perf_counter()
        report = verify(committed, threads, sample=settings.sample, seed=settings.seed)
        yield _Timed(report, time.perf_counter() - started)


def _load_deep() -> Callable[..., VerifyReport]:
    # Needs the codecs, which take long to import.
    from asyncckpt.restore.deep import verify_deep

    return verify_deep


def _with_progress(results: Iterator[_Timed], count: int) -> Iterator[_Timed]:
    """Pass *results* on, with a bar on stderr if somebody looks at it; they then come when it is gone.

    A live bar takes over stdout, so that what is printed meanwhile would end up on stderr.
    """
    if not (is_terminal() and sys.stderr.isatty()):
        yield from results
        return
    from rich.console import Console
    from rich.progress import track

    yield from list(track(results, "verifying", total=count, console=Console(stderr=True), transient=True))


def _entry(timed: _Timed) -> dict[str, Any]:
    report = timed.report
    return {
        "step": report.step,
        "ok": report.ok,
        "deep": report.deep,
        "sample": report.sample,
        "seed": report.seed,
        "num_files": report.num_files,
        "checked_bytes": report.checked_bytes,
        "seconds": round(timed.seconds, 3),
        "damaged": [asdict(damage) for damage in report.damaged],
    }


def _print_result(timed: _Timed) -> _Timed:
    report = timed.report
    verdict = "ok" if report.ok else f"DAMAGED, {len(report.damaged)} bad"
    how = "read and decoded" if report.deep else "read"
    files = f"{report.num_files} files, {format_bytes(report.checked_bytes)} {how} in {timed.seconds:.2f} s"
    drawn = f", a sample of {report.sample:.3g} of the bytes (seed {report.seed})" if report.sample < 1 else ""
    print(f"step {report.step}: {verdict}; {files}{drawn}")
    for damage in report.damaged:
        tensors = f" [{', '.join(damage.tensors)}]" if damage.tensors else ""
        print(printable(f"  {damage.key}: {damage.reason}{tensors}"))
    return timed
