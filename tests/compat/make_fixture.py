"""Writes the fixture of the present format, once, before the first release that has it.

    python tests/compat/make_fixture.py

It refuses to touch a fixture that exists: what an old release wrote can never be written again, and is
the only proof that it can still be read. `state()` says what must be in it.
"""

from __future__ import annotations

import enum
import math
import shutil
import struct
import sys
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import asyncckpt as ac
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.header import FORMAT

DATA = Path(__file__).parent / "data"
OWN = [{"name": "bytes"}, {"name": "zstd"}, {"name": "gzip"}, {"name": "crc32c"}]
STEPS: dict[int, tuple[Any, tuple[str, ...]]] = {
    1: ("small", ("model", "optimizer", "inline", "edges", "large", "views", "arrays", "lacking", "a/b", "values")),
    2: ("fast", ("types", "ramp")),
    3: ("none", ("model", "views", "lacking")),
    4: (OWN, ("ramp", "views")),
}
"""Compression and entries of the state, by step: not everything in every step, to keep the files few and small."""
METRICS = {"loss": 0.5, "nan": math.nan}
METADATA = {"data": Path("/data/train"), "seed": 2**60}


class Phase(enum.Enum):
    """An enum that readers of the fixture have imported as ``fixture_enums``."""

    WARMUP = "warmup"


Phase.__module__ = "fixture_enums"


def patterns(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Every byte in turn, as elements of a type."""
    dtype = getattr(torch, name)
    data = np.arange(math.prod(shape) * dtype.itemsize, dtype=np.uint64).astype(np.uint8)
    return torch.from_numpy(data % 2 if name == "bool" else data).view(dtype).view(shape)


def numbers(*shape: int) -> torch.Tensor:
    """Whole numbers, which no random generator of a later torch can change."""
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) / 64 - 2


class TiedModel(nn.Module):
    """Output weights are the embedding; the names are those of a small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 12)
        self.hidden = nn.Linear(12, 12)
        self.head = nn.Linear(12, 16, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(numbers(*parameter.shape))


def _optimizer(model: TiedModel) -> torch.optim.Optimizer:
    # Exact in binary floating point, so that every machine has the same moments.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": parameter.detach() / 2,
            "exp_avg_sq": parameter.detach() * 2,
        }
    return optimizer


def plain_values() -> dict[str, Any]:
    """One value of each kind that a tree can hold."""
    payload = struct.unpack(">d", bytes.fromhex("7ff8000000000abc"))[0]
    return {
        "numbers": [0, -1, 2**53, -(2**70), 0.1, -0.0, math.inf, payload, complex(1, -0.0), True, None],
        "texts": ["", "ünï", "$", "lone \ud800", b"\x00\xff"],
        "keys": {1: "int", "1": "str", None: 0, 0.5: 0, (1, ("a", None)): 0, "$": 0},
        "nested": ({"a": [(), [], {}]}, OrderedDict(b=1, a=2)),
        "others": [Phase.WARMUP, Path("a/b"), datetime(2026, 1, 2, 3, 4, 5, 6, UTC), np.float16(1.5), {3, 1, 2}],
        "torch": [torch.bfloat16, torch.device("cuda:1"), torch.Size([2, 3])],
    }


def state(step: int) -> dict[str, Any]:
    """What a step of the fixture holds."""
    model = TiedModel()
    names = [name for name in DATA_TYPES if hasattr(torch, name)]
    shared = patterns("int32", (20, 30))
    ramp = torch.zeros(1_050_000)
    ramp[::50_000] = 1.0
    everything = {
        "model": model,
        "optimizer": _optimizer(model),
        "types": {name: patterns(name, (3, 173 // getattr(torch, name).itemsize + 1)) for name in names},
        "inline": {name: patterns(name, (2, 3)) for name in names},
        "edges": {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3, dtype=torch.int16)},
        "ramp": {"sharded": ramp},
        "large": {"sharded": ramp, "wide": torch.zeros(3, 700_001, dtype=torch.bfloat16)},
        "views": {"whole": shared, "part": shared[2:5, ::3], "turned": shared.T},
        "arrays": {"half": np.arange(300, dtype=np.float16), "big_endian": np.arange(300, dtype=">i4")},
        "lacking": {"complex32": patterns("complex32", (9, 17))},
        "a/b": {"c.0": patterns("uint8", (513,)), "x" * 250: patterns("uint8", (514,))},
        "values": plain_values(),
    }
    return {name: everything[name] for name in STEPS[step][1]}


def main() -> None:
    root = DATA / f"format-{FORMAT}"
    if root.exists():
        sys.exit(f"{root} exists and must never change")
    sys.modules["fixture_enums"] = type(sys)("fixture_enums")
    sys.modules["fixture_enums"].Phase = Phase  # type: ignore[attr-defined]
    for step, (compression, _) in STEPS.items():
        with ac.Checkpointer(
            root, state(step), compression=compression, keep=ac.Keep(last=9), metadata=METADATA
        ) as ckpt:
            ckpt.save(step, metrics=METRICS, tags=[f"step{step}"]).result()
    shutil.rmtree(root / ".asyncckpt")


if __name__ == "__main__":
    main()
