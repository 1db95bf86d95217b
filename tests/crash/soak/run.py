"""Kills trainer and writer of a run at random moments and tells whether a promise was broken.

    python tests/crash/soak/run.py --kills 1000 --minutes 30

Exit code 1 when anything was lost, torn or left behind. Needs Linux (pidfd, a child subreaper).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# numpy and torch would start threads on import, and this process forks.
os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
REPOSITORY = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]


def main() -> int:
    """Run the campaign that the command line asks for."""
    arguments = _parse()
    import torch

    torch.set_num_threads(1)
    from driver import Soak
    from procs import adopt_orphans

    _import_all()
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="asyncckpt-soak-", dir=arguments.directory) as directory:
        soak = Soak(Path(directory), arguments.seed)
        result: dict[str, Any] = {"seed": arguments.seed, **soak.run(arguments.kills, arguments.minutes * 60).as_dict()}
        if arguments.results:
            _write(arguments.results, {**result, "machine": _machine(Path(directory))})
    print(json.dumps(result, indent=1))
    return 1 if result["violations"] else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="end after so many kills")
    parser.add_argument("--minutes", type=float, default=30.0, help="or after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", help="where the checkpoints go; default: the directory for temporary files")
    parser.add_argument("--results", type=Path, help="write a summary with facts about the machine here")
    return parser.parse_args()


def _import_all() -> None:
    """Import now, once, what every trainer needs, instead of after each fork."""
    import asyncckpt as ac

    for name in ac.__all__:
        getattr(ac, name)


def _machine(directory: Path) -> dict[str, Any]:
    from common import machine_facts

    return machine_facts(directory)


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
