"""Which tensors can be stored, and that their bits survive."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from state_helpers import build_state
from torch import nn

from asyncckpt.errors import CorruptCheckpointError, StateMismatchError, UnsupportedStateError
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.state.apply import plan_apply
from asyncckpt.state.capture import Capture, capture

Saved = tuple[Any, dict[str, torch.Tensor]]


def save(state: dict[str, Any]) -> Saved:
    captured = capture(state)
    check_leaves(captured)
    tree = json.loads(json.dumps(captured.tree, allow_nan=False))
    return tree, {leaf.key: leaf.tensor.cpu().clone(memory_format=torch.contiguous_format) for leaf in captured.leaves}


def check_leaves(captured: Capture) -> None:
    assert len({leaf.key for leaf in captured.leaves}) == len(captured.leaves)
    for leaf in captured.leaves:
        assert type(leaf.tensor) is torch.Tensor
        assert not leaf.tensor.requires_grad
        assert tuple(leaf.tensor.shape) == leaf.shape
        assert leaf.tensor.element_size() == DATA_TYPES[leaf.data_type].itemsize


def restore(state: dict[str, Any], saved: Saved, **options: Any) -> None:
    tree, tensors = saved
    plan = plan_apply(state, tree, **options)
    scratch = {key: tensors[key].clone() for key in plan.keys}
    plan.execute(scratch)
    for tensor in scratch.values():  # whoever kept the memory now holds nonsense
        tensor.view(torch.uint8).fill_(0xA5) if tensor.dim() else tensor.fill_(1)


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def noise(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = int(np.prod(shape)) * dtype.itemsize
    generator = torch.Generator().manual_seed(count)
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape) if shape else data.view(dtype)[0]


IN_ZARR = [name for name in DATA_TYPES if hasattr(torch, name)]
ELSEWHERE = [name for name in ("complex32", "float4_e2m1fn_x2", "bits8", "bits16", "uint4") if hasattr(torch, name)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ComplexHalf support is experimental")
        warnings.filterwarnings("ignore", message="torch.quantize_per")
        yield


@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("name", [*IN_ZARR, *ELSEWHERE])
def test_every_type_keeps_its_bits(name: str, shape: tuple[int, ...]) -> None:
    tensor = noise(getattr(torch, name), *shape)
    live = {"t": tensor.view(torch.uint8).clone().view(tensor.dtype) if shape else noise(tensor.dtype)}
    saved = save({"t": tensor})
    built = build_state(*saved)["t"]
    assert built.dtype is tensor.dtype
    assert built.shape == tensor.shape
    assert bits(built) == bits(tensor)
    restore(live, saved)
    assert bits(live["t"]) == bits(tensor)


@pytest.mark.parametrize("name", IN_ZARR)
def test_types_of_zarr_are_stored_under_their_names(name: str) -> None:
    (leaf,) = capture({"t": noise(getattr(torch, name), 2, 3)}).leaves
    assert leaf.data_type == name
    assert leaf.torch_dtype is None
    assert leaf.shape == (2, 3)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_types_are_stored_as_bytes_with_the_name_beside(name: str) -> None:
    dtype = getattr(torch, name)
    (leaf,) = capture({"t": noise(dtype, 2, 3)}).leaves
    assert leaf.data_type == "uint8"
    assert leaf.torch_dtype == name
    assert leaf.shape == (2, 3 * dtype.itemsize)


def test_a_scalar_of_another_type_has_one_axis() -> None:
    (leaf,) = capture({"t": noise(torch.complex32)}).leaves
    assert leaf.shape == (4,)


def test_other_types_are_restored_from_a_reader_that_gives_the_torch_type() -> None:
    tensor = noise(torch.complex32, 2, 3)
    tree, _ = save({"t": tensor})
    assert bits(build_state(tree, {"state/t": tensor.clone()})["t"]) == bits(tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12.0).view(3, 4).t(),
        lambda: torch.arange(24.0)[::2],
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.arange(3.0).expand(4, 3),
        lambda: torch.randn(3, dtype=torch.complex64).conj(),
        lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
        lambda: torch.randn(3, requires_grad=True),
        lambda: torch.randn(3, requires_grad=True) * 2,
        lambda: nn.Parameter(torch.randn(3, dtype=torch.complex128)),
        lambda: nn.Parameter(torch.randn(3), requires_grad=False),
    ],
    ids=["transposed", "strided", "channels_last", "expanded", "conj", "neg", "grad", "graph", "complex", "frozen"],
)
def test_any_memory_layout_is_stored_by_value(make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    saved = save({"t": tensor})
    assert torch.equal(build_state(*saved)["t"], tensor.detach().resolve_conj().resolve_neg())
    live = {"t": torch.zeros(tensor.shape, dtype=tensor.dtype)}
    restore(live, saved)
    assert torch.equal(live["t"], tensor)


def test_restoring_writes_into_the_live_tensor_whatever_its_layout() -> None:
    saved = save({"t": torch.arange(12.0).view(3, 4)})
    whole = torch.zeros(4, 6)
    live = {"t": whole[:, ::2].t()}
    restore(live, saved)
    assert torch.equal(whole[:, ::2].t(), torch.arange(12.0).view(3, 4))
    assert torch.count_nonzero(whole[:, 1::2]) == 0


def test_a_live_leaf_that_requires_grad_is_written_and_stays_a_leaf() -> None:
    live = {"t": torch.zeros(3, requires_grad=True)}
    restore(live, save({"t": torch.ones(3)}))
    assert torch.equal(live["t"].detach(), torch.ones(3))
    assert live["t"].is_leaf
    assert live["t"].requires_grad


def test_capture_shares_memory_with_the_live_tensor() -> None:
    tensor = nn.Parameter(torch.zeros(3))
    (leaf,) = capture({"t": tensor}).leaves
    assert leaf.tensor.data_ptr() == tensor.data_ptr()
    assert leaf.tensor._version == tensor._version


def test_an_inference_tensor_is_stored_and_restored() -> None:
    with torch.inference_mode():
        tensor, live = torch.arange(3.0), {"t": torch.zeros(3)}
    restore(live, save({"t": tensor}))
    assert live["t"].tolist() == [0, 1, 2]


class Tagged(torch.Tensor):
    """A subclass that only adds behaviour, such as torchvision's images."""


