"""Checks a recorded trace in a process of its own, with whatever asyncckpt is on its path; see `mutants`.

``python -m crashstates states|damage TRACE BUDGET`` prints the broken promises as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from crashstates.campaign import explore, load_history
from crashstates.corruption import accepted_damage


def main() -> None:
    what, trace, budget = sys.argv[1:]
    history = load_history(Path(trace))
    if what == "damage":
        violations = accepted_damage(history)[1]
    else:
        violations = explore(history, int(budget), stop_at_first=True).violations
    print(json.dumps(violations))


main()
