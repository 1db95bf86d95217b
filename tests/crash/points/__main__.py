"""Runs a campaign, or one share of it, and writes what came of it as JSON.

``python tests/crash/points --output results.json --sample 40 --share 0/2``
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE / "allow_tracing"), os.environ.get("PYTHONPATH")]))

from campaign import Campaign  # noqa: E402
from plan import SCENARIOS, Point, Scenario, plan_points, plan_strikes  # noqa: E402
from tracing import TracingRefusedError  # noqa: E402

Outcomes = dict[str, dict[str, Counter[str]]]
_REFUSED = 77  # exit status of a skipped test in automake's convention


def main() -> int:
    """Run; returns the exit status."""
    arguments = _parse()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        try:
            results = _run(Path(directory), arguments)
        except TracingRefusedError as error:
            print(error, file=sys.stderr)
            return _REFUSED
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=1, help="strike every N-th time")
    parser.add_argument("--share", default="0/1", help="which part of the strikes, I/N")
    parser.add_argument("--directory", type=Path, default=None, help="where to save checkpoints")
    parser.add_argument("--only", default="", help="strikes whose description contains this")
    return parser.parse_args()


def _run(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    campaign = Campaign(directory)
    points = [point for scenario in SCENARIOS for point in _points_of(campaign, scenario)]
    share, shares = map(int, arguments.share.split("/"))
    strikes = [strike for strike in plan_strikes(points, arguments.sample) if arguments.only in str(strike)]
    outcomes: Outcomes = {}
    failures: list[str] = []
    # One scenario after the other: getting from one to the other costs two saves.
    for strike in sorted(strikes, key=lambda strike: strike.point.scenario)[share::shares]:
        counter = outcomes.setdefault(strike.point.call, {}).setdefault(strike.fault.name, Counter())
        try:
            counter[campaign.strike(strike)] += 1
        except Exception as error:  # a broken promise, or an error nobody expected: the campaign goes on
            counter["broken"] += 1
            failures.append(f"{strike}: {error!r}")
            campaign = _anew(directory / f"after-{len(failures)}")
    campaign.close()
    return {"points": [asdict(point) for point in points], "outcomes": outcomes, "failures": failures}


def _points_of(campaign: Campaign, scenario: Scenario) -> list[Point]:
    """The points of *scenario*, recorded twice: a save that calls something else each time cannot be struck."""
    first, second = (plan_points(scenario, campaign.record(scenario)) for _ in range(2))
    if first != second:
        different = next(pair for pair in zip_longest(first, second) if pair[0] != pair[1])
        raise SystemExit(f"two saves made different calls: {different}")
    return first


def _anew(directory: Path) -> Campaign:
    directory.mkdir()
    return Campaign(directory)


if __name__ == "__main__":
    sys.exit(main())
