"""Modules: names, hooks, wrappers, tied weights, and what does not fit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from state_helpers import build_state, fingerprint, restore, save, select_keys
from torch import nn
from torch.nn.utils import parametrizations

import asyncckpt as ac
from asyncckpt.errors import CorruptCheckpointError, InvalidOptionError, StateMismatchError, UnsupportedStateError
from asyncckpt.state.apply import plan_apply
from asyncckpt.state.capture import capture


class Tied(nn.Module):
    """A language model in small: embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


class Shared(nn.Module):
    """One submodule under two names, and one module list that has it a third time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.all = nn.ModuleList([nn.Linear(4, 4), self.first])


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("dropped", torch.randn(3), persistent=False)
        self.register_buffer("none", None)
        self.register_parameter("no_parameter", None)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.coarse = nn.Parameter(torch.randn(2, dtype=torch.bfloat16))
        self.whole = nn.Parameter(torch.arange(3), requires_grad=False)


class Extra(nn.Module):
    """State beside its tensors, a tensor among it."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.inner: Any = {"count": int(value), "scale": torch.full((2,), value), "names": ("a", None)}

    def get_extra_state(self) -> Any:
        return self.inner

    def set_extra_state(self, state: Any) -> None:
        self.inner = state


class ExtraTensor(nn.Module):
    """Extra state that is a tensor of a size that changes."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.seen = torch.ones(size)

    def get_extra_state(self) -> torch.Tensor:
        return self.seen

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.seen = state


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.spectral_norm(nn.Linear(4, 4)))


def odd_names() -> nn.Module:
    module = nn.Module()
    for name in ("c", "$", "a/b", "zarr", "\u00e9", "x" * 250, "__x", "module", "_orig_mod"):
        module.add_module(name, nn.Linear(2, 2))
    return module


def inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ModuleDict({"x": nn.Linear(4, 1)})),
    "tied": Tied,
    "shared": Shared,
    "buffers": Buffers,
    "extra": Extra,
    "extra_tensor": ExtraTensor,
    "weight_norm": weight_normed,
    "empty": nn.Module,
    "no_tensors": lambda: nn.Sequential(nn.ReLU(), nn.Dropout()),
    "odd_names": odd_names,
    "inference": inference,
    "channels_last": conv,
    "lstm": lambda: nn.LSTM(3, 4, 2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "meta_free_scalar": lambda: nn.PReLU(),
    "ema": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(3, 3), use_buffers=True),
    "complex": lambda: nn.Linear(2, 2, dtype=torch.complex64),
}


def tensors_of(module: nn.Module, *, persistent: bool = True) -> dict[str, Any]:
    return {name: fingerprint(value) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_restored_in_place_and_built(name: str) -> None:
    torch.manual_seed(0)
    source, live = MODULES[name](), MODULES[name]()
    saved = save({"model": source})
    pointers = {key: (id(value), value.data_ptr()) for key, value in live.named_parameters()}
    restore({"model": live}, saved)
    assert tensors_of(live) == tensors_of(source)
    assert {key: (id(value), value.data_ptr()) for key, value in live.named_parameters()} == pointers
    assert fingerprint(build_state(*saved)["model"]) == fingerprint(source.state_dict())


@pytest.mark.parametrize("name", [name for name in MODULES if name != "inference"])
def test_what_was_built_can_be_given_to_load_state_dict(name: str) -> None:
    source, live = MODULES[name](), MODULES[name]()
    live.load_state_dict(build_state(*save({"model": source}))["model"], strict=True)
    assert tensors_of(live) == tensors_of(source)


def test_buffers_that_are_not_persistent_are_neither_stored_nor_touched() -> None:
    source, live = Buffers(), Buffers()
    dropped = live.dropped.clone()
    saved = save({"model": source})
    assert not any("dropped" in key or "none" in key for key in saved[1])
    restore({"model": live}, saved)
    assert torch.equal(live.dropped, dropped)


# -- tied weights --------------------------------------------------------------------------------


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    source, live = Tied(), Tied()
    saved = save({"model": source})
    assert [key for key in saved[1] if key.endswith(("embedding.weight", "head.weight"))] == [
        "state/model/embedding.weight"
    ]
    restore({"model": live}, saved)
    assert live.head.weight is live.embedding.weight
    assert torch.equal(live.head.weight, source.head.weight)
    ac.save_sync(tmp_path, 1, {"model": source})
    for built in (build_state(*saved)["model"], ac.load(tmp_path, 1)["model"]):
        assert built["head.weight"].data_ptr() == built["embedding.weight"].data_ptr()
        assert torch.equal(built["head.weight"], source.head.weight)


def test_tied_weights_fill_both_of_an_untied_module() -> None:
    live = Tied()
    live.head.weight = nn.Parameter(torch.zeros(5, 4))
    source = Tied()
    restore({"model": live}, save({"model": source}))
    assert live.head.weight is not live.embedding.weight
    assert torch.equal(live.head.weight, source.embedding.weight)
    assert torch.equal(live.embedding.weight, source.embedding.weight)


def test_weights_tied_across_modules_and_values_of_the_state() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    saved = save({"first": first, "second": second, "raw": first.weight, "row": first.weight[1], "t": first.weight.t()})
    assert sorted(saved[1]) == ["state/first/bias", "state/first/weight"]
    built = build_state(*saved)
    built["first"]["weight"][1] = 7
    assert torch.equal(built["second"]["weight"], built["first"]["weight"])
    assert built["row"].tolist() == [7, 7, 7]
    assert built["t"][:, 1].tolist() == [7, 7, 7]
    assert built["raw"].data_ptr() == built["first"]["weight"].data_ptr()


def test_tied_values_that_replace_others_are_tied() -> None:
    weight = torch.arange(4.0)
    live: dict[str, Any] = {"a": None, "b": None, "c": None}
    restore(live, save({"a": weight, "b": weight[1:3], "c": [weight]}))
    assert live["a"] is live["c"][0]
    live["a"].zero_()
    assert live["b"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "views",
    [
        lambda x: [x[:6], x[4:]],
        lambda x: [x[2:], x],
        lambda x: [x[::2], x[1::2]],
        lambda x: [x[::2], x],
        lambda x: [x, x.view(2, 5), x.view(5, 2).t()],
        lambda x: [x[0], x[0], x],
        lambda x: [x[3:3], x, x[:0]],
        lambda x: [x.view(torch.int32), x],
        lambda x: [x.expand(3, 10), x],
        lambda x: [x[1:4], x[2:6], x[0:3], x[1:4]],
        lambda x: [x.flip(0), x],
        lambda x: [x[2], x.as_strided((3, 3), (1, 2), 1)],
    ],
)
def test_views_of_one_memory_keep_their_values(views: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
    state = {"views": views(torch.arange(10.0) + 1)}
    saved = save(state)
    assert fingerprint(build_state(*saved)) == fingerprint(state)
    live: dict[str, Any] = {"views": None}
    restore(live, saved)
    assert fingerprint(live) == fingerprint(state)


# -- hooks and overrides -------------------------------------------------------------------------


def test_a_state_dict_hook_decides_what_is_stored() -> None:
    def drop_and_rename(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}kernel"] = state.pop(f"{prefix}weight")

    def undo(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].register_state_dict_post_hook(drop_and_rename)
        model[0].register_load_state_dict_pre_hook(undo)
        return model

    source, live = make(), make()
    saved = save({"model": source})
    assert sorted(saved[1]) == ["state/model/0.bias", "state/model/0.kernel"]
    restore({"model": live}, saved)
    assert fingerprint(live.state_dict()) == fingerprint(source.state_dict())


def test_a_load_hook_may_convert_an_older_checkpoint() -> None:
    class New(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Parameter(torch.zeros(6, 2))
            self.register_load_state_dict_pre_hook(self._join)

        @staticmethod
        def _join(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            if f"{prefix}q" in state:
                state[f"{prefix}qkv"] = torch.cat([state.pop(f"{prefix}{name}") for name in "qkv"])

    old = nn.ParameterDict({name: nn.Parameter(torch.randn(2, 2)) for name in "qkv"})
    live = New()
    restore({"model": live}, save({"model": old}))
    assert torch.equal(live.qkv, torch.cat([old[name] for name in "qkv"]))


def test_a_post_hook_sees_the_loaded_values() -> None:
    seen: list[float] = []
    live = nn.Linear(1, 1)
    live.register_load_state_dict_post_hook(lambda module, _: seen.append(module.weight.item()))
    source = nn.Linear(1, 1)
    restore({"model": live}, save({"model": source}))
    assert seen == [source.weight.item()]


def test_a_hook_that_refuses_parameters_gets_plain_tensors() -> None:
    class ToNumpy(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}weight"] = torch.from_numpy(destination[f"{prefix}weight"].numpy().copy())

    source, live = ToNumpy(2, 2), ToNumpy(2, 2)
    optimizer, other = (torch.optim.SGD(model.parameters(), momentum=0.9) for model in (source, live))
    source(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = save({"model": source, "optimizer": optimizer})
    assert "state/optimizer/momentum_buffer/weight" in saved[1]
    restore({"model": live, "optimizer": other}, saved)
    assert torch.equal(live.weight, source.weight)
    assert torch.equal(other.state[live.weight]["momentum_buffer"], optimizer.state[source.weight]["momentum_buffer"])


def test_a_hook_that_copies_what_is_stored_does_not_keep_the_module_from_being_loaded() -> None:
    def make() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_state_dict_post_hook(lambda module, state, *_: state.update(weight=state["weight"].clone()))
        return model

    source, live = make(), make()
    restore({"model": live}, save({"model": source}))
    assert torch.equal(live.weight, source.weight)


def test_a_module_whose_state_is_no_dict_is_loaded_as_any_object() -> None:
    class Odd(nn.Module):
        value = 0

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return ("odd", self.value)

        def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
            self.value = state[1]

    source, live = Odd(), Odd()
    source.value = 5
    saved = save({"model": source})
    assert build_state(*saved) == {"model": ("odd", 5)}
    restore({"model": live}, saved)
    assert live.value == 5


def test_a_module_that_loads_itself_is_asked_to() -> None:
    class Own(nn.Linear):
        loaded = 0

        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            self.loaded += 1
            return super().load_state_dict(state, strict, assign)

    source, live = Own(2, 2), Own(2, 2)
    restore({"model": live}, save({"model": source}))
    assert live.loaded == 1
    assert torch.equal(live.weight, source.weight)


def test_versions_reach_the_module_that_loads_itself() -> None:
    class Versioned(nn.Linear):
        _version = 3
        found: Any = None

        def _load_from_state_dict(self, state: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
            self.found = local_metadata.get("version")
            super()._load_from_state_dict(state, prefix, local_metadata, *rest)

    source, live = nn.Sequential(Versioned(2, 2)), nn.DataParallel(nn.Sequential(Versioned(2, 2)))
    restore({"model": live}, save({"model": source}))
    assert live.module[0].found == 3


def test_odd_entries_of_the_metadata_are_kept() -> None:
    class Annotated(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination._metadata[prefix[:-1]]["note"] = ("text", 1)

    source = nn.Sequential(Annotated(2, 2), nn.Linear(2, 2))
    built = build_state(*save({"model": source}))["model"]
    assert built._metadata == source.state_dict()._metadata


def test_a_state_dict_that_is_a_plain_dict_stays_one() -> None:
    class Plain(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return dict(super().state_dict(*args, **kwargs))

    source, live = Plain(2, 2), Plain(2, 2)
    saved = save({"model": source})
    assert type(build_state(*saved)["model"]) is dict
    restore({"model": live}, saved)
    assert torch.equal(live.weight, source.weight)


# -- lazy modules --------------------------------------------------------------------------------


@pytest.fixture
def _lazy() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        yield


@pytest.mark.usefixtures("_lazy")
def test_a_lazy_module_gets_its_shapes_from_the_checkpoint() -> None:
    source, live = nn.Sequential(nn.LazyLinear(2)), nn.Sequential(nn.LazyLinear(2))
    source(torch.ones(1, 3))
    restore({"model": live}, save({"model": source}))
    assert torch.equal(live[0].weight, source[0].weight)
    assert torch.equal(live(torch.ones(1, 3)), source(torch.ones(1, 3)))


@pytest.mark.usefixtures("_lazy")
def test_a_lazy_module_that_never_ran_is_refused() -> None:
    with pytest.raises(UnsupportedStateError, match=r"model/weight .* not initialised yet"):
        capture({"model": nn.LazyLinear(2)})


@pytest.mark.usefixtures("_lazy")
def test_a_lazy_module_of_another_type_does_not_fit() -> None:
    with pytest.raises(StateMismatchError, match=r"model/weight .* float64"):
        plan_apply({"model": nn.LazyLinear(2, dtype=torch.float64)}, save({"model": nn.Linear(3, 2)})[0])


# -- wrappers ------------------------------------------------------------------------------------


def compiled(module: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(module, backend="eager")
    return wrapped  # type: ignore[no-any-return]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda module: module,
    "parallel": nn.DataParallel,
    "compiled": compiled,
    "compiled_parallel": lambda module: compiled(nn.DataParallel(module)),
    "parallel_compiled": lambda module: nn.DataParallel(compiled(module)),
}


@pytest.mark.parametrize("live_in", WRAPPERS)
@pytest.mark.parametrize("saved_in", WRAPPERS)
def test_wrapping_does_not_change_names(saved_in: str, live_in: str) -> None:
    def make(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
        inner = Extra(torch.rand(()).item())
        model = nn.ModuleDict({"module": WRAPPERS["none"](nn.Linear(2, 2)), "layer": inner})
        wrapped = wrap(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.rand_like(parameter)
        optimizer.step()
        return {"model": wrapped, "optimizer": optimizer}

    source, live = make(WRAPPERS[saved_in]), make(WRAPPERS[live_in])
    saved = save(source)
    assert sorted(build_state(*saved)["model"]) == [
        "layer._extra_state",
        "layer.weight",
        "module.bias",
        "module.weight",
    ]
    assert "state/optimizer/momentum_buffer/layer.weight" in saved[1]
    restore(live, saved)
    assert [fingerprint(value) for value in live["model"].state_dict().values()] == [
        fingerprint(value) for value in source["model"].state_dict().values()
    ]
    moments = [[state["momentum_buffer"] for state in run["optimizer"].state.values()] for run in (source, live)]
    assert fingerprint(moments[0]) == fingerprint(moments[1])


def test_an_inner_module_that_is_compiled_keeps_its_name() -> None:
    source = nn.Sequential(compiled(nn.Linear(2, 2)), nn.DataParallel(nn.Linear(2, 2)))
    saved = save({"model": source})
    assert list(build_state(*saved)["model"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(build_state(*saved)["model"]._metadata) == ["", "0", "1"]
    live = nn.Sequential(nn.Linear(2, 2), compiled(nn.Linear(2, 2)))
    restore({"model": live}, saved)
    assert torch.equal(live[1].weight, source[1].module.weight)


def test_names_that_unwrapping_would_make_equal_are_left_alone() -> None:
    wrapped = nn.DataParallel(nn.Linear(2, 2))
    wrapped.weight = nn.Parameter(torch.zeros(2))
    source = nn.Sequential(wrapped)
    saved = save({"model": source})
    assert list(build_state(*saved)["model"]) == ["0.weight", "0.module.weight", "0.module.bias"]
    live = copy.deepcopy(source)
    with torch.no_grad():
        live[0].module.weight.zero_()
    restore({"model": live}, saved)
    assert tensors_of(live) == tensors_of(source)


def test_a_module_that_is_only_called_like_a_wrapper_keeps_its_name() -> None:
    source = nn.ModuleDict({"module": nn.Linear(1, 1), "_orig_mod": nn.Linear(1, 1)})
    assert next(iter(build_state(*save({"model": source}))["model"])) == "module.weight"


# -- what does not fit ---------------------------------------------------------------------------


def other_model() -> nn.Module:
    return nn.ModuleDict({"same": nn.Linear(2, 2), "wider": nn.Linear(2, 5), "new": nn.Linear(2, 2, bias=False)})


def first_model() -> nn.Module:
    return nn.ModuleDict({"same": nn.Linear(2, 2), "wider": nn.Linear(2, 3), "old": nn.Linear(2, 2, bias=False)})


EXPECTED = {
    "missing": ("model/new.weight",),
    "unexpected": ("model/old.weight",),
    "mismatched": ("model/wider.weight", "model/wider.bias"),
}


@pytest.mark.parametrize("hooked", [False, True])
def test_strict_lists_every_difference_and_changes_nothing(hooked: bool) -> None:
    live = other_model()
    saved = save({"model": first_model()})
    before = fingerprint(live)
    with pytest.raises(StateMismatchError) as raised:
        restore({"model": live}, saved)
    assert raised.value.fields == {kind: list(paths) for kind, paths in EXPECTED.items()}
    assert "model/wider.weight (the checkpoint has float32 [3, 2], here it is float32 [5, 2])" in str(raised.value)
    assert fingerprint(live) == before


@pytest.mark.parametrize("hooked", [False, True])
def test_not_strict_loads_the_rest_and_lists_the_same(hooked: bool) -> None:
    live, source = other_model(), first_model()
    if hooked:
        live.register_load_state_dict_post_hook(lambda *_: None)
    before = fingerprint(live["new"]), fingerprint(live["wider"])
    mismatch = restore({"model": live}, save({"model": source}), strict=False)
    assert vars_of(mismatch) == EXPECTED
    assert torch.equal(live["same"].weight, source["same"].weight)
    assert (fingerprint(live["new"]), fingerprint(live["wider"])) == before


def vars_of(mismatch: Any) -> dict[str, Any]:
    return {name: getattr(mismatch, name) for name in ("missing", "unexpected", "mismatched")}


def test_a_module_with_hooks_judges_by_itself_and_its_verdict_is_a_mismatch() -> None:
    live = other_model()
    live.register_load_state_dict_post_hook(lambda *_: None)
    before = fingerprint(live)
    with pytest.raises(StateMismatchError, match=r"model does not fit its module: Error\(s\) in loading"):
        restore({"model": live}, save({"model": first_model()}))
    assert fingerprint(live) == before


@pytest.mark.parametrize("hooked", [False, True])
def test_weights_are_never_rounded_to_another_type(hooked: bool) -> None:
    live = nn.Linear(2, 2, dtype=torch.bfloat16)
    if hooked:
        live.register_load_state_dict_post_hook(lambda *_: None)
    before = fingerprint(live)
    with pytest.raises(StateMismatchError) as raised:
        restore({"model": live}, save({"model": nn.Linear(2, 2)}))
    assert raised.value.fields["mismatched"] == ["model/weight", "model/bias"]
    assert fingerprint(live) == before


def test_more_than_ten_differences_are_counted_not_printed() -> None:
    live = nn.ModuleList(nn.Linear(1, 1) for _ in range(12))
    with pytest.raises(StateMismatchError, match=r"24 missing .* and 14 more") as raised:
        plan_apply({"model": live}, save({"model": nn.ModuleList()})[0])
    assert len(raised.value.fields["missing"]) == 24


@pytest.mark.parametrize("stored", [torch.ones(2), 3, None, [1], (1,)])
def test_a_module_where_the_checkpoint_has_something_else(stored: Any) -> None:
    live = nn.Linear(2, 2)
    with pytest.raises(StateMismatchError, match="here it is a module") as raised:
        plan_apply({"model": live}, save({"model": stored})[0])
    assert raised.value.fields["mismatched"] == ["model"]


def test_names_of_the_state_are_compared_like_those_of_a_module() -> None:
    live = {"model": nn.Linear(1, 1), "epoch": 0, "nested": {"a": 1, "b": nn.Linear(1, 1)}}
    saved = save({"model": nn.Linear(1, 1), "step": 4, "nested": {"a": 2, "c": 3}})
    with pytest.raises(StateMismatchError) as raised:
        restore(live, saved)
    assert raised.value.fields == {"missing": ["epoch", "nested/b"], "unexpected": ["step"], "mismatched": []}
    mismatch = restore(live, saved, strict=False)
    assert mismatch == ac.Mismatch(missing=("epoch", "nested/b"), unexpected=("step",))
    assert live["nested"]["a"] == 2
    assert live["epoch"] == 0
    assert "step" not in live


# -- only= ---------------------------------------------------------------------------------------


def two_models() -> dict[str, Any]:
    return {
        "model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        "ema": nn.Linear(2, 2),
        "epoch": int(torch.randint(2**40, ()).item()),
        "deep": {"a": [torch.randn(2)], "b": torch.randn(2)},
    }


def leaves(state: dict[str, Any]) -> dict[str, Any]:
    modules = {f"{name}/{key}": value for name in ("model", "ema") for key, value in state[name].state_dict().items()}
    rest = {"epoch": state["epoch"], "deep/a/0": state["deep"]["a"][0], "deep/b": state["deep"]["b"]}
    return {name: fingerprint(value) for name, value in {**modules, **rest}.items()}


ONLY = [
    ("model", ["model/0.weight", "model/0.bias", "model/1.weight", "model/1.bias"]),
    ("model/", ["model/0.weight", "model/0.bias", "model/1.weight", "model/1.bias"]),
    ("model/1.*", ["model/1.weight", "model/1.bias"]),
    (["model/0.weight", "ema/bias"], ["model/0.weight", "ema/bias"]),
    ("*weight", ["model/0.weight", "model/1.weight", "ema/weight"]),
    ("e*", ["ema/weight", "ema/bias", "epoch"]),
    ("epoch", ["epoch"]),
    ("deep/b", ["deep/b"]),
    ("deep/a", ["deep/a/0"]),
    ("model/?.bias", ["model/0.bias", "model/1.bias"]),
    ("model/[!0].bias", ["model/1.bias"]),
]


@pytest.mark.parametrize(("only", "expected"), ONLY)
def test_only_restores_and_reads_what_it_selects(only: Any, expected: list[str]) -> None:
    source, live = two_models(), two_models()
    saved = save(source)
    before, wanted = leaves(live), leaves(source)
    keys = {f"state/{name}" for name in expected if name != "epoch"}
    assert plan_apply(live, saved[0], only).keys == select_keys(saved[0], only) == keys
    restore(live, saved, only=only)
    assert leaves(live) == {name: (wanted if name in expected else before)[name] for name in before}


@pytest.mark.parametrize(("only", "expected"), ONLY)
def test_only_builds_what_it_selects(only: Any, expected: list[str]) -> None:
    saved = save(two_models())
    keys = select_keys(saved[0], only)
    built = build_state(saved[0], {key: saved[1][key] for key in keys}, only)

    def flat(value: Any, path: str) -> Iterator[str]:
        if isinstance(value, dict | list):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                yield from flat(part, f"{path}/{key}" if path else str(key))
        else:
            yield path

    assert sorted(flat(built, "")) == sorted(expected)


def test_only_compares_only_what_it_selects() -> None:
    live = {"model": other_model(), "surplus": 1}
    saved = save({"model": first_model(), "other": 2})
    assert not restore(live, saved, only="model/same.*")
    with pytest.raises(StateMismatchError) as raised:
        restore(live, saved, only="model/*.bias")
    assert raised.value.fields == {"missing": [], "unexpected": [], "mismatched": ["model/wider.bias"]}


@pytest.mark.parametrize("only", ["modle", "model/2.*", ["model", "nothing"], "Model", ""])
def test_only_that_matches_nothing_is_refused(only: Any) -> None:
    saved = save(two_models())
    for use in (lambda: plan_apply(two_models(), saved[0], only), lambda: select_keys(saved[0], only)):
        with pytest.raises(InvalidOptionError, match=r"matches nothing in the checkpoint, which holds model, ema"):
            use()


@pytest.mark.parametrize("only", [5, b"model", ["model", 3], [None], {"model": 1}.values()])
def test_only_takes_texts(only: Any) -> None:
    with pytest.raises(InvalidOptionError, match="only= takes glob patterns as texts"):
        select_keys(save(two_models())[0], only)


def test_only_cannot_take_a_part_of_an_object() -> None:
    state = {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), "rng": ac.RNG()}
    saved = save(state)
    for only in ("optimizer/param_groups", "rng/torch"):
        with pytest.raises(InvalidOptionError, match="it can only be restored whole"):
            plan_apply(state, saved[0], only)
        assert build_state(saved[0], saved[1], only)


# -- through the whole program -------------------------------------------------------------------


def test_modules_survive_a_checkpoint_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = {name: make() for name, make in MODULES.items()}
    live = {name: make() for name, make in MODULES.items()}
    ac.save_sync(tmp_path, 1, source)
    with ac.Checkpointer(tmp_path, live, writer=ac.Writer(kind="thread")) as ckpt:
        ckpt.restore()
    for name, module in source.items():
        assert tensors_of(live[name]) == tensors_of(module), name


def test_an_array_that_is_not_what_the_tree_says_is_damage_and_changes_nothing() -> None:
    live = {"model": nn.Sequential(nn.Linear(2, 2), Extra())}
    tree, tensors = save(live)
    before = fingerprint(live)
    for key in tensors:
        with pytest.raises(CorruptCheckpointError):
            plan_apply(live, tree).execute({**tensors, key: torch.zeros(7, dtype=torch.float16)})
        with pytest.raises(CorruptCheckpointError, match="missing from the checkpoint"):
            plan_apply(live, tree).execute({name: value for name, value in tensors.items() if name != key})
        assert fingerprint(live) == before
