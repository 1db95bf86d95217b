"""The full campaign: far more states of every scenario, and every planted bug."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crashstates.campaign import explore, load_history
from crashstates.corruption import accepted_damage
from crashstates.mutants import Mutant, MutantResult, run_mutant
from crashstates.reader_mutants import EQUIVALENT_READER_MUTANTS, READER_MUTANTS
from crashstates.writer_mutants import EQUIVALENT_WRITER_MUTANTS, WRITER_MUTANTS

__all__ = ["ALL_MUTANTS", "SCENARIOS", "run_full"]

ALL_MUTANTS = (*WRITER_MUTANTS, *READER_MUTANTS, *EQUIVALENT_WRITER_MUTANTS, *EQUIVALENT_READER_MUTANTS)
SCENARIOS = tuple((scenario, flush) for scenario in ("direct", "pipeline") for flush in ("syncfs", "each"))

_STATES = 15_000
_STATES_PER_MUTANT = 6_000  # all systematic states, about 4,000, and some random ones


def run_full(workspace: Path, real_trace: Callable[[str, str], Path]) -> dict[str, Any]:
    """Everything; takes minutes to an hour.

    Args:
        workspace: an empty directory.
        real_trace: records a scenario in a flush mode with the real package.

    Returns:
        The summary that ``benchmarks/results/crash_states.json`` holds.
    """
    campaigns = [_campaign(scenario, flush, workspace, real_trace) for scenario, flush in SCENARIOS]
    num_damaged, accepted = accepted_damage(load_history(real_trace("direct", "syncfs")))
    results = []
    runs = [(mutant, flush) for mutant in ALL_MUTANTS for flush in mutant.flushes]
    for number, (mutant, flush) in enumerate(runs):
        results.append(run_mutant(mutant, flush, workspace / f"mutant-{number}", _STATES_PER_MUTANT, real_trace))
        print(results[-1].describe(), flush=True)
    bugs = [result for result in results if not result.mutant.equivalent]
    return {
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "campaigns": campaigns,
        "states": sum(campaign["num_states"] for campaign in campaigns),
        "checks": sum(campaign["num_checks"] for campaign in campaigns),
        "violations": sum(len(campaign["violations"]) for campaign in campaigns),
        "damaged_steps": num_damaged,
        "damage_accepted": accepted,
        "mutants": len(bugs),
        "mutants_caught": sum(result.evidence is not None for result in bugs),
        "equivalent_mutants": len(results) - len(bugs),
        "equivalent_mutants_silent": sum(result.as_expected for result in results if result.mutant.equivalent),
        "mutant_results": [_row(result) for result in results],
    }


def _campaign(scenario: str, flush: str, workspace: Path, real_trace: Callable[[str, str], Path]) -> dict[str, Any]:
    scratch = workspace / f"{scenario}-{flush}"
    scratch.mkdir(parents=True)
    outcome = explore(load_history(real_trace(scenario, flush)), _STATES, scratch=scratch)
    print(f"{scenario} {flush}: {outcome.num_states} states, {len(outcome.violations)} violations", flush=True)
    return {"scenario": scenario, "flush": flush, **asdict(outcome)}


def _row(result: MutantResult) -> dict[str, Any]:
    mutant: Mutant = result.mutant
    row = {"mutant": mutant.name, "flush": result.flush, "caught": result.evidence is not None}
    return row | ({"equivalent": mutant.equivalent} if mutant.equivalent else {"evidence": result.evidence})
