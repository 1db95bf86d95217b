"""One rank under torchrun, with a root and a journal of its own: ``ranks.py DIRECTORY LIFE``."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from content import Content
from journal import Journal
from told import Fills, Life, train

NUM_WORKERS = 2


class Ranks(Fills):
    """Fills that take all ranks for each step."""

    def steps(self, first: int) -> Iterator[int]:
        everybody = torch.tensor([first, -first])
        dist.all_reduce(everybody, op=dist.ReduceOp.MAX)
        if everybody.tolist() != [first, -first]:
            raise AssertionError(f"the ranks go on at different steps: {everybody.tolist()}")
        for step in super().steps(first):
            dist.all_reduce(torch.zeros(1))
            yield step


def main() -> int:
    directory, life = Path(sys.argv[1]), Life(**json.loads(sys.argv[2]))
    rank = os.environ["RANK"]
    journal = Journal(directory / f"journal-{rank}")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo")
        train(Ranks(Content(), num_workers=NUM_WORKERS), life, directory / f"root-{rank}", journal)
        dist.destroy_process_group()
    except BaseException:
        journal.note("error", 0, traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