def test_a_subclass_with_its_own_memory_is_stored_as_a_tensor() -> None:
    tagged = torch.arange(3.0).as_subclass(Tagged)
    saved = save({"t": tagged})
    assert type(build_state(*saved)["t"]) is torch.Tensor
    live = {"t": torch.zeros(3).as_subclass(Tagged)}
    restore(live, saved)
    assert type(live["t"]) is Tagged
    assert live["t"].tolist() == [0, 1, 2]


def per_tensor() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 3, torch.qint8)


def per_channel() -> torch.Tensor:
    scales = torch.rand(3, dtype=torch.float64) + 0.1
    return torch.quantize_per_channel(torch.randn(3, 4), scales, torch.arange(3), 0, torch.quint8)


@pytest.mark.parametrize("make", [per_tensor, per_channel])
def test_quantised_tensors_keep_values_and_scales(make: Callable[[], torch.Tensor]) -> None:
    tensor, live = make(), {"t": make()}
    saved = save({"t": tensor})
    built = build_state(*saved)["t"]
    restore(live, saved)
    for found in (built, live["t"]):
        assert found.dtype is tensor.dtype
        assert torch.equal(found.int_repr(), tensor.int_repr())
        assert torch.equal(found.dequantize(), tensor.dequantize())


def test_quantised_tensors_of_another_scheme_do_not_fit() -> None:
    with pytest.raises(StateMismatchError, match="qint8"):
        plan_apply({"t": per_channel()}, capture({"t": per_tensor()}).tree)


def test_a_quantised_tensor_whose_integers_have_the_wrong_type_is_damage() -> None:
    tree, tensors = save({"t": per_tensor()})
    tree["t"]["values"]["dtype"] = "uint8"
    tensors["state/t/values"] = tensors["state/t/values"].view(torch.uint8)
    with pytest.raises(CorruptCheckpointError, match="integers of"):
        build_state(tree, tensors)


def float_qparams() -> torch.Tensor:
    return torch.quantize_per_channel(torch.randn(3, 4), torch.ones(3), torch.zeros(3), 0, torch.quint8)


