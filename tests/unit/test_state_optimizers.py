"""Optimizers: by name, bit for bit, and training that goes on as if nothing had happened."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from state_helpers import Saved, build_state, fingerprint, restore, save, train
from torch import nn, optim
from torch.optim import lr_scheduler, swa_utils

import asyncckpt as ac
from asyncckpt.errors import CorruptCheckpointError, StateMismatchError, UnsupportedStateError
from asyncckpt.state.apply import plan_apply
from asyncckpt.state.capture import capture

Make = Callable[[Any], optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda params: optim.SGD(params, lr=0.1),
    "momentum": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda params: optim.Adam(params, lr=0.1),
    "adam_lr_tensor": lambda params: optim.Adam(params, lr=torch.tensor(0.1)),
    "adamw_amsgrad": lambda params: optim.AdamW(params, lr=0.1, amsgrad=True, weight_decay=0.1),
    "adam_fused": lambda params: optim.Adam(params, lr=0.1, fused=True),
    "adam_foreach": lambda params: optim.Adam(params, lr=0.1, foreach=True),
    "adagrad": lambda params: optim.Adagrad(params, lr=0.1, lr_decay=0.1),
    "adadelta": lambda params: optim.Adadelta(params, lr=0.1),
    "adamax": lambda params: optim.Adamax(params, lr=0.1),
    "asgd": lambda params: optim.ASGD(params, lr=0.1, t0=1),
    "nadam": lambda params: optim.NAdam(params, lr=0.1),
    "radam": lambda params: optim.RAdam(params, lr=0.1),
    "rmsprop": lambda params: optim.RMSprop(params, lr=0.1, momentum=0.5, centered=True),
    "rprop": lambda params: optim.Rprop(params, lr=0.1),
    "lbfgs": lambda params: optim.LBFGS(params, lr=0.1, history_size=3, max_iter=2),
    "lbfgs_wolfe": lambda params: optim.LBFGS(params, lr=0.1, max_iter=2, line_search_fn="strong_wolfe"),
    "adafactor": lambda params: optim.Adafactor(params, lr=0.1),
}
if hasattr(optim, "Muon"):
    OPTIMIZERS["muon"] = lambda params: optim.Muon([p for p in params if p.dim() == 2], lr=0.1)


def model_of(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def run_of(make: Make, seed: int = 0, steps: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = model_of()
    run = {"model": model, "optimizer": make(model.parameters()), "rng": ac.RNG()}
    train(model, run["optimizer"], steps)
    return run


def bits_of(run: dict[str, Any]) -> Any:
    """Weights, moments and hyperparameters, whichever tensors they are in."""
    optimizer = run["optimizer"]
    weights = fingerprint(list(run["model"].state_dict().values()))
    return weights, fingerprint(optimizer.state_dict()["state"]), [_plain(group) for group in optimizer.param_groups]


def _plain(group: dict[str, Any]) -> Any:
    return sorted((name, fingerprint(value)) for name, value in group.items() if name != "params")


@pytest.mark.parametrize("live_steps", [0, 3], ids=["fresh", "used"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(name: str, live_steps: int) -> None:
    source = run_of(OPTIMIZERS[name], steps=3)
    saved = save(source)
    expected = bits_of(source)
    live = run_of(OPTIMIZERS[name], seed=1, steps=live_steps)
    restore(live, saved)
    assert bits_of(live) == expected
    train(live["model"], live["optimizer"], 3)
    restore({"rng": ac.RNG()}, save({"rng": ac.RNG()}))
    after = torch.get_rng_state()
    restore({"rng": source["rng"]}, saved, only="rng")
    train(source["model"], source["optimizer"], 3)
    assert bits_of(live) == bits_of(source)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_live_moments_stay_the_same_tensors(name: str) -> None:
    source, live = run_of(OPTIMIZERS[name], steps=2), run_of(OPTIMIZERS[name], seed=1, steps=2)

    def tensors() -> dict[str, int]:
        return {
            f"{index}/{slot}": id(value)
            for index, state in enumerate(live["optimizer"].state.values())
            for slot, value in state.items()
            if isinstance(value, torch.Tensor)
        }

    before = tensors()
    saved = save(source)
    expected = bits_of(source)
    restore(live, saved)
    assert tensors() == before
    assert bits_of(live) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_built_can_be_given_to_torch(name: str) -> None:
    source, live = run_of(OPTIMIZERS[name], steps=2), run_of(OPTIMIZERS[name], seed=1)
    built = build_state(*save(source))
    live["model"].load_state_dict(built["model"])
    live["optimizer"].load_state_dict(built["optimizer"])
    names = ["0.weight", "2.weight"] if name == "muon" else ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert built["optimizer"]["param_fqns"] == names
    assert bits_of(live) == bits_of(source)


@pytest.mark.parametrize("name", ["momentum", "adam", "lbfgs"])
def test_an_optimizer_before_its_first_step_goes_back_to_no_state(name: str) -> None:
    saved = save(run_of(OPTIMIZERS[name]))
    live = run_of(OPTIMIZERS[name], seed=1, steps=2)
    restore(live, saved)
    assert not any(live["optimizer"].state.values())
    built = build_state(*saved)["optimizer"]
    assert not any(built["state"].values())


# -- by name -------------------------------------------------------------------------------------


class Twins(nn.Module):
    """Layers of one shape, in any order: position alone would swap their moments."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2, bias=False))


