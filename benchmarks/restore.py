"""Restoring in place, from the page cache and from the disk, and one tensor out of all."""

from __future__ import annotations

import shutil
from typing import Any

import states
import torch
from common import Spread, print_table, seconds_of
from memory import return_freed_memory
from peers import PEERS, Saver
from probes import drop_from_page_cache
from questions import Setup
from workers import Tell, run_in_process

TITLE = "Restoring in place, and loading one tensor"
SAVERS = (
    "torch.save", "torch.save mmap", "dcp.save", "torch_checkpointing", "safetensors", "tensorstore",
    "asyncckpt fast", "asyncckpt none", "asyncckpt small",
)  # fmt: skip
SMALL, LARGE = "model/h.0.ln_1.weight", "model/h.0.mlp.c_fc.weight"
"""The tensors that are loaded alone: 3 KB, and 9.4 MB."""


def restore_repeatedly(tell: Tell, peer: str, setup: Setup) -> dict[str, Any]:
    """Save once, restore so many times warm and so many times cold, and check what came back."""
    directory = setup.place(peer)
    directory.mkdir()
    state = states.make_state(setup.size)
    expected = [tensor.clone() for tensor in state.tensors()]
    return_freed_memory()
    saver = PEERS[peer](directory, state)
    saver.save(1).wait()
    for tensor in state.tensors():
        tensor.zero_()

    def restore() -> None:
        saver.restore(1)

    restore()
    _check(state.tensors(), expected, peer)
    warm_s = [seconds_of(restore) for _ in range(setup.repetitions)]
    cold_s = []
    for _ in range(setup.repetitions):
        how = drop_from_page_cache(directory, wholly=not setup.is_tiny)
        cold_s.append(seconds_of(restore))
    one = _load_one(saver, state, setup.repetitions)
    saver.close()
    shutil.rmtree(directory)
    return {
        "saver": peer,
        "state_bytes": state.num_bytes,
        "warm_s": Spread(warm_s).as_dict(),
        "cold_s": Spread(cold_s).as_dict(),
        "cold_how": how,
        "one": one,
    }


def _load_one(saver: Saver, state: states.State, repetitions: int) -> dict[str, Any] | None:
    found = {}
    for name, path in (("small", SMALL), ("large", LARGE)):
        try:
            num_bytes = saver.load_one(1, path).nbytes
        except NotImplementedError:
            return None
        seconds = [seconds_of(lambda path=path: saver.load_one(1, path)) for _ in range(repetitions)]
        found[name] = {"num_bytes": num_bytes, "seconds": Spread(seconds).as_dict()}
    return found


def _check(found: list[torch.Tensor], expected: list[torch.Tensor], peer: str) -> None:
    if not all(map(torch.equal, found, expected)):
        raise AssertionError(f"{peer} did not restore what it saved")


def measure(setup: Setup) -> dict[str, Any]:
    """All savers, one after another."""
    savers = [run_in_process(restore_repeatedly, peer, setup, log=setup.log) for peer in setup.choose(SAVERS)]
    return {"state_bytes": savers[0]["state_bytes"], "savers": savers}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    reference = next((saver for saver in result["savers"] if saver["saver"] == "torch.save"), None)
    rows = []
    for saver in result["savers"]:
        cells = [saver["saver"]]
        for name in ("warm_s", "cold_s"):
            spread = Spread(saver[name]["values"])
            ratio = f"{spread.median / reference[name]['median']:.2f}" if reference else ""
            cells += [spread.text(2), ratio]
        for name in ("small", "large"):
            seconds = saver["one"] and saver["one"][name]["seconds"]["values"]
            cells.append(Spread([1e3 * second for second in seconds]).text(1) if seconds else "whole item")
        rows.append(cells)
    print_table(("saver", "warm s", "x torch.load", "cold s", "x torch.load", "3 KB ms", "9.4 MB ms"), rows)
    print(f"\nstate {result['state_bytes'] / 1e6:.0f} MB, cold by {result['savers'][0]['cold_how']}")
