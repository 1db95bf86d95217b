"""Every question, one after another: tables, JSON files, pictures, and which targets are met.

python benchmarks/suite.py                        # sixteen minutes
python benchmarks/suite.py --size tiny            # seconds, and only shows that it runs
python benchmarks/suite.py --only restore         # one question
python benchmarks/suite.py --only                 # none: tables and targets of the results there are
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import durable
import growth
import lost_time
import many_tensors
import overhead
import predict
import restore
import targets
from common import RESULTS, machine_facts, scratch_directory, warn_if_busy, write_results
from peers import PEERS
from questions import Setup

QUESTIONS: dict[str, ModuleType] = {
    "lost_time": lost_time,
    "durable": durable,
    "restore": restore,
    "many_tensors": many_tensors,
    "overhead": overhead,
    "growth": growth,
}
"""Each has ``measure(setup)``, ``show(result)`` and a title."""


def ask(name: str, setup: Setup, results: Path) -> None:
    """Answer one question and write its file."""
    started = time.perf_counter()
    print(f"{name} ...", file=sys.stderr, flush=True)
    facts = machine_facts(setup.directory)
    result = QUESTIONS[name].measure(setup)
    took_s = time.perf_counter() - started
    write_results(name, {"machine": facts, **setup.facts(), "took_s": took_s, **result}, str(results / f"{name}.json"))


def read(results: Path, size: str) -> dict[str, Any]:
    """Every answer there is for a state of that size."""
    found = {}
    for name in QUESTIONS:
        path = results / f"{name}.json"
        if path.exists():
            answer = json.loads(path.read_text())
            if answer.get("size") == size and "took_s" in answer:  # others are of a benchmark that was run alone
                found[name] = answer
    return found


def report(found: dict[str, Any], asked: Sequence[str], results: Path) -> None:
    """Print a table for each question *asked*, and judge and draw everything found."""
    for name in asked:
        answer = found[name]
        machine = answer["machine"]
        print(f"\n# {QUESTIONS[name].TITLE}\n")
        QUESTIONS[name].show(answer)
        print(
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
            f"{machine['filesystem']['type']}, Linux {machine['kernel']}, {machine['commit'][:12]}; "
            f"{answer['repetitions']} repetitions unless stated, {answer['took_s']:.0f} s"
        )
    if predict.is_possible(found):
        print(f"\n# {predict.TITLE}\n")
        predicted = predict.measure_from(found)
        predict.show(predicted)
        write_results("predict", predicted, str(results / "predict.json"))
    verdicts = targets.judge(found)
    print("\n# Targets\n")
    targets.show(verdicts)
    commits = {name: answer["machine"]["commit"] for name, answer in found.items()}
    write_results("targets", {"commits": commits, "targets": verdicts}, str(results / "targets.json"))
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no pictures", file=sys.stderr)
    else:
        from plots import draw

        draw(found, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "124M"), default="124M")
    parser.add_argument("--only", nargs="*", choices=QUESTIONS, default=list(QUESTIONS), help="questions to ask")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repetitions", type=int, default=5, help="of everything, after a warm-up, unless stated")
    parser.add_argument("--alone-steps", type=int, default=60, help="training steps without a save before each save")
    parser.add_argument("--no-large", action="store_true", help="leave out the tensor of 8 GB")
    parser.add_argument("--directory", help="where checkpoints go; default: here")
    parser.add_argument("--results", type=Path, help="where the results go; default: benchmarks/results")
    arguments = parser.parse_args()
    results = arguments.results or RESULTS
    results.mkdir(parents=True, exist_ok=True)
    with scratch_directory(arguments.directory) as directory:
        setup = Setup(
            directory,
            arguments.size,
            arguments.repetitions,
            arguments.peers,
            arguments.alone_steps,
            not arguments.no_large,
        )
        warn_if_busy(machine_facts(directory))  # once: later the load is our own
        for name in arguments.only:
            ask(name, setup, results)
    found = read(results, arguments.size)
    report(found, arguments.only or list(found), results)


if __name__ == "__main__":
    main()