def twins(order: str, make: Make = OPTIMIZERS["adam"], groups: Any = None, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Twins(order)
    optimizer = make([model.get_parameter(f"{name}.weight") for name in order] if groups is None else groups(model))
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full((2, 2), float(ord(name[0])) * 10**seed)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def moments(run: dict[str, Any], slot: str = "exp_avg") -> dict[str, Any]:
    state = run["optimizer"].state
    return {name: fingerprint(state[value].get(slot)) for name, value in run["model"].named_parameters()}


@pytest.mark.parametrize("order", ["cba", "bac", "cab", "abc"])
def test_reordered_parameters_get_their_own_moments(order: str) -> None:
    source, live = twins("abc"), twins(order, seed=1)
    restore(live, save(source))
    assert moments(live) == moments(source)
    assert len({str(value) for value in moments(live).values()}) == 3
    fresh = {"model": Twins(order)}
    fresh["optimizer"] = optim.Adam(reversed(list(fresh["model"].parameters())))
    restore(fresh, save(source))
    assert moments(fresh) == moments(source)


def group_of(model: nn.Module, names: str, **options: Any) -> dict[str, Any]:
    return {"params": [model.get_parameter(f"{name}.weight") for name in names], **options}


def lrs(run: dict[str, Any]) -> dict[str, float]:
    of = {id(value): name for name, value in run["model"].named_parameters()}
    return {of[id(value)][0]: group["lr"] for group in run["optimizer"].param_groups for value in group["params"]}


def adam(groups: Any) -> optim.Optimizer:
    return optim.Adam(groups)


def test_groups_in_another_order_keep_their_hyperparameters() -> None:
    source = twins("abc", adam, lambda m: [group_of(m, "ab", lr=0.1, weight_decay=1.0), group_of(m, "c", lr=0.2)])
    live = twins("abc", adam, lambda m: [group_of(m, "c", lr=9), group_of(m, "ba", lr=9)], seed=1)
    restore(live, save(source))
    assert lrs(live) == {"a": 0.1, "b": 0.1, "c": 0.2}
    assert [group["weight_decay"] for group in live["optimizer"].param_groups] == [0, 1.0]
    assert moments(live) == moments(source)


def test_groups_in_another_order_with_a_new_parameter_keep_their_hyperparameters() -> None:
    source = twins("abc", adam, lambda m: [group_of(m, "ab", lr=0.1), group_of(m, "c", lr=0.2)])
    live = twins("abcd", adam, lambda m: [group_of(m, "cd", lr=9), group_of(m, "ba", lr=9)], seed=1)
    mismatch = restore(live, save(source), strict=False)
    assert mismatch.missing == ("model/d.weight", "optimizer/d.weight")
    assert lrs(live) == {"a": 0.1, "b": 0.1, "c": 0.2, "d": 0.2}


def test_a_parameter_that_moved_to_another_group_takes_the_hyperparameters_of_that_group() -> None:
    source = twins("abc", adam, lambda m: [group_of(m, "ab", lr=0.1), group_of(m, "c", lr=0.2)])
    live = twins("abc", adam, lambda m: [group_of(m, "a", lr=9), group_of(m, "cb", lr=9)], seed=1)
    restore(live, save(source))
    assert lrs(live) == {"a": 0.1, "b": 0.2, "c": 0.2}
    assert moments(live) == moments(source)


def test_groups_that_cannot_be_told_apart_are_taken_by_position() -> None:
    source = twins("ab", adam, lambda m: [group_of(m, "ab", lr=0.1), group_of(m, "", lr=0.2), group_of(m, "", lr=0.3)])
    live = twins("ab", adam, lambda m: [group_of(m, "a", lr=9), group_of(m, "b", lr=9), group_of(m, "", lr=9)], seed=1)
    restore(live, save(source))
    assert [group["lr"] for group in live["optimizer"].param_groups] == [0.1, 0.2, 0.3]
    same = twins("ab", adam, lambda m: [group_of(m, "", lr=9), group_of(m, "", lr=9), group_of(m, "ab", lr=9)], seed=1)
    restore(same, save(source))
    assert [group["lr"] for group in same["optimizer"].param_groups] == [0.2, 0.3, 0.1]


def test_another_number_of_groups_does_not_fit() -> None:
    source = twins("ab", adam, lambda m: [group_of(m, "ab", lr=0.1)])
    live = twins("ab", adam, lambda m: [group_of(m, "a", lr=9), group_of(m, "b", lr=8)], seed=1)
    with pytest.raises(StateMismatchError, match="the checkpoint has 1 groups, here there are 2") as raised:
        plan_apply(live, save(source)[0])
    assert raised.value.fields == {"missing": [], "unexpected": [], "mismatched": ["optimizer/param_groups"]}
    restore(live, save(source), strict=False)
    assert moments(live) == moments(source)
    assert lrs(live) == {"a": 9, "b": 8}


def test_a_new_and_a_dropped_parameter_are_listed_and_the_new_one_keeps_its_state() -> None:
    source, live = twins("abc"), twins("dcb", seed=1)
    saved = save(source)
    with pytest.raises(StateMismatchError) as raised:
        plan_apply(live, saved[0])
    assert raised.value.fields == {
        "missing": ["model/d.weight", "optimizer/d.weight"],
        "unexpected": ["model/a.weight", "optimizer/a.weight"],
        "mismatched": [],
    }
    own = moments(live)["d.weight"]
    restore(live, saved, strict=False)
    assert moments(live) == {
        "d.weight": own,
        "c.weight": moments(source)["c.weight"],
        "b.weight": moments(source)["b.weight"],
    }


def test_a_parameter_of_another_shape_is_listed_and_keeps_its_state() -> None:
    source, live = run_of(adam, steps=1), run_of(adam, seed=1)
    live["model"][2] = nn.Linear(4, 5)
    live["optimizer"] = adam(live["model"].parameters())
    train(live["model"], live["optimizer"], 1)
    before = fingerprint(live["optimizer"].state[live["model"][2].weight])
    mismatch = restore(live, save(source), strict=False)
    assert mismatch.mismatched == ("model/2.weight", "model/2.bias", "optimizer/2.weight", "optimizer/2.bias")
    assert fingerprint(live["optimizer"].state[live["model"][2].weight]) == before


def test_frozen_parameters_have_no_state_and_get_none() -> None:
    def make(seed: int, frozen: bool) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = model_of()
        model[0].requires_grad_(not frozen)
        run = {"model": model, "optimizer": optim.Adam(model.parameters())}
        train(model, run["optimizer"], 2)
        return run

    source, live = make(0, True), make(1, False)
    saved = save(source)
    assert "state/optimizer/exp_avg/2.weight" in saved[1]
    assert "state/optimizer/exp_avg/0.weight" not in saved[1]
    restore(live, saved)
    assert (
        live["model"][0].weight not in live["optimizer"].state or not live["optimizer"].state[live["model"][0].weight]
    )
    assert bits_of(live) == bits_of(source)


def test_the_module_may_come_after_the_optimizer_and_lie_deeper() -> None:
    source, live = twins("ab"), twins("ba", seed=1)

    def arranged(run: dict[str, Any]) -> dict[str, Any]:
        return {"optimizer": run["optimizer"], "deep": [{"x": ({"model": run["model"]},)}]}

    saved = save(arranged(source))
    assert "state/optimizer/exp_avg/a.weight" in saved[1]
    restore(arranged(live), saved)
    assert moments(live) == moments(source)


def test_a_module_that_only_excludes_still_names_the_parameters() -> None:
    source, live = twins("ab"), twins("ba", seed=1)
    weights = fingerprint(live["model"])
    restore(live, save(source), only="optimizer")
    assert moments(live) == moments(source)
    assert fingerprint(live["model"]) == weights


@pytest.mark.parametrize("without", ["saved", "live", "both"])
def test_without_the_module_parameters_are_taken_by_position(without: str) -> None:
    source, live = twins("ab"), twins("ab", seed=1)
    saved = save({"optimizer": source["optimizer"]} if without in ("saved", "both") else source)
    own = {"optimizer": live["optimizer"]} if without in ("live", "both") else live
    restore(own, saved, only="optimizer")
    assert moments(live) == moments(source)
    shorter = {"optimizer": optim.Adam([nn.Parameter(torch.ones(2, 2))])}
    with pytest.raises(StateMismatchError) as raised:
        plan_apply(shorter, saved[0], "optimizer")
    assert len(raised.value.fields["unexpected"]) == 1


def test_parameters_that_no_module_owns_are_taken_by_position_among_named_ones() -> None:
    def make(seed: int, order: str) -> dict[str, Any]:
        torch.manual_seed(seed)
        model, loose = Twins("ab"), nn.Parameter(torch.ones(2, 2))
        named = {"a": model.a.weight, "b": model.b.weight, "x": loose}
        optimizer = optim.Adam([named[name] for name in order])
        for parameter in named.values():
            parameter.grad = torch.randn(2, 2)
        optimizer.step()
        return {"model": model, "optimizer": optimizer, "loose": loose}

    def of_all(run: dict[str, Any]) -> Any:
        state = run["optimizer"].state
        return moments(run), fingerprint(state[run["loose"]]["exp_avg"])

    source, live = make(0, "axb"), make(1, "bxa")
    restore({name: live[name] for name in ("model", "optimizer")}, save({n: source[n] for n in ("model", "optimizer")}))
    assert of_all(live) == of_all(source)


def test_two_optimizers_over_one_model() -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = Twins("ab")
        run = {
            "first": optim.Adam([model.a.weight]),
            "model": model,
            "second": optim.SGD([model.b.weight], momentum=0.9),
        }
        for parameter in model.parameters():
            parameter.grad = torch.randn(2, 2)
        run["first"].step()
        run["second"].step()
        return run

    source, live = make(0), make(1)
    restore(live, save(source))
    for name in ("first", "second"):
        states = [list(run[name].state.values()) for run in (source, live)]
        assert fingerprint(states[1]) == fingerprint(states[0])


def test_one_optimizer_over_two_modules_with_equal_names() -> None:
    def make(seed: int, order: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        optimizer = optim.Adam([one.weight, two.weight][::order])
        one.weight.grad, two.weight.grad = torch.full((2, 2), 1.0 + seed), torch.full((2, 2), 10.0 + seed)
        optimizer.step()
        return {"generator": one, "critic": two, "optimizer": optimizer}

    source, live = make(0, 1), make(5, -1)
    saved = save(source)
    assert {key for key in saved[1] if "exp_avg/" in key} == {
        "state/optimizer/exp_avg/weight",
        "state/optimizer/exp_avg/critic%2Fweight",
    }
    restore(live, saved)
    for name in ("generator", "critic"):
        values = [run["optimizer"].state[run[name].weight]["exp_avg"] for run in (source, live)]
        assert torch.equal(*values)
    renamed = {"g": live["generator"], "c": live["critic"], "optimizer": live["optimizer"]}
    with pytest.raises(StateMismatchError) as raised:
        plan_apply(renamed, saved[0])
    assert "optimizer/weight" in raised.value.fields["missing"]


def test_one_module_renamed_in_the_state_is_found_by_its_parameter_names() -> None:
    source, live = twins("ab"), twins("ba", seed=1)
    saved = save(source)
    mismatch = restore({"net": live["model"], "optimizer": live["optimizer"]}, saved, strict=False)
    assert mismatch.missing == ("net",)
    assert mismatch.unexpected == ("model",)
    assert moments(live) == moments(source)


def test_tied_parameters_have_one_state() -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        model["b"].weight = model["a"].weight
        run = {"model": model, "optimizer": optim.Adam(model.parameters())}
        run["model"]["a"].weight.grad = torch.randn(2, 2)
        run["optimizer"].step()
        return run

    source, live = make(0), make(1)
    saved = save(source)
    assert build_state(*saved)["optimizer"]["param_fqns"] == ["a.weight"]
    restore(live, saved)
    assert moments(live) == moments(source)


# -- exactness -----------------------------------------------------------------------------------


class HighPrecision(optim.Optimizer):
    """Keeps float32 moments and a float64 sum for parameters of any type, and a list, a dict, a text and a count."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 1.0 / 3, "name": "x", "schedule": [1, (2.5, None)], **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(
                        moment=torch.zeros(parameter.shape, dtype=torch.float32),
                        total=torch.zeros((), dtype=torch.float64),
                        history=[],
                        parts={"a": torch.zeros(2, dtype=torch.float32), "note": "text"},
                        note="some text",
                        raw=b"bytes",
                        count=0,
                        step=torch.tensor(0.0),
                    )
                state["moment"].lerp_(parameter.grad.float(), 0.1)
                state["total"] += parameter.grad.double().sum() / 3
                state["history"].append(parameter.grad.float().mean() / 3)
                state["parts"]["a"] += 1 / 3
                state["count"] += 1
                state["step"] += 1
                parameter.sub_(state["moment"].to(parameter.dtype))


def bf16_run(make: Make, seed: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    run = {"model": model, "optimizer": make(model.parameters())}
    train(model, run["optimizer"], steps)
    return run


@pytest.mark.parametrize("live_steps", [0, 2])
@pytest.mark.parametrize("hooked", [False, True])
def test_float32_state_of_bfloat16_parameters_is_not_rounded(hooked: bool, live_steps: int) -> None:
    source, live = bf16_run(HighPrecision, 0, 2), bf16_run(HighPrecision, 1, live_steps)
    if hooked:
        live["optimizer"].register_load_state_dict_pre_hook(lambda *_: None)
    restore(live, save(source))
    assert bits_of(live) == bits_of(source)
    state = live["optimizer"].state[live["model"].weight]
    assert (state["moment"].dtype, state["total"].dtype) == (torch.float32, torch.float64)
    assert type(state["history"]) is list
    train(live["model"], live["optimizer"], 1)


def test_values_the_live_state_has_as_another_type_are_replaced() -> None:
    source, live = run_of(OPTIMIZERS["adam"], steps=2), run_of(OPTIMIZERS["adam"], seed=1, steps=2)
    for state in live["optimizer"].state.values():
        state["exp_avg"] = state["exp_avg"].double()
        state["exp_avg_sq"] = torch.zeros(7)
        state["step"] = 3
    restore(live, save(source))
    assert bits_of(live) == bits_of(source)


def test_hyperparameters_that_only_exist_here_keep_their_values() -> None:
    source = bf16_run(HighPrecision, 0, 1)
    live = bf16_run(lambda params: HighPrecision(params, added=5, name="y"), 1, 1)
    restore(live, save(source))
    group = live["optimizer"].param_groups[0]
    assert (group["added"], group["name"], group["schedule"]) == (5, "x", [1, (2.5, None)])


@pytest.mark.parametrize("live_as", ["tensor", "float"])
@pytest.mark.parametrize("saved_as", ["tensor", "float"])
def test_a_learning_rate_may_be_a_tensor(saved_as: str, live_as: str) -> None:
    def make(kind: str, value: float) -> Make:
        return lambda params: optim.Adam(params, lr=torch.tensor(value) if kind == "tensor" else value, foreach=False)

    source, live = run_of(make(saved_as, 0.25), steps=1), run_of(make(live_as, 0.5), seed=1, steps=1)
    own = live["optimizer"].param_groups[0]["lr"]
    restore(live, save(source))
    found = live["optimizer"].param_groups[0]["lr"]
    assert float(found) == 0.25
    assert isinstance(found, torch.Tensor) == (saved_as == "tensor")
    if saved_as == live_as == "tensor":
        assert found is own


def test_named_parameters_keep_their_names_here() -> None:
    source = twins("ab")
    model = Twins("ba")
    live = {"model": model, "optimizer": optim.Adam(model.named_parameters())}
    restore(live, save(source))
    assert live["optimizer"].param_groups[0].get("param_names", ["b.weight", "a.weight"]) == ["b.weight", "a.weight"]
    assert moments(live) == moments(source)
    again = twins("ab", seed=1)
    restore(again, save(live))
    assert moments(again) == moments(source)
    assert "param_names" not in again["optimizer"].param_groups[0]


# -- hooks and overrides -------------------------------------------------------------------------


class Counting(optim.Adam):
    """Overrides both methods and has a value of its own."""

    loaded = 0
    total = 0

    def state_dict(self) -> Any:
        return {**super().state_dict(), "total": self.total}

    def load_state_dict(self, state_dict: Any) -> None:
        self.loaded += 1
        self.total = state_dict.pop("total")
        super().load_state_dict(state_dict)


def test_an_optimizer_that_overrides_loading_has_the_last_word() -> None:
    source, live = run_of(Counting, steps=2), run_of(Counting, seed=1, steps=1)
    source["optimizer"].total = 17
    saved = save(source)
    restore(live, saved)
    assert (live["optimizer"].loaded, live["optimizer"].total) == (1, 17)
    assert bits_of(live) == bits_of(source)
    assert build_state(*saved)["optimizer"]["total"] == 17


def test_an_instance_whose_loading_was_patched_gets_real_values() -> None:
    source, live = run_of(adam, steps=2), run_of(adam, seed=1, steps=2)
    seen: list[Any] = []
    optimizer = live["optimizer"]
    plain = optimizer.load_state_dict

    def patched(state: Any) -> None:
        seen.append(fingerprint(state["state"]))
        plain(state)

    optimizer.load_state_dict = patched
    restore(live, save(source))
    assert seen == [fingerprint(source["optimizer"].state_dict()["state"])]
    assert bits_of(live) == bits_of(source)


def test_an_override_that_rounds_is_reported() -> None:
    class Rounding(HighPrecision):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)

    source, live = bf16_run(Rounding, 0, 1), bf16_run(Rounding, 1, 1)
    with pytest.warns(
        RuntimeWarning, match="turned optimizer/moment from float32 into bfloat16; the resumed run is not"
    ):
        restore(live, save(source))


def test_load_hooks_see_real_values_and_may_change_them() -> None:
    source, live = run_of(adam, steps=2), run_of(adam, seed=1, steps=2)
    seen: list[Any] = []

    def before(optimizer: optim.Optimizer, state: Any) -> None:
        seen.append(fingerprint(state["state"]))

    def after(optimizer: optim.Optimizer) -> None:
        for values in optimizer.state.values():
            values["exp_avg"].mul_(2)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.75)

    live["optimizer"].register_load_state_dict_pre_hook(before)
    live["optimizer"].register_load_state_dict_post_hook(after)
    restore(live, save(source))
    assert seen == [fingerprint(source["optimizer"].state_dict()["state"])]
    for own, there in zip(live["optimizer"].state.values(), source["optimizer"].state.values(), strict=True):
        assert torch.equal(own["exp_avg"], there["exp_avg"] * 2)
        assert torch.equal(own["exp_avg_sq"], there["exp_avg_sq"])
    assert float(live["optimizer"].param_groups[0]["lr"]) == 0.75


def test_a_subclass_that_finishes_its_own_setup_gets_real_values() -> None:
    class Setup(optim.Adam):
        seen: Any = None

        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state)
            self.seen = [value["exp_avg"].clone() for value in self.state.values()]

    source, live = run_of(Setup, steps=2), run_of(Setup, seed=1, steps=2)
    restore(live, save(source))
    assert all(map(torch.equal, live["optimizer"].seen, [v["exp_avg"] for v in source["optimizer"].state.values()]))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"wrapped": state},
        lambda state: {**state, "state": list(state["state"].items())},
        lambda state: {**state, "state": {k: {"extra": 1, **v} for k, v in state["state"].items()}},
        lambda state: {
            **state,
            "param_groups": [{**group, "params": group["params"][::-1]} for group in state["param_groups"]],
        },
        lambda state: {**state, "param_groups": state["param_groups"] * 2},
    ],
    ids=["wrapped", "list", "reserved", "reversed", "doubled"],
)
def test_a_state_dict_of_another_form_is_handed_back_as_it_was(change: Callable[[Any], Any]) -> None:
    class Own(optim.Adam):
        found: Any = None

        def state_dict(self) -> Any:
            return change(super().state_dict())

        def load_state_dict(self, state_dict: Any) -> None:
            self.found = state_dict

    source, live = run_of(Own, steps=1), run_of(Own, seed=1, steps=1)
    expected = fingerprint(source["optimizer"].state_dict())
    restore(live, save(source))
    assert fingerprint(live["optimizer"].found) == expected


def test_state_that_belongs_to_no_parameter_is_kept() -> None:
    class Global(optim.Adam):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.state["global"] = {"count": 3, "sum": torch.ones(2)}

    source = run_of(optim.Adam, steps=0)
    source["optimizer"] = Global(source["model"].parameters())
    live = run_of(optim.Adam, seed=1)
    live["optimizer"] = Global(live["model"].parameters())
    live["optimizer"].state["global"] = {"count": 0, "sum": torch.zeros(2)}
    saved = save(source)
    restore(live, saved)
    assert fingerprint(live["optimizer"].state["global"]) == fingerprint(source["optimizer"].state["global"])
    assert build_state(*saved)["optimizer"]["state"]["global"]["count"] == 3


def test_an_optimizer_where_the_checkpoint_has_something_else() -> None:
    live = run_of(adam)
    for stored in (3, None, [1]):
        with pytest.raises(StateMismatchError, match="here it is an optimizer"):
            plan_apply({"optimizer": live["optimizer"]}, save({"optimizer": stored})[0])


def test_a_plain_dict_takes_an_optimizer_in_the_form_of_torch_and_gives_it_back() -> None:
    source, live = run_of(adam, steps=1), run_of(adam, seed=1)
    saved = save(source)
    taken: dict[str, Any] = {"model": {}, "optimizer": {}, "rng": {}}
    restore(taken, saved)
    live["optimizer"].load_state_dict(taken["optimizer"])
    assert fingerprint(live["optimizer"].state_dict()["state"]) == fingerprint(
        source["optimizer"].state_dict()["state"]
    )
    other = run_of(adam, seed=2)
    restore({"optimizer": other["optimizer"]}, save({"optimizer": source["optimizer"].state_dict()}))
    assert fingerprint(other["optimizer"].state_dict()["state"]) == fingerprint(
        source["optimizer"].state_dict()["state"]
    )


def test_hyperparameters_that_cannot_be_stored_are_named() -> None:
    run = run_of(adam)
    run["optimizer"].param_groups[0]["fn"] = lambda: 0
    with pytest.raises(UnsupportedStateError, match=r"optimizer/param_groups/0/fn holds a builtins\.function"):
        capture(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.update(group_sizes=[1]),
        lambda node: node.update(group_sizes=[4, 0]),
        lambda node: node["parameters"].append(node["parameters"][0]),
        lambda node: node["slots"]["exp_avg"].update(unknown=1),
        lambda node: node.update(slots={"exp_avg": 1}),
        lambda node: node.update(param_groups=[1]),
        lambda node: node.update(modules=[]),
        lambda node: node.pop("slots"),
        lambda node: node.update(parameters=[1]),
    ],
)
def test_an_optimizer_node_that_contradicts_itself_is_damage(change: Callable[[Any], Any]) -> None:
    tree, tensors = save(run_of(adam, steps=1))
    change(tree["optimizer"])
    with pytest.raises(CorruptCheckpointError):
        build_state(tree, tensors)


# -- schedulers, scaler, averages, loaders -------------------------------------------------------

SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=50),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [1, 2, 2, 30]),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "cyclic_function": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, scale_fn=lambda x: 1 / (1 + x), cycle_momentum=False
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.StepLR(o, 2)]),
    "swa": lambda o: swa_utils.SWALR(o, swa_lr=0.05),
}


@pytest.fixture
def _no_scheduler_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step\\(\\)`")
        yield


@pytest.mark.usefixtures("_no_scheduler_warnings")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(name: str) -> None:
    def make(seed: int, steps: int) -> dict[str, Any]:
        run = run_of(OPTIMIZERS["momentum"], seed)
        run["scheduler"] = SCHEDULERS[name](run["optimizer"])
        go_on(run, steps)
        return run

    def go_on(run: dict[str, Any], steps: int) -> list[Any]:
        rates = []
        for _ in range(steps):
            train(run["model"], run["optimizer"], 1)
            run["scheduler"].step(*([1.0] if name == "plateau" else []))
            rates.append(run["optimizer"].param_groups[0]["lr"])
        return rates

    source, live = make(0, 3), make(1, 1)
    saved = save(source)
    restore(live, saved)
    assert fingerprint(live["scheduler"]) == fingerprint(source["scheduler"])
    assert bits_of(live) == bits_of(source)
    rates = go_on(live, 6)
    restore({"rng": ac.RNG()}, saved, only="rng")
    assert rates == go_on(source, 6)
    assert bits_of(live) == bits_of(source)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_gradient_scaler_goes_on(enabled: bool) -> None:
    source, live = (torch.amp.GradScaler("cpu", init_scale=2.0**k, enabled=enabled) for k in (5, 9))
    if enabled:
        source.scale(torch.ones(1))
    restore({"scaler": live}, save({"scaler": source}))
    assert live.state_dict() == source.state_dict()


def test_averaged_weights_go_on() -> None:
    def make(seed: int) -> dict[str, Any]:
        run = run_of(adam, seed)
        run["ema"] = swa_utils.AveragedModel(run["model"], multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        for _ in range(2):
            train(run["model"], run["optimizer"], 1)
            run["ema"].update_parameters(run["model"])
        return run

    source, live = make(0), make(1)
    restore(live, save(source))
    for run in (source, live):
        run["ema"].update_parameters(run["model"])
    assert fingerprint(live["ema"].state_dict()) == fingerprint(source["ema"].state_dict())
    assert int(live["ema"].n_averaged) == 3


class Loader:
    """As torchdata's StatefulDataLoader: nested state, and a shuffle from the global generator."""

    def __init__(self) -> None:
        self.position = 0
        self.order = torch.randperm(10)

    def state_dict(self) -> dict[str, Any]:
        torch.rand(1)  # some draw a base seed when asked
        return {"_snapshot": {"_main": {"position": self.position, "order": self.order}}, "workers": ((), None)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.rand(1)
        self.position = state_dict["_snapshot"]["_main"]["position"]
        self.order = state_dict["_snapshot"]["_main"]["order"]


@pytest.mark.parametrize("order", [("loader", "rng"), ("rng", "loader")])
def test_a_data_loader_that_draws_when_asked_does_not_move_the_generators(order: tuple[str, ...]) -> None:
    torch.manual_seed(3)
    source: dict[str, Any] = {"loader": Loader(), "rng": ac.RNG()}
    source["loader"].position = 7
    saved = save({name: source[name] for name in order})
    expected = torch.rand(3)
    live = {"loader": Loader(), "rng": ac.RNG()}
    restore({name: live[name] for name in order}, saved)
    assert torch.equal(torch.rand(3), expected)
    assert live["loader"].position == 7
    assert torch.equal(live["loader"].order, source["loader"].order)


def test_what_an_object_is_given_is_its_own() -> None:
    live = Loader()
    saved: Saved = save({"loader": Loader()})
    restore({"loader": live}, saved)  # overwrites the memory it was read into
    assert sorted(live.order.tolist()) == list(range(10))


def test_an_object_that_cannot_give_its_state_yet_is_loaded_all_the_same() -> None:
    class Unborn(Loader):
        def state_dict(self) -> Any:
            if self.position == 0:
                raise ValueError("not begun")
            return super().state_dict()

    source, live = Unborn(), Unborn()
    source.position = 2
    restore({"loader": live}, save({"loader": source}))
    assert live.position == 2


def test_a_run_survives_a_checkpoint_on_disk(tmp_path: Path) -> None:
    source, live = run_of(OPTIMIZERS["adamw_amsgrad"], steps=3), run_of(OPTIMIZERS["adamw_amsgrad"], seed=1, steps=1)
    with ac.Checkpointer(tmp_path, source, writer=ac.Writer(kind="thread")) as ckpt:
        ckpt.save(1).result(timeout=60)
        train(source["model"], source["optimizer"], 3)
    with ac.Checkpointer(tmp_path, live, writer=ac.Writer(kind="thread")) as ckpt:
        ckpt.restore()
    train(live["model"], live["optimizer"], 3)
    assert bits_of(live) == bits_of(source)
    built = ac.load(tmp_path, 1)
    fresh = run_of(OPTIMIZERS["adamw_amsgrad"], seed=2)
    fresh["optimizer"].load_state_dict(built["optimizer"])
    assert built["optimizer"]["param_fqns"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(
        fresh["optimizer"].state_dict()["state"][0]["exp_avg"], built["optimizer"]["state"][0]["exp_avg"]
    )
