"""Types that the user taught asyncckpt to store."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from state_helpers import build_state, fingerprint, restore, save
from torch import nn

import asyncckpt as ac
from asyncckpt.errors import CorruptCheckpointError, InvalidOptionError, UnsupportedStateError
from asyncckpt.state import registry
from asyncckpt.state.capture import capture


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = None


class Special(Point):
    """Not registered itself."""


class MostSpecial(Special):
    """Registered beside its base."""


@dataclasses.dataclass
class Other:
    z: int = 0


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point, until the end of the test."""
    for table in ("_codecs", "_by_name", "_found"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    ac.register_type(Point, lambda point: [point.x, point.y], lambda stored: Point(*stored))


def round_trip(value: Any) -> Any:
    saved = save({"run": [value, 1]})
    built = build_state(*saved)["run"][0]
    live: dict[str, Any] = {"run": None}
    restore(live, saved)
    assert type(live["run"][0]) is type(built)
    return built


@pytest.mark.parametrize(
    "x", [1, None, "a", (1, None), {"a": {2: 3}}, [Point(1, Point(2))], deque([1]), Counter("aab")]
)
def test_a_registered_value_comes_back(x: Any) -> None:
    assert round_trip(Point(x)) == Point(x)


def test_its_tensors_are_stored_as_arrays(tmp_path: Path) -> None:
    value = Point(torch.arange(300), {"t": torch.ones(2)})
    saved = save({"run": value})
    assert sorted(saved[1]) == ["state/run/0", "state/run/1/t"]
    assert fingerprint(vars(build_state(*saved)["run"])) == fingerprint(vars(value))
    ac.save_sync(tmp_path, 1, {"run": value})
    assert fingerprint(vars(ac.load(tmp_path, 1)["run"])) == fingerprint(vars(value))


def test_a_subclass_comes_back_as_the_registered_base() -> None:
    assert type(round_trip(Special(1))) is Point


def test_the_nearest_registered_base_counts_also_when_it_is_registered_later() -> None:
    assert type(round_trip(MostSpecial(1))) is Point
    ac.register_type(MostSpecial, lambda value: value.x, MostSpecial)
    assert type(round_trip(MostSpecial(1))) is MostSpecial
    assert type(round_trip(Special(1))) is Point


def test_registering_again_replaces_the_functions() -> None:
    ac.register_type(Point, lambda point: {"x": point.x}, lambda stored: Point(stored["x"], "new"))
    assert round_trip(Point(1, 2)) == Point(1, "new")


def test_a_type_that_is_not_registered_when_restoring_is_named() -> None:
    saved = save({"run": Point(1)})
    registry._by_name.clear()
    for use in (lambda: build_state(*saved), lambda: restore({"run": None}, saved)):
        with pytest.raises(
            UnsupportedStateError, match=r"Point, which is not registered here; call asyncckpt.register"
        ):
            use()


def test_an_encoder_that_returns_something_unsupported_is_named_by_path() -> None:
    ac.register_type(Other, lambda value: {"fine": 1, "odd": object()}, lambda stored: Other())
    with pytest.raises(UnsupportedStateError, match=r"run/1/odd holds a builtins\.object") as raised:
        capture({"run": [0, Other()]})
    assert raised.value.fields["key"] == "run/1/odd"


def test_an_encoder_that_returns_its_own_kind_is_no_endless_loop() -> None:
    ac.register_type(Other, lambda value: Other(value.z + 1), lambda stored: stored)
    with pytest.raises(UnsupportedStateError, match="nested more than 64 levels deep"):
        capture({"run": Other()})


def test_errors_of_the_functions_arrive_as_they_are() -> None:
    def fail(value: Any) -> Any:
        raise ZeroDivisionError("mine")

    ac.register_type(Other, fail, fail)
    with pytest.raises(ZeroDivisionError, match="mine"):
        capture({"run": Other()})
    ac.register_type(Other, lambda value: value.z, fail)
    live = {"run": Other(5), "w": torch.zeros(1)}
    with pytest.raises(ZeroDivisionError, match="mine"):
        restore(live, save({"run": Other(6), "w": torch.ones(1)}))
    assert (live["run"], live["w"].item()) == (Other(5), 0)


@pytest.mark.parametrize("cls", [int, dict, list, str, object, type, type(None), OrderedDict, 3, "Point", Point(1)])
def test_what_is_stored_already_or_no_class_cannot_be_registered(cls: Any) -> None:
    with pytest.raises(InvalidOptionError, match="register_type needs a class"):
        ac.register_type(cls, lambda value: value, lambda stored: stored)


def test_a_name_that_is_no_text_is_damage() -> None:
    with pytest.raises(CorruptCheckpointError, match="not a string"):
        build_state({"run": {"$": "custom", "type": 3, "value": 1}}, {})


class Tokenizer:
    """Has a state of its own, and is registered all the same."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def state_dict(self) -> Any:
        raise AssertionError("never asked")

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("never asked")


class Pair(torch.Tensor):
    """A wrapper: its values are in two other tensors."""

    high: torch.Tensor
    low: torch.Tensor

    @staticmethod
    def __new__(cls, high: torch.Tensor, low: torch.Tensor) -> Pair:
        return torch.Tensor._make_wrapper_subclass(cls, high.shape, dtype=high.dtype)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, high: torch.Tensor, low: torch.Tensor) -> None:
        self.high, self.low = high, low

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Pair(args[0].high, args[0].low)
        if func is torch.ops.aten.clone.default:
            return Pair(args[0].high.clone(), args[0].low.clone())
        if func is torch.ops.aten.copy_.default:
            args[0].high.copy_(args[1].high)
            args[0].low.copy_(args[1].low)
            return args[0]
        raise NotImplementedError(func)


def register_pair() -> None:
    ac.register_type(Pair, lambda pair: (pair.high, pair.low), lambda stored: Pair(*stored))


def pair(value: float) -> Pair:
    return Pair(torch.full((2,), value), torch.full((2,), value / 3))


def parts(value: Any) -> list[float]:
    return [*value.high.tolist(), *value.low.tolist()]


def test_a_registered_object_with_a_state_of_its_own_is_replaced() -> None:
    ac.register_type(Tokenizer, lambda value: value.words, Tokenizer)
    live = {"tokenizer": Tokenizer(["old"]), "deep": [Tokenizer([])]}
    restore(live, save({"tokenizer": Tokenizer(["a", "b"]), "deep": [Tokenizer(["c"])]}))
    assert live["tokenizer"].words == ["a", "b"]
    assert live["deep"][0].words == ["c"]


def test_a_wrapper_tensor_is_refused_until_its_class_is_registered() -> None:
    with pytest.raises(UnsupportedStateError, match=r"register the class with asyncckpt\.register_type"):
        capture({"t": pair(1)})
    register_pair()
    live = {"t": pair(0)}
    restore(live, save({"t": pair(1)}))
    assert type(live["t"]) is Pair
    assert parts(live["t"]) == parts(pair(1))


def test_a_registered_tensor_in_a_module_is_copied_into() -> None:
    register_pair()
    source, live = nn.Module(), nn.Module()
    source.weight, live.weight = (nn.Parameter(pair(value), requires_grad=False) for value in (1, 0))
    own = live.weight
    saved = save({"model": source})
    assert sorted(saved[1]) == ["state/model/weight/0", "state/model/weight/1"]
    restore({"model": live}, saved)
    assert live.weight is own
    assert parts(live.weight) == parts(pair(1))


def test_a_registered_tensor_in_a_module_is_put_back() -> None:
    register_pair()
    source, live = nn.Module(), nn.Module()
    source.weight, live.weight = (nn.Parameter(pair(value), requires_grad=False) for value in (1, 0))
    saved = save({"model": source})

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    live.register_load_state_dict_post_hook(fail)
    with pytest.raises(ZeroDivisionError):
        restore({"model": live}, saved)
    assert parts(live.weight) == parts(pair(0))


def test_registered_tensors_in_the_state_of_an_optimizer_come_back_exactly() -> None:
    class Wrapped(torch.optim.SGD):
        """Moments as pairs, which no operator of torch's may touch."""

    register_pair()

    def make(value: float) -> dict[str, Any]:
        model = nn.Linear(2, 1, bias=False, dtype=torch.float32)
        optimizer = Wrapped(model.parameters(), lr=0.1)
        optimizer.state[model.weight] = {"moment": pair(value), "words": Counter("aab"), "point": Point(value)}
        return {"model": model, "optimizer": optimizer}

    source, live = make(1), make(0)
    restore(live, save(source))
    state = live["optimizer"].state[live["model"].weight]
    assert parts(state["moment"]) == parts(pair(1))
    assert state["words"] == Counter("aab")
    assert state["point"] == Point(1)
