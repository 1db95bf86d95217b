"""A restore that fails, wherever and however, leaves everything as it was."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from state_helpers import Saved, fingerprint, generators, restore, save, train
from torch import nn, optim
from torch.optim import lr_scheduler

import asyncckpt as ac
from asyncckpt.errors import CorruptCheckpointError, InvalidOptionError, StateMismatchError
from asyncckpt.state.apply import plan_apply


class Fault(Exception):
    """Raised on purpose."""


class Counter:
    """An object that takes its state in two halves, draws numbers all the time, and may fail between them."""

    def __init__(self, value: float, faults: set[str] | None = None) -> None:
        self.first = self.second = torch.full((2,), float(value))
        self.name = "counter"
        self.faults = faults if faults is not None else set()

    def state_dict(self) -> dict[str, Any]:
        draw()
        return {"first": self.first, "second": self.second}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        draw()
        self.first = state["first"]
        if self.name in self.faults:
            self.faults.discard(self.name)  # once: undoing works
            raise Fault(self.name)
        self.second = state["second"]


def draw() -> None:
    random.random()
    np.random.rand()
    torch.rand(1)


class Picky(nn.Module):
    """Takes its extra state, then may fail."""

    def __init__(self, faults: set[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("seen", torch.randint(2**40, ()))
        self.inner = torch.randn(2)
        self.faults = faults
        self.register_load_state_dict_post_hook(self._check)

    def get_extra_state(self) -> Any:
        return {"inner": self.inner}

    def set_extra_state(self, state: Any) -> None:
        self.inner = state["inner"]
        draw()

    @staticmethod
    def _check(module: Any, _: Any) -> None:
        with torch.no_grad():
            module.weight.add_(1)
        if "picky" in module.faults:
            module.faults.discard("picky")
            raise Fault("picky")


class Fussy(optim.Adam):
    """Overrides loading, writes into its old tensors, and may fail afterwards."""

    faults: set[str]

    def load_state_dict(self, state: Any) -> None:
        for values in self.state.values():
            for value in values.values():
                value.fill_(77)
        self.param_groups[0]["lr"] = 77
        super().load_state_dict(state)
        if "fussy" in self.faults:
            self.faults.discard("fussy")
            raise Fault("fussy")


class FailingRNG(ac.RNG):
    faults: set[str]

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        if "rng" in self.faults:
            self.faults.discard("rng")
            raise Fault("rng")


def make(seed: int) -> dict[str, Any]:
    """One of everything, trained a little, every moment and generator different from run to run."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    faults: set[str] = set()
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    optimizer = optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    hooked = optim.AdamW(model[1].parameters(), lr=0.1)
    fussy = Fussy(model[2].parameters(), lr=0.1)
    fussy.faults = faults
    for one in (optimizer, hooked, fussy):
        train(model, one, 2)

    def after(_: Any) -> None:
        if "hooked" in faults:
            faults.discard("hooked")
            raise Fault("hooked")

    hooked.register_load_state_dict_post_hook(after)
    first, last = Counter(seed, faults), Counter(seed + 0.5, faults)
    first.name, last.name = "first", "last"
    rng = FailingRNG()
    rng.faults = faults
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    scheduler.last_epoch = seed
    return {
        "first": first,
        "rng": rng,
        "fussy": fussy,
        "model": model,
        "optimizer": optimizer,
        "hooked": hooked,
        "picky": Picky(faults),
        "scheduler": scheduler,
        "tensor": torch.randn(3),
        "array": np.random.rand(3),
        "values": {
            "step": seed,
            "list": [seed, torch.randn(2)],
            "deque": deque([seed]),
            "tuple": (seed, torch.randn(1)),
        },
        "ordered": OrderedDict(a=seed, b=np.random.rand(2)),
        "default": defaultdict(list, {"a": [seed]}),
        "bag": {seed},
        "epoch": seed,
        "last": last,
    }


def everything(run: dict[str, Any]) -> Any:
    """The generators before anything else: a counter draws when it is asked for its state."""
    kept = generators()
    states = {name: value for name, value in run.items() if not isinstance(value, Counter)}
    counters = {name: fingerprint(vars(value)) for name, value in run.items() if isinstance(value, Counter)}
    found = (kept, fingerprint(states), counters, identities(run))
    assert generators() == kept
    return found


def identities(run: dict[str, Any]) -> Any:
    tensors = {
        (name, index, slot): id(value)
        for name in ("optimizer", "hooked", "fussy")
        for index, state in enumerate(run[name].state.values())
        for slot, value in state.items()
    }
    return tensors, {name: id(value) for name, value in run.items()}, id(run["values"]["list"])


