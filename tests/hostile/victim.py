"""Who reads the tampered steps. As a program: reads every root named on stdin with little memory, and reports."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import asyncckpt as ac
from asyncckpt.cli import ls, show

STEP = 5
_HEADROOM_BYTES = 1024 * 2**20


def make_state(seed: int) -> dict[str, Any]:
    """One value of every kind that reads differently; the same seed gives the same state."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(40, 30)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.Adam(linear.parameters())
    linear(torch.ones(40)).sum().backward()
    optimizer.step()
    big = torch.full((1500, 1000), float(seed))
    integers = torch.randint(0, 100, (40, 30), generator=generator, dtype=torch.int8)
    scales, zero_points = torch.rand(40, generator=generator).double() + 1, torch.zeros(40, dtype=torch.int64)
    return {
        "linear": linear,
        "optimizer": optimizer,
        "big": big,
        "corner": big[:100, :100],
        "half": torch.randn(700, generator=generator).to(torch.bfloat16),
        "array": np.arange(500) + seed,
        "quantized": _quantize(integers, scales, zero_points),
        "plain": {"list": [1, "two", (3.0, None)], "tensors": [torch.arange(200) + seed], "small": torch.tensor(1.5)},
    }


def _quantize(integers: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still there
        return torch._make_per_channel_quantized_tensor(integers, scales, zero_points, 0)


def save(root: Path, step: int, seed: int = 1) -> None:
    ac.save_sync(root, step, make_state(seed))


def fingerprint(value: Any) -> Any:
    """A comparable form of a state, exact to the bit."""
    if isinstance(value, (nn.Module, torch.optim.Optimizer)):
        return fingerprint(value.state_dict())
    if isinstance(value, torch.Tensor):
        plain = value.detach().contiguous()
        raw = plain.int_repr() if plain.is_quantized else plain.reshape(-1).view(torch.uint8)
        return str(plain.dtype), tuple(plain.shape), raw.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: fingerprint(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(part) for part in value]
    return repr(value)


def read(root: Path) -> dict[str, str]:
    """How every way of reading the step in *root* ended: ``"ok"``, ``"damaged"``, or a code of an error."""
    quiet = contextlib.redirect_stdout(io.StringIO())
    catalogue = ac.open(root)
    outcomes = {
        "load": _outcome(lambda: catalogue.load(STEP)),
        "restore": _outcome(lambda: _restore(root)),
        "verify": _outcome(lambda: catalogue.verify(STEP)),
        "deep": _outcome(lambda: catalogue.verify(STEP, deep=True)),
        "recover": _outcome(lambda: catalogue.recover(STEP)),
        "checkpoints": _outcome(catalogue.checkpoints),
    }
    with quiet:
        outcomes["show"] = _outcome(lambda: show.run(str(root), str(STEP), [], as_json=False))
        outcomes["show --json"] = _outcome(lambda: show.run(str(root), str(STEP), [], as_json=True))
        outcomes["ls"] = _outcome(lambda: ls.run(str(root), as_json=False))
    return outcomes


def _restore(root: Path) -> None:
    state = make_state(2)
    before = fingerprint(state)
    with ac.Checkpointer(root, state, writer=ac.Writer(kind="thread")) as checkpointer:
        try:
            checkpointer.restore(STEP)
        except ac.CheckpointError:
            assert fingerprint(state) == before, "a restore that failed changed the state"
            raise


def _outcome(read: Callable[[], Any]) -> str:
    started = time.process_time()
    try:
        found = read()
        outcome = "ok" if getattr(found, "ok", True) else "damaged"
    except ac.CheckpointError as error:
        outcome = error.code
    except Exception as error:
        outcome = f"CRASHED with {error!r}"
    seconds = time.process_time() - started
    return outcome if seconds < 1 else f"{outcome} after {seconds:.1f} s"


def main() -> None:
    roots = json.load(sys.stdin)
    read(Path(next(iter(roots.values()))))  # imports and threads are no one's fault
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _HEADROOM_BYTES,) * 2)
    for name, root in roots.items():
        print(json.dumps([name, read(Path(root))]), flush=True)


if __name__ == "__main__":
    main()