def freed() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def fake() -> torch.Tensor:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (jagged, "keeps its values in other tensors"),
        (lambda: torch.ones(3, device="meta"), "meta device"),
        (freed, "storage was freed"),
        (fake, "keeps its values in other tensors"),
        (lambda: nn.LazyLinear(3).weight, "not initialised"),
        (float_qparams, "quantised tensor"),
    ],
    ids=["coo", "csr", "nested", "jagged", "meta", "freed", "fake", "lazy", "float_qparams"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:The PyTorch API of nested tensors")
def test_tensors_without_plain_values_are_refused_by_path(make: Callable[[], torch.Tensor], reason: str) -> None:
    with pytest.raises(UnsupportedStateError, match=reason) as raised:
        capture({"run": {"odd": make()}})
    assert str(raised.value).startswith("run/odd is a")
    assert raised.value.fields["key"] == "run/odd"


@pytest.mark.parametrize(
    ("live", "reason"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.ones(3, 3, device="meta"), "meta device"),
        (lambda: torch.ones(3).expand(3, 3), "share memory"),
        (lambda: nn.LazyLinear(3).weight, "lazy parameter"),
        (lambda: torch.ones(9), r"\[3, 3\], here it is float32 \[9\]"),
        (lambda: torch.ones(3, 3, dtype=torch.float64), "here it is float64"),
    ],
    ids=["sparse", "meta", "expanded", "lazy", "shape", "dtype"],
)
def test_live_tensors_that_cannot_take_the_values_are_reported(live: Callable[[], torch.Tensor], reason: str) -> None:
    with pytest.raises(StateMismatchError, match=reason) as raised:
        plan_apply({"t": live()}, capture({"t": torch.ones(3, 3)}).tree)
    assert raised.value.fields["mismatched"] == ["t"]


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_dtensor_of_one_rank_is_its_local_tensor(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    model = nn.Linear(3, 4)
    model.weight = nn.Parameter(distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)]))
    optimizer = torch.optim.AdamW([model.weight])
    model.weight.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    optimizer.step()
    before = model.weight.to_local().clone()
    moment = optimizer.state[model.weight]["exp_avg"].to_local().clone()
    saved = save({"model": model, "optimizer": optimizer})
    with torch.no_grad():
        model.weight.zero_()
    restore({"model": model, "optimizer": optimizer}, saved)
    assert torch.equal(model.weight.to_local(), before)
    fresh = torch.optim.AdamW([model.weight])
    restore({"model": model, "optimizer": fresh}, saved)
    assert isinstance(fresh.state[model.weight]["exp_avg"], DTensor)
    assert torch.equal(fresh.state[model.weight]["exp_avg"].to_local(), moment)
    model.register_load_state_dict_post_hook(lambda *_: None)
    with torch.no_grad():
        model.weight.zero_()
    restore({"model": model, "optimizer": fresh}, saved)
    assert torch.equal(model.weight.to_local(), before)


def test_a_dtensor_over_several_ranks_is_refused() -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = DeviceMesh("cpu", [0, 1])
        tensor = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
        with pytest.raises(UnsupportedStateError, match="several ranks"):
            capture({"t": tensor})
    finally:
        dist.destroy_process_group()


ARRAY_TYPES = ["bool", "int8", "uint16", "int64", "float16", "float64", "complex64", ">f4", ">i8", ">c16"]