@pytest.fixture(scope="module")
def saved() -> Saved:
    return save(make(1))


def test_without_a_fault_everything_is_restored(saved: Saved) -> None:
    source, live = make(1), make(2)
    restore(live, saved)
    assert generators() == generators_of(saved)
    with torch.no_grad():
        live["picky"].weight.sub_(1)
    assert torch.allclose(live["picky"].weight, source["picky"].weight)
    for name in set(source) - {"rng", "picky", "first", "last", "model"}:
        value = source[name]
        own = live[name].state_dict() if hasattr(value, "state_dict") else live[name]
        assert fingerprint(own) == fingerprint(value.state_dict() if hasattr(value, "state_dict") else value), name
    assert fingerprint(live["model"].state_dict()) == fingerprint(source["model"].state_dict())
    assert live["first"].second.tolist() == [1, 1]


def generators_of(saved: Saved) -> Any:
    before = ac.RNG().state_dict()
    rng = ac.RNG()
    restore({"rng": rng}, saved, only="rng")
    found = generators()
    rng.load_state_dict(before)
    return found


@pytest.mark.parametrize("fault", ["first", "last", "picky", "hooked", "fussy", "rng"])
def test_a_fault_of_the_users_code_changes_nothing(saved: Saved, fault: str) -> None:
    live = make(2)
    before = everything(live)
    live["first"].faults.add(fault)
    with pytest.raises(Fault, match=fault) as raised:
        restore(live, saved)
    assert everything(live) == before
    notes = raised.value.__notes__
    assert notes == [f"asyncckpt: while restoring {fault!r}; what had been loaded was put back"]
    restore(live, saved)
    assert generators() == generators_of(saved)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_keeps_its_type(saved: Saved, error: type[BaseException]) -> None:
    live = make(2)
    before = everything(live)

    def fail(*_: Any) -> None:
        raise error("mine")

    handle = live["picky"].register_load_state_dict_pre_hook(fail)
    with pytest.raises(error, match="mine"):
        restore(live, saved)
    handle.remove()
    assert everything(live) == before


