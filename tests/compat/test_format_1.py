"""Format 1 stays readable, and is what ``docs/format.md`` says: a second reader finds the same in it."""

from __future__ import annotations

import ast
import math
import shutil
import struct
import warnings
from collections import OrderedDict
from datetime import datetime
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import asyncckpt as ac

ROOT = Path(__file__).parent / "data" / "format-1"
STEPS = [1, 2, 3, 4]


@pytest.fixture(params=STEPS)
def step(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# -- comparing -------------------------------------------------------------------------------------


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


def exact(value: Any) -> Any:
    """*value* in a form that is equal for equal types, bits and order only, of both readers."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype)[len("torch.") :], tuple(value.shape), bytes_of(value)
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value, dtype=value.dtype.newbyteorder("<"))
        return "tensor", array.dtype.name, array.shape, array.tobytes()
    if kind.__name__ == "Tensor":
        return "tensor", *value
    if kind.__name__ == "Other":
        return value.tag, exact(value.members)
    if isinstance(value, float):
        return "float", struct.pack(">d", value)
    if isinstance(value, complex):
        return "complex", struct.pack(">dd", value.real, value.imag)
    if isinstance(value, (dict, OrderedDict)):
        items = [(exact(key), exact(item)) for key, item in value.items()]
        return kind.__name__, items, exact(dict(getattr(value, "_metadata", None) or {}) or None)
    if isinstance(value, Enum):
        return "enum", exact({"type": f"{kind.__module__}:{kind.__qualname__}", "name": value.name})
    if isinstance(value, PurePath):
        return "path", exact({"value": str(value)})
    if isinstance(value, datetime):
        return "datetime", exact({"value": value.isoformat(), "fold": value.fold})
    if isinstance(value, (torch.dtype, torch.device)):
        name = str(value).removeprefix("torch.")
        return f"torch.{kind.__name__}", exact({"name": name})
    if isinstance(value, torch.Size):
        return "torch.Size", exact({"items": list(value)})
    if isinstance(value, set):
        return "custom", exact({"type": "builtins:set", "value": sorted(value)})
    if isinstance(value, (list, tuple)):
        return kind.__name__, [exact(item) for item in value]
    return kind.__name__, value


def assert_same(one: Any, other: Any) -> None:
    """Compare entry by entry: what differs is then short enough to read."""
    assert list(one) == list(other)
    for name in one:
        assert exact(one[name]) == exact(other[name]), name


def state_dicts(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in state.items()}


# -- the fixture -----------------------------------------------------------------------------------


def load(root: Path, step: int) -> dict[str, Any]:
    """`asyncckpt.load` without what it adds to the state dict of an optimizer: the names of its parameters."""
    loaded = ac.load(root, step)
    if "optimizer" in loaded:
        names = loaded["optimizer"].pop("param_fqns")
        assert set(names) <= set(loaded["model"])
    return loaded


def test_the_fixture_is_loaded_exactly(fixture: Any, step: int) -> None:
    assert_same(load(ROOT, step), state_dicts(fixture.state(step)))


def test_the_fixture_is_whole(fixture: Any, step: int) -> None:
    catalogue = ac.open(ROOT)
    report = catalogue.verify(step)
    assert report.ok
    assert report.num_files > 10
    info = {info.step: info for info in catalogue.checkpoints()}[step]
    assert (info.format, info.tags, info.kind, info.world_size) == (1, (f"step{step}",), "regular", 1)
    assert exact(dict(info.metrics)) == exact(fixture.METRICS)
    assert dict(info.metadata) == fixture.METADATA
    assert set(STEPS) == {info.step for info in catalogue.checkpoints()} == fixture.STEPS.keys()


def test_the_fixture_is_restored_in_place(fixture: Any, step: int, tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "root")
    wanted = fixture.state(step)
    live = fixture.state(step)
    for value in live.values():
        _blank(value)
    with ac.Checkpointer(tmp_path / "root", live, keep=ac.Keep(last=9)) as ckpt:
        found = ckpt.restore(step)
    assert found.step == step
    assert exact(state_dicts(live)) == exact(state_dicts(wanted))
    if "model" in live:
        assert live["model"].head.weight is live["model"].embedding.weight


def _blank(value: Any) -> None:
    with torch.no_grad():
        if isinstance(value, torch.nn.Module):
            for parameter in value.parameters():
                parameter.zero_()
        elif isinstance(value, torch.optim.Optimizer):
            value.state.clear()
        elif isinstance(value, dict):
            for item in value.values():
                if isinstance(item, torch.Tensor) and item.numel():
                    item.view(torch.uint8).zero_() if item.is_contiguous() and item.dim() else item.zero_()


def test_ties_and_views_come_back_tied(step: int) -> None:
    loaded = ac.load(ROOT, step)
    if "model" in loaded:
        weights = loaded["model"]
        assert weights["head.weight"].data_ptr() == weights["embedding.weight"].data_ptr()
    if "views" in loaded:
        views = loaded["views"]
        views["whole"][2, 3] = 77
        assert views["part"][0, 1] == views["turned"][3, 2] == 77


def test_the_fixture_is_small() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 100_000


def test_the_fixture_is_never_written_again(fixture: Any) -> None:
    with pytest.raises(SystemExit, match="must never change"):
        fixture.main()


# -- the second reader -----------------------------------------------------------------------------


def test_the_second_reader_shares_no_code_with_the_package() -> None:
    tree = ast.parse((Path(__file__).parent / "reader.py").read_text())
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imports if name.split(".")[0] in ("asyncckpt", "torch", "zarr")]


@pytest.mark.usefixtures("fixture")
def test_both_readers_find_the_same_in_the_fixture(reader: Any, step: int) -> None:
    assert_same(reader.Step(ROOT / f"step-{step:08d}").state(), load(ROOT, step))


@pytest.mark.usefixtures("fixture")
def test_the_second_reader_reads_metrics_and_metadata(reader: Any, fixture: Any, step: int) -> None:
    found = reader.Step(ROOT / f"step-{step:08d}")
    assert exact(found.value(found.header["metrics"])) == exact(fixture.METRICS)
    assert exact(found.value(found.header["metadata"])) == exact(fixture.METADATA)


def test_both_readers_find_the_same_bits(reader: Any, fixture: Any, compression: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)

    def noise(name: str, *shape: int) -> torch.Tensor:
        dtype = getattr(torch, name)
        top = 2 if name == "bool" else 256
        data = generator.integers(0, top, math.prod(shape) * dtype.itemsize, np.uint8)
        return torch.from_numpy(data).view(dtype).view(shape)

    names = list(fixture.state(2)["types"])
    model = fixture.TiedModel()
    optimizer = torch.optim.SGD([{"params": model.hidden.parameters(), "lr": 0.5}, {"params": [model.head.weight]}],
                                lr=0.1, momentum=0.9)  # fmt: skip
    model.head(model.hidden(model.embedding(torch.arange(16)))).sum().backward()
    optimizer.step()
    big = noise("bfloat16", 3, 2, 700_001)
    state = {
        "model": model,
        "optimizer": optimizer,
        "chunks": {name: noise(name, 7, 90) for name in names},
        "inline": {name: noise(name, 2, 3) for name in names},
        "scalars": {name: noise(name, 1).view(()) for name in names},
        "shards": {"rows": noise("float32", 1030, 1021), "bytes": noise("uint8", 4_200_000)},
        "views": {"whole": big, "part": big[1:, 1, 5::3]},
        "lacking": {"chunk": noise("complex32", 20, 17), "inline": noise("complex32", 1).view(())},
        "arrays": [np.arange(9), np.arange(400, dtype=ml_dtypes.bfloat16), np.float32("nan"), np.bool_(True)],
        "quantized": quantized(),
        "values": fixture.plain_values(),
    }  # fmt: skip
    with ac.Checkpointer(tmp_path, state, compression=compression, writer=ac.Writer(kind="thread")) as ckpt:
        info = ckpt.save(12).result(timeout=100)
    loaded = load(tmp_path, 12)
    found = reader.Step(Path(info.path)).state()
    assert_quantized(found.pop("quantized"), loaded.pop("quantized"))
    del state["quantized"]
    assert_same(found, loaded)
    assert_same(loaded, state_dicts(state))


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to remove it; its checkpoints stay
        return torch.quantize_per_tensor(torch.arange(-300.0, 300.0) / 8, 0.5, 3, torch.qint8)


def assert_quantized(found: Any, loaded: torch.Tensor) -> None:
    assert torch.equal(loaded.int_repr(), quantized().int_repr())
    assert (found.tag, found.members["dtype"]) == ("quantized", "qint8")
    assert (found.members["scale"], found.members["zero_point"]) == (0.5, 3)
    assert found.members["values"].data == bytes_of(loaded.int_repr())


@pytest.fixture(params=["fast", "small", "none", "own"])
def compression(request: pytest.FixtureRequest, fixture: Any) -> Any:
    return fixture.OWN if request.param == "own" else request.param


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_the_second_reader_reads_whether_it_is_finite(reader: Any, tmp_path: Path, value: float) -> None:
    state = {"t": torch.full((200,), value)}
    with ac.Checkpointer(tmp_path, state, staging=ac.Staging(check_finite=True)) as ckpt:
        info = ckpt.save(1).result(60)
    found = reader.Step(Path(info.path))
    assert found.header["finite"] is info.finite is not math.isnan(value)
    assert_same(found.state(), load(tmp_path, 1))


@pytest.mark.parametrize("name", ["zarr.json", "index/rank-00000/zarr.json", "index/rank-00000/c.0",
                                  "state/ramp/sharded/zarr.json", "state/ramp/sharded/c.0"])  # fmt: skip
def test_the_second_reader_notices_damage(reader: Any, tmp_path: Path, name: str) -> None:
    step = tmp_path / "step-00000002"
    shutil.copytree(ROOT / step.name, step)
    data = bytearray((step / name).read_bytes())
    data[len(data) // 2] ^= 1
    (step / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged or not format 1"):
        reader.Step(step).state()
