"""GPT-2 124M + AdamW through each preset: equal bit for bit, and readable without asyncckpt.

    python benchmarks/roundtrip.py

Any difference, any warning of zarr-python and any unexpected or missing array ends it with an error.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from common import machine_facts, print_table, scratch_directory, seconds_of, write_results
from state import HEADER_BYTES, TrainingState, build_state, iter_tensors, new_state
from torch import Tensor

import asyncckpt as ac
import asyncckpt.interop  # registers bfloat16 and float8 with zarr-python

_PRESETS = ("fast", "small", "none")
_MAX_FILES_PER_ARRAY = 2.2
# Arrays of every kind of element beside the float32 of the model: small, and large enough for shards.
_EXTRA_DTYPES = (torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
_EXTRA_ROWS = (16, 20_000)
_EXTRA_WIDTH = 300


def make_extras() -> dict[str, Tensor]:
    """Arrays of the remaining data types; bit patterns at random, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(0)
    extras = {}
    for dtype in _EXTRA_DTYPES:
        for rows in _EXTRA_ROWS:
            num_bytes = rows * _EXTRA_WIDTH * dtype.itemsize
            upper = 2 if dtype is torch.bool else 256
            bits = torch.randint(upper, (num_bytes,), dtype=torch.uint8, generator=generator)
            extras[f"{str(dtype).removeprefix('torch.')}-{rows}"] = bits.view(dtype).view(rows, _EXTRA_WIDTH)
    return extras


def expected_arrays(state: TrainingState, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a step must hold: every tensor above 512 bytes, by the key format 1 gives it."""
    arrays = {f"state/model/{name}": parameter.detach() for name, parameter in state.model.named_parameters()}
    for name, parameter in state.model.named_parameters():
        for slot, value in state.optimizer.state[parameter].items():
            if slot != "step":
                arrays[f"state/optimizer/{slot}/{name}"] = value
    arrays |= {f"state/extras/{name}": tensor for name, tensor in extras.items()}
    return {key: tensor for key, tensor in arrays.items() if tensor.nbytes > HEADER_BYTES}


def check_equal(what: str, found: Tensor | np.ndarray, expected: Tensor) -> None:
    """Raise unless *found* has the shape and the bits of *expected*."""
    if tuple(found.shape) != tuple(expected.shape):
        raise AssertionError(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    if not np.array_equal(_bits(found), _bits(expected)):
        raise AssertionError(f"{what}: bits differ")


def _bits(array: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(array, Tensor):
        return array.detach().contiguous().flatten().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def check_states(what: str, found: Any, expected: Any) -> None:
    """Raise unless two nested states hold the same tensors under the same paths."""
    found_tensors, expected_tensors = dict(iter_tensors(found)), dict(iter_tensors(expected))
    if found_tensors.keys() != expected_tensors.keys():
        raise AssertionError(f"{what}: differing paths {sorted(found_tensors.keys() ^ expected_tensors.keys())[:5]}")
    for path, tensor in expected_tensors.items():
        if found_tensors[path].dtype != tensor.dtype:
            raise AssertionError(f"{what} {path}: {found_tensors[path].dtype} instead of {tensor.dtype}")
        check_equal(f"{what} {path}", found_tensors[path], tensor)


def check_with_zarr(step: Path, expected: Mapping[str, Tensor]) -> None:
    """List and read everything with zarr-python; its warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        members = zarr.open_group(step, mode="r").members(max_depth=None)
        arrays = {key: member for key, member in members if isinstance(member, zarr.Array) and key.startswith("state/")}
        if arrays.keys() != expected.keys():
            raise AssertionError(f"arrays differ: {sorted(arrays.keys() ^ expected.keys())[:5]}")
        for key, tensor in expected.items():
            check_equal(f"zarr-python {key}", np.asarray(arrays[key][...]), tensor)


def check_with_tensorstore(step: Path, expected: Mapping[str, Tensor]) -> None:
    """Read every array with TensorStore."""
    import tensorstore

    for key, tensor in expected.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{step / key}/"}}
        check_equal(f"TensorStore {key}", tensorstore.open(spec, read=True).result().read().result(), tensor)


def measure(preset: Any, state: TrainingState, extras: dict[str, Tensor], size: str, root: Path) -> dict[str, Any]:
    """One preset: two saves, restore into a new model and optimizer, load, and both foreign readers."""
    with ac.Checkpointer(root, {**state.objects(), "extras": extras}, keep=ac.Keep(last=1), compression=preset) as ckpt:
        ckpt.save(1).result()
        future = ckpt.save(2)
        info = future.result()
        fresh = new_state(size, seed=1)
        fresh_extras = {name: torch.zeros_like(tensor) for name, tensor in extras.items()}
        restore_s = seconds_of(lambda: ckpt.restore(2, state={**fresh.objects(), "extras": fresh_extras}))
    check_states("restore", {**fresh.state_dict(), "extras": fresh_extras}, {**state.state_dict(), "extras": extras})

    loaded: dict[str, Any] = {}
    load_s = seconds_of(lambda: loaded.update(ac.load(root, 2)))
    check_states("load", loaded, {**state.state_dict(), "extras": extras})

    expected = expected_arrays(state, extras)
    step = Path(info.path)
    check_with_zarr(step, expected)
    check_with_tensorstore(step, expected)
    num_files = sum(path.is_file() for path in step.rglob("*"))
    if num_files > _MAX_FILES_PER_ARRAY * len(expected):
        raise AssertionError(f"{num_files} files for {len(expected)} arrays")
    return {
        "preset": preset,
        "num_arrays": len(expected),
        "num_files": num_files,
        "raw_bytes": info.raw_bytes,
        "stored_bytes": info.stored_bytes,
        "blocked_s": future.stats.blocked_s,
        "durable_s": future.stats.durable_s,
        "restore_s": restore_s,
        "load_s": load_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "124M"), default="124M")
    parser.add_argument("--directory", help="where to write; default: here")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/roundtrip.json")
    arguments = parser.parse_args()

    state, extras = build_state(arguments.size), make_extras()
    results = []
    with scratch_directory(arguments.directory) as directory:
        facts = machine_facts(directory)
        for preset in _PRESETS:
            results.append(measure(preset, state, extras, arguments.size, directory / preset))
    rows = [
        [
            result["preset"],
            f"{result['num_files'] / result['num_arrays']:.2f}",
            f"{result['stored_bytes'] / result['raw_bytes']:.3f}",
            *(f"{result[name]:.2f}" for name in ("durable_s", "restore_s", "load_s")),
        ]
        for result in results
    ]
    print_table(("preset", "files per array", "stored/raw", "durable s", "restore s", "load s"), rows)
    print(
        f"\n{results[0]['num_arrays']} arrays, {results[0]['raw_bytes'] / 1e6:.0f} MB: restored, loaded, read by "
        "zarr-python and by TensorStore, every bit equal"
    )
    target = write_results("roundtrip", {"machine": facts, "presets": results}, arguments.output)
    print(f"written to {target}")


if __name__ == "__main__":
    main()