FAULTS: dict[str, Callable[[dict[str, torch.Tensor], str], Any]] = {
    "missing": lambda tensors, key: tensors.pop(key),
    "dtype": lambda tensors, key: tensors.update({key: tensors[key].to(torch.complex64)}),
    "shape": lambda tensors, key: tensors.update({key: torch.cat([tensors[key].reshape(-1)] * 2)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_array_that_does_not_fit_the_tree_changes_nothing(saved: Saved, fault: str) -> None:
    live = make(2)
    tree, tensors = saved
    assert len(tensors) > 30
    for key in tensors:
        damaged = dict(tensors)
        FAULTS[fault](damaged, key)
        plan = plan_apply(live, tree)
        before = everything(live)
        with pytest.raises(CorruptCheckpointError) as raised:
            plan.execute(damaged)
        assert raised.value.fields["key"] == key
        assert everything(live) == before, key


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "tensor": (lambda run: run.update(tensor=torch.zeros(4)), "tensor"),
    "array": (lambda run: run.update(array=np.zeros(3, np.int8)), "array"),
    "module": (lambda run: run["model"].append(nn.Linear(1, 1)), "model/3.weight"),
    "new": (lambda run: run.update(new=1), "new"),
    "gone": (lambda run: run.pop("epoch"), "epoch"),
    "list": (lambda run: run["values"].update(list=3), "values/list"),
    "parameter": (lambda run: run["optimizer"].add_param_group({"params": [run["tensor"]]}), "optimizer/2"),
    "deep": (lambda run: run["values"]["list"].__setitem__(1, torch.zeros(9)), "values/list/1"),
    "tuple": (lambda run: run["values"].update(tuple=(1, torch.zeros(9))), "values/tuple/1"),
    "shorter": (lambda run: run["values"]["list"].append(torch.zeros(9)), "values/list/2"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_does_not_fit_is_reported_and_not_changed(saved: Saved, name: str) -> None:
    change, path = CHANGES[name]
    live = make(2)
    change(live)
    # A plan asks for states, and a counter draws; nothing else of it may move.
    before = everything(live)[1:]
    with pytest.raises(StateMismatchError) as raised:
        plan_apply(live, saved[0])
    assert path in [path for paths in raised.value.fields.values() for path in paths]
    assert everything(live)[1:] == before


# -- undoing that fails --------------------------------------------------------------------------


class Stubborn(Counter):
    """Cannot go back."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["first"][0] == 2:
            raise OSError("no way back")
        super().load_state_dict(state)


def test_what_cannot_be_put_back_is_named_and_the_rest_is_put_back() -> None:
    faults = {"last"}
    source = {"a": Counter(1), "stubborn": Stubborn(1), "last": Counter(1), "w": torch.ones(2)}
    live = {"a": Counter(2), "stubborn": Stubborn(2), "last": Counter(2, faults), "w": torch.zeros(2)}
    live["last"].name = "last"
    with pytest.raises(Fault) as raised:
        restore(live, save(source))
    assert raised.value.__notes__ == [
        "asyncckpt: while restoring 'last'; what had been loaded was put back",
        "asyncckpt: 'stubborn' could not be put back: OSError('no way back')",
    ]
    assert live["a"].second.tolist() == [2, 2]
    assert live["last"].first.tolist() == [2, 2]
    assert live["w"].tolist() == [0, 0]


class Unborn(Counter):
    def state_dict(self) -> dict[str, Any]:
        if self.first[0] == 2:
            raise ValueError("not begun")
        return super().state_dict()


def test_an_object_without_a_state_to_go_back_to_is_named() -> None:
    live = {"unborn": Unborn(2), "last": Counter(2, {"counter"})}
    with pytest.raises(Fault) as raised:
        restore(live, save({"unborn": Unborn(1), "last": Counter(1)}))
    assert "'unborn' could not be put back: RuntimeError('it had no state to go back to')" in raised.value.__notes__[1]


def test_a_state_in_the_middle_of_a_graph_can_be_put_back() -> None:
    def make_one(value: float, faults: set[str]) -> Counter:
        counter = Counter(value, faults)
        counter.first = counter.second = torch.full((2,), float(value), requires_grad=True) * 2
        return counter

    class InDefaultdict(Counter):
        def state_dict(self) -> Any:
            return defaultdict(list, super().state_dict())

    live: dict[str, Any] = {"a": make_one(2, set()), "last": Counter(2, {"counter"})}
    live["b"] = InDefaultdict(2)
    live["b"].first = live["b"].second = torch.full((2,), 2.0, requires_grad=True) * 2
    with pytest.raises(Fault):
        restore(
            {"a": live["a"], "b": live["b"], "last": live["last"]}, save({k: Counter(1) for k in ("a", "b", "last")})
        )
    assert live["a"].first.tolist() == live["a"].second.tolist() == [4, 4]
    assert live["b"].first.tolist() == live["b"].second.tolist() == [4, 4]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_is_lazy_again() -> None:
    source = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    source(torch.ones(3, 3))
    live = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    before = fingerprint(live)
    state = {"model": live, "optimizer": HookedAdam([nn.Parameter(torch.ones(1))])}
    with pytest.raises(Fault):
        restore(state, save({"model": source, "optimizer": optim.Adam([nn.Parameter(torch.ones(1))])}))
    assert fingerprint(live) == before
    restore({"model": live}, save({"model": source}))
    assert torch.equal(live(torch.ones(3, 3)), source(torch.ones(3, 3)))


class HookedAdam(optim.Adam):
    def load_state_dict(self, state: Any) -> None:
        raise Fault("adam")


def test_inference_tensors_and_state_that_is_not_of_torch_are_put_back() -> None:
    with torch.inference_mode():
        source, live = nn.Linear(2, 2), nn.Linear(2, 2)
    before = fingerprint(live)
    optimizers = [HookedAdam([nn.Parameter(torch.ones(1))]) for _ in range(2)]
    with pytest.raises(Fault):
        restore({"model": live, "optimizer": optimizers[1]}, save({"model": source, "optimizer": optimizers[0]}))
    assert fingerprint(live) == before


# -- containers ----------------------------------------------------------------------------------


def test_containers_stay_the_same_objects() -> None:
    live = {
        "d": {"old": 1, "x": [1]},
        "l": [1, 2, 3],
        "o": OrderedDict(a=1),
        "s": {1},
        "q": deque([1]),
        "m": defaultdict(list),
    }
    filled = {"d": {"x": [2, 3], "new": (1,)}, "l": [9], "o": OrderedDict(b=2)}
    saved = save({**filled, "s": {2}, "q": deque([2, 3]), "m": defaultdict(list, a=1)})
    parts = [live, *live.values(), live["d"]["x"]]
    ids = list(map(id, parts))
    with pytest.raises(StateMismatchError, match="d/old"):
        restore(live, saved)
    restore(live, saved, strict=False)
    assert list(map(id, [live, *live.values(), live["d"]["x"]])) == ids
    assert live["d"] == {"x": [2, 3], "new": (1,), "old": 1}
    assert (live["l"], live["s"], live["q"], live["m"]) == ([9], {2}, deque([2, 3]), {"a": 1})


def test_a_deque_of_another_bound_is_replaced() -> None:
    live = {"q": deque([1], 2)}
    restore(live, save({"q": deque([1, 2, 3], 3)}))
    assert live["q"] == deque([1, 2, 3])
    assert live["q"].maxlen == 3


def test_live_objects_in_lists_and_tuples_are_loaded_in_place() -> None:
    def make_one(kind: Callable[[Any], Any]) -> dict[str, Any]:
        return {"models": kind([nn.Linear(2, 2), {"w": torch.randn(2)}, int(torch.randint(9**9, ()))])}

    for saved_kind in (list, tuple):
        for live_kind in (list, tuple):
            source, live = make_one(saved_kind), make_one(live_kind)
            model, tensor = live["models"][0], live["models"][1]["w"]
            restore(live, save(source))
            assert type(live["models"]) is live_kind
            assert live["models"][0] is model
            assert live["models"][1]["w"] is tensor
            assert torch.equal(model.weight, source["models"][0].weight)
            assert torch.equal(tensor, source["models"][1]["w"])
            assert live["models"][2] == source["models"][2]


LIVE_OBJECTS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"model": nn.Linear(1, 1)},
    "list": lambda: [torch.zeros(2)],
    "tuple": lambda: ({"a": [np.zeros(2)]},),
    "ordered": lambda: OrderedDict(scheduler=ac.RNG()),
    "default": lambda: defaultdict(list, a=[nn.Linear(1, 1)]),
}


@pytest.mark.parametrize("stored", [3, None, "x", torch.ones(2), {7}, deque([1]), np.ones(2), torch.Size([1])])
@pytest.mark.parametrize("name", LIVE_OBJECTS)
def test_live_objects_are_never_replaced_by_values(name: str, stored: Any) -> None:
    live = {"run": LIVE_OBJECTS[name]()}
    with pytest.raises(StateMismatchError) as raised:
        plan_apply(live, save({"run": stored})[0])
    assert raised.value.fields["mismatched"] == ["run"]


@pytest.mark.parametrize(
    ("live", "stored"), [({}, [1]), ({"a": {}}, {"a": 1}), (3, {"a": 1}), (3, torch.ones(1)), ([], 1)]
)
def test_a_container_is_no_value_and_a_value_no_container(live: Any, stored: Any) -> None:
    state = {"run": live}
    if isinstance(live, dict) and isinstance(stored, list):
        restore(state, save({"run": stored}))
        assert state["run"] == stored
        return
    with pytest.raises(StateMismatchError, match=r"run.* the checkpoint has a|1 different"):
        plan_apply(state, save({"run": stored})[0])


def test_a_live_container_in_itself_is_no_endless_loop() -> None:
    cycle: list[Any] = [nn.Linear(1, 1)]
    cycle.append(cycle)
    live = {"run": cycle, "optimizer": optim.SGD(cycle[0].parameters())}
    saved = save({"run": [nn.Linear(1, 1)], "optimizer": live["optimizer"]})
    with pytest.raises(StateMismatchError) as raised:
        plan_apply(live, saved[0])
    assert raised.value.fields["missing"] == ["run/1"]


def test_a_read_only_state_takes_what_is_loaded_in_place_only() -> None:
    model = nn.Linear(1, 1)
    live: Mapping[str, Any] = MappingProxyType({"model": model, "values": {"a": 1}, "epoch": 0, "pair": (1, 2)})
    saved = save({"model": nn.Linear(1, 1), "values": {"a": 2}, "epoch": 3, "pair": (3, 4)})
    for only in (None, "epoch", "pair"):
        with pytest.raises(InvalidOptionError, match=r"read-only, so '(epoch|pair)' cannot be restored"):
            plan_apply(live, saved[0], only)
    restore(live, saved, only=["model", "values"])  # type: ignore[arg-type]
    assert live["values"] == {"a": 2}
    assert torch.equal(model.weight, torch.as_tensor(saved[1]["state/model/weight"]))


def test_a_plan_says_what_it_is() -> None:
    state = {"model": nn.Linear(1, 1), "epoch": 1}
    assert repr(plan_apply(state, save(state)[0])) == "<ApplyPlan of 2 arrays for model, epoch>"
    assert repr(plan_apply({}, save({})[0])) == "<ApplyPlan of 0 arrays for nothing>"