@pytest.mark.parametrize("dtype", ARRAY_TYPES)
def test_numpy_arrays_keep_type_and_values(dtype: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    saved = save({"a": array})
    built = build_state(*saved)["a"]
    assert built.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(built, array)
    live = {"a": np.zeros_like(array)}
    restore(live, saved)
    np.testing.assert_array_equal(live["a"], array)
    assert live["a"].dtype == array.dtype


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_numpy_arrays_of_ml_dtypes_keep_their_bits(name: str) -> None:
    import ml_dtypes

    array = np.arange(1, 13, dtype=np.float32).reshape(3, 4).astype(getattr(ml_dtypes, name))
    saved = save({"a": array})
    assert saved[0]["a"]["dtype"] == name
    assert saved[1]["state/a"].dtype is getattr(torch, name)
    built = build_state(*saved)["a"]
    assert built.dtype == array.dtype
    assert built.tobytes() == array.tobytes()
    live = {"a": np.zeros_like(array)}
    restore(live, saved)
    assert live["a"].tobytes() == array.tobytes()


def test_odd_numpy_memory_is_stored_by_value(tmp_path: Any) -> None:
    read_only = np.arange(4.0)
    read_only.flags.writeable = False
    mapped = np.memmap(tmp_path / "map", dtype=np.int32, mode="w+", shape=(3,))
    mapped[:] = [1, 2, 3]
    state = {
        "reversed": np.arange(4)[::-1],
        "read_only": read_only,
        "broadcast": np.broadcast_to(np.arange(3), (2, 3)),
        "zero_dim": np.array(3.5),
        "empty": np.zeros((0, 2)),
        "mapped": mapped,
    }
    built = build_state(*save(state))
    for name, array in state.items():
        np.testing.assert_array_equal(built[name], array)
    assert type(built["mapped"]) is np.ndarray


def test_the_same_array_twice_is_stored_once_and_comes_back_as_one() -> None:
    array = np.arange(3)
    saved = save({"a": array, "b": array})
    assert list(saved[1]) == ["state/a"]
    built = build_state(*saved)
    assert built["a"] is built["b"]


@pytest.mark.parametrize(
    "array",
    [
        np.array([{}], dtype=object),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, dtype=[("a", "i4")]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros(2, dtype=np.longdouble),
        np.ma.masked_array([1, 2], [True, False]),
    ],
    ids=["object", "str", "bytes", "structured", "time", "longdouble", "masked"],
)
def test_arrays_without_numbers_are_refused_by_path(array: Any) -> None:
    if array.dtype.itemsize == 8 and array.dtype == np.longdouble:
        pytest.skip("longdouble is float64 here")
    with pytest.raises(UnsupportedStateError, match=r"^run/a (is|holds) a"):
        capture({"run": {"a": array}})


@pytest.mark.parametrize(
    ("live", "reason"),
    [
        (np.zeros(4), r"float64 \[4\]"),
        (np.zeros(3, dtype=np.float32), "numpy float32"),
        (np.broadcast_to(np.zeros(1), (3,)), "read-only"),
    ],
)
def test_live_arrays_that_cannot_take_the_values_are_reported(live: Any, reason: str) -> None:
    with pytest.raises(StateMismatchError, match=reason):
        plan_apply({"a": live}, capture({"a": np.zeros(3)}).tree)


SCALARS = [np.float64(1.5), np.float32("nan"), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1 - 2j)]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: type(scalar).__name__)
def test_numpy_scalars_keep_type_and_bits(scalar: np.generic) -> None:
    saved = save({"s": scalar})
    assert not saved[1]
    built = build_state(*saved)["s"]
    assert type(built) is type(scalar)
    assert built.tobytes() == scalar.tobytes()


def test_scalars_of_ml_dtypes_keep_type_and_bits() -> None:
    import ml_dtypes

    built = build_state(*save({"s": ml_dtypes.bfloat16(1.5)}))["s"]
    assert type(built) is ml_dtypes.bfloat16
    assert float(built) == 1.5


def test_numpy_scalars_without_numbers_are_refused() -> None:
    with pytest.raises(UnsupportedStateError, match="run/s"):
        capture({"run": {"s": np.str_("text")}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tree, tensors: tree["t"].update(shape=[4, 3]), "disagree"),
        (lambda tree, tensors: tree["t"].update(dtype="float16"), "disagree"),
        (lambda tree, tensors: tree["t"].update(dtype="float12"), "does not know"),
        (lambda tree, tensors: tree["t"].update(shape=[-3, -4]), "list of sizes"),
        (lambda tree, tensors: tree["t"].update(key="../../etc"), "not a key"),
        (lambda tree, tensors: tree["t"].update({"$": "pickle"}), "unknown tag"),
        (lambda tree, tensors: tree["v"]["view"].update(offset=1000), "fewer than a view"),
        (lambda tree, tensors: tree["v"]["view"].update(stride=[1]), "contradicts itself"),
        (lambda tree, tensors: tree["a"].update(dtype="object"), "not an array type"),
        (lambda tree, tensors: tree["a"].update(shape=[7]), "disagree"),
        (lambda tree, tensors: tree["s"].update(data="AAAA"), "bytes"),
        (lambda tree, tensors: tree["b"].update(shape=[7]), "disagree"),
        (lambda tree, tensors: tensors.pop("state/t"), "missing from the checkpoint"),
    ],
)
def test_a_tree_that_contradicts_the_arrays_is_damage(change: Callable[[Any, Any], Any], reason: str) -> None:
    tensor = torch.arange(12.0).view(3, 4)
    state = {"t": tensor, "v": tensor.t(), "a": np.arange(3), "s": np.float64(1), "b": noise(torch.complex32, 2)}
    tree, tensors = save(state)
    change(tree, tensors)
    with pytest.raises(CorruptCheckpointError, match=reason):
        build_state(tree, tensors)
