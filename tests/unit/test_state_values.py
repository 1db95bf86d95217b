"""Plain values and containers: what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_helpers import build_state, fingerprint, restore, save
from torch import nn

import asyncckpt as ac
from asyncckpt.errors import CorruptCheckpointError, UnsupportedStateError
from asyncckpt.state.apply import plan_apply
from asyncckpt.state.capture import capture


class Color(enum.Enum):
    RED = "red"
    CRIMSON = RED
    BLUE = (0, 0, 255)


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    TRAIN = "train"


class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


def nan_of(bits: str) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(bits))[0]
    return value


VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "false": False,
    "zero": 0,
    "safe_int": 2**53,
    "unsafe_int": 2**53 + 1,
    "negative_int": -(2**53) - 1,
    "huge_int": 3**10_000,
    "float": 0.1,
    "whole_float": 1.0,
    "big_float": 1e22,
    "tiny_float": 5e-324,
    "negative_zero": -0.0,
    "inf": math.inf,
    "negative_inf": -math.inf,
    "nan": math.nan,
    "negative_nan": nan_of("fff8000000000000"),
    "nan_payload": nan_of("7ff8dead0000beef"),
    "complex": complex(-0.0, 1e-300),
    "complex_nan": complex(nan_of("7ff8000000000001"), math.inf),
    "text": "loss \u00e9\u4e2d\U0001f600\x00\n",
    "empty_text": "",
    "lone_surrogate": "file\udcff",
    "bytes": bytes(range(256)),
    "empty_bytes": b"",
    "enum": Color.RED,
    "enum_alias": Color.CRIMSON,
    "enum_tuple": Color.BLUE,
    "int_enum": Level.LOW,
    "str_enum": Mode.TRAIN,
    "flag": Access.READ,
    "flag_of_two": Access.READ | Access.WRITE,
    "flag_of_none": Access(0),
    "path": Path("/data/run 1/\u00e9"),
    "path_of_bytes": Path(os.fsdecode(b"/data/\xff")),
    "datetime": datetime(2024, 2, 29, 12, 30, 15, 999999),
    "datetime_fold": datetime(2024, 10, 27, 2, 30, fold=1),
    "datetime_utc": datetime(2024, 1, 1, tzinfo=UTC),
    "datetime_offset": datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=-5, minutes=-30, seconds=-7))),
    "dtype": torch.bfloat16,
    "device": torch.device("cuda:3"),
    "device_without_index": torch.device("cpu"),
    "size": torch.Size([2, 0, 3]),
    "empty_size": torch.Size([]),
    "list": [1, [2.0, [None, ["x"]]], []],
    "tuple": (1, (2, (), ([],)), [()]),
    "tuple_with_none": (None, (None, torch.ones(1)), [None]),
    "none_beside_tensors": {1: None, "a": torch.ones(1), "b": OrderedDict(x=None, y=torch.ones(1))},
    "dict": {"a": {"b": {}}, "$": 1, "c": {"$": {"$": None}}},
    "ordered": OrderedDict([("b", 1), ("a", OrderedDict())]),
    "defaultdict": defaultdict(list, {"a": [1], 2: ()}),
    "defaultdict_without_factory": defaultdict(None, {"a": 1}),
    "counter": Counter({"a": 3, "b": -1}),
    "deque": deque([1, "x", (2,)], maxlen=5),
    "unbounded_deque": deque(),
    "set": {1, 2, 3},
    "mixed_set": {1, "a", None},
    "frozenset": frozenset({"a", "b"}),
    "tensors": [torch.arange(3), (torch.zeros(()), {"x": torch.ones(2, 0)}), OrderedDict(y=torch.ones(1))],
}


@pytest.mark.parametrize("name", VALUES)
def test_every_value_is_built_and_restored_exactly(name: str) -> None:
    value = VALUES[name]
    saved = save({"value": value})
    built = build_state(*saved)["value"]
    assert fingerprint(built) == fingerprint(value)
    live: dict[str, Any] = {"value": None}
    restore(live, saved)
    assert fingerprint(live["value"]) == fingerprint(value)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_restored_over_itself_is_unchanged(name: str) -> None:
    live = {"value": VALUES[name]}
    before = fingerprint(live)
    restore(live, save(live))
    assert fingerprint(live) == before


KEYS: list[Any] = [
    "1", 1, 1.5, "1.5", None, "None", False, "False", (), "()", (1, ("a", None)), "(1, ('a', None))",
    -0.5, math.inf, "inf", 2**80, "", "$", "a/b", "a", "int:1", "float:1.5", "%", ".", "..", "zarr.json", "c", "c.0",
    "__x", "\udcff", "x" * 300, "x" * 299 + "y", ("x" * 300,), "A", "\u00e9",
]  # fmt: skip


@pytest.mark.parametrize("value", [7, torch.arange(2)], ids=["plain", "tensor"])
def test_dict_keys_of_every_kind_live_side_by_side(value: Any) -> None:
    state = {"run": {key: {"deep": value, "index": index} for index, key in enumerate(KEYS)}}
    if isinstance(value, torch.Tensor):
        state["run"] = {key: {"deep": value + index} for index, key in enumerate(KEYS)}
    saved = save(state)
    assert fingerprint(build_state(*saved)) == fingerprint(state)
    live = {"run": {key: {"deep": value * 0} for key in KEYS}}
    restore(live, saved)
    assert fingerprint(live) == fingerprint(state)


def test_keys_that_are_not_a_number_keep_their_entries() -> None:
    state = {"run": {math.nan: torch.ones(1), nan_of("7ff8dead0000beef"): torch.zeros(1)}}
    assert fingerprint(build_state(*save(state))) == fingerprint(state)


def test_names_of_the_state_may_be_any_text() -> None:
    state: dict[str, Any] = {"$": torch.ones(1), "": 1, "a/b": torch.zeros(1), "\udcff": torch.ones(2), "a": {"b": 1}}
    saved = save(state)
    assert fingerprint(build_state(*saved)) == fingerprint(state)


def test_a_module_and_its_optimizer_may_have_any_name() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"\udcff": model, "optimizer": optimizer}
    saved = save(state)
    before = fingerprint(state)
    optimizer.step()
    restore(state, saved)
    assert fingerprint(state) == before


def test_a_datetime_of_a_named_zone_keeps_the_instant_and_the_wall_clock() -> None:
    value = datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1)
    built = build_state(*save({"at": value}))["at"]
    assert built.utcoffset() == value.utcoffset() == timedelta(hours=1)
    assert built.astimezone(UTC) == value.astimezone(UTC)
    assert (built.replace(tzinfo=None), built.fold) == (value.replace(tzinfo=None), 1)


def test_a_path_comes_back_as_a_path_of_this_system() -> None:
    assert build_state(*save({"p": PurePosixPath("a/b")}))["p"] == Path("a/b")


def test_versions_in_a_state_dict_are_kept() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    plain = module.state_dict()
    built = build_state(*save({"saved": plain, "module": module}))
    assert fingerprint(built["saved"]) == fingerprint(plain)
    assert built["module"]._metadata == plain._metadata
    assert list(built["module"]) == list(plain)


# -- arbitrary states ----------------------------------------------------------------------------

_floats = st.floats(allow_nan=True, allow_subnormal=True)
_texts = st.text(st.characters(exclude_categories=()), max_size=6)
_keys = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts,
    lambda inner: st.tuples(inner, inner) | st.tuples(inner),
    max_leaves=3,
)
_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8])
_tensors = st.builds(lambda dtype, shape: torch.ones(shape).to(dtype), _dtypes, st.lists(st.integers(0, 3), max_size=3))
_arrays = st.builds(lambda dtype, n: np.arange(n).astype(dtype), st.sampled_from(["f4", "i8", "?"]), st.integers(0, 4))
_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | _floats
    | st.complex_numbers()
    | _texts
    | st.binary(max_size=6)
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.sampled_from([*Color, Level.LOW, torch.float16, torch.device("cuda:0"), torch.Size([1])])
    | _tensors
    | _arrays
)
_states = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(_keys, inner, max_size=4)
        | st.dictionaries(_keys, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(_keys, inner, max_size=4).map(lambda items: defaultdict(list, items))
        | st.lists(inner, max_size=4).map(lambda items: deque(items, 4))
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_texts, _states, max_size=4))
def test_any_state_is_built_and_restored_exactly(state: dict[str, Any]) -> None:
    saved = save(state)
    expected = fingerprint(state)
    assert fingerprint(build_state(*saved)) == expected
    live = dict.fromkeys(state)
    restore(live, saved)
    assert fingerprint(live) == expected


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_texts, _states, max_size=3), st.dictionaries(_texts, _states, max_size=3))
def test_restoring_into_another_state_gives_the_saved_one_or_changes_nothing(
    state: dict[str, Any], live: dict[str, Any]
) -> None:
    live = {**live, **{name: live.get(name) for name in state}}
    before = fingerprint(live)
    try:
        restore(live, save(state))
    except ac.StateMismatchError as error:
        assert fingerprint(live) == before
        if not any(error.fields.values()):
            raise
        return
    for name, value in state.items():
        assert same_but_for_extra_entries(live[name], value)


def same_but_for_extra_entries(live: Any, saved: Any) -> bool:
    """A live dict takes every saved entry, keeps its own type and order, and nothing the checkpoint lacks is left."""
    if isinstance(saved, dict) and isinstance(live, dict) and not isinstance(saved, Counter):
        return len(live) == len(saved) and all(
            key in live and same_but_for_extra_entries(live[key], value) for key, value in saved.items()
        )
    if isinstance(saved, list | tuple) and isinstance(live, list | tuple):
        return len(live) == len(saved) and all(map(same_but_for_extra_entries, live, saved))
    if isinstance(saved, deque):
        return fingerprint(live) == fingerprint(saved)
    return bool(fingerprint(live) == fingerprint(saved))


# -- what cannot be stored -----------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    x: int = 0


Point = namedtuple("Point", "x y")


def a_function() -> None: ...


class MyInt(int): ...


class MyDict(dict): ...  # type: ignore[type-arg]


def local_enum() -> enum.Enum:
    return enum.Enum("Local", "A").A  # type: ignore[attr-defined, no-any-return]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "object": (object, "builtins.object"),
    "lambda": (lambda: lambda: 0, "builtins.function"),
    "function": (lambda: a_function, "builtins.function"),
    "builtin": (lambda: len, "builtins.builtin_function_or_method"),
    "class": (lambda: Record, "builtins.type"),
    "generator": (lambda: (x for x in ()), "builtins.generator"),
    "iterator": (lambda: iter([]), "builtins.list_iterator"),
    "dataclass": (Record, f"{__name__}.Record"),
    "namedtuple": (lambda: Point(1, 2), f"{__name__}.Point"),
    "int_subclass": (lambda: MyInt(3), f"{__name__}.MyInt"),
    "dict_subclass": (lambda: MyDict(a=1), f"{__name__}.MyDict"),
    "bytearray": (lambda: bytearray(b"x"), "builtins.bytearray"),
    "range": (lambda: range(3), "builtins.range"),
    "slice": (lambda: slice(3), "builtins.slice"),
    "ellipsis": (lambda: ..., "builtins.ellipsis"),
    "exception": (lambda: ValueError("x"), "builtins.ValueError"),
    "module": (lambda: math, "builtins.module"),
    "generator_of_torch": (torch.Generator, "torch._C.Generator"),
    "generator_of_numpy": (lambda: np.random.default_rng(0), "numpy.random._generator.Generator"),
    "layout": (lambda: torch.strided, "torch.layout"),
    "timedelta": (timedelta, "datetime.timedelta"),
    "class_of_modules": (lambda: nn.Linear, "builtins.type"),
    "local_enum": (local_enum, f"{__name__}.Local"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("around", [lambda value: value, lambda value: [torch.ones(1), value]], ids=["dict", "list"])
def test_other_values_are_refused_with_path_and_type(name: str, around: Callable[[Any], Any]) -> None:
    make, kind = REFUSED[name]
    with pytest.raises(UnsupportedStateError) as raised:
        capture({"run": {"odd": around(make())}})
    path = "run/odd" if around(0) == 0 else "run/odd/1"
    assert raised.value.fields == {"key": path, "type": kind}
    assert str(raised.value).startswith(f"{path} holds a {kind}")
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize(
    "key", [b"x", 1j, Color.RED, Path("x"), frozenset(), (1, b"x"), MyInt(1), np.int64(3), Point(1, 2)]
)
@pytest.mark.parametrize("value", [0, torch.ones(1)], ids=["plain", "tensor"])
@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda items: defaultdict(list, items)])
def test_other_keys_are_refused(key: Any, value: Any, kind: Callable[[Any], Any]) -> None:
    with pytest.raises(UnsupportedStateError, match=r"run.*has an? .* as key"):
        capture({"run": kind({key: value})})


@pytest.mark.parametrize("name", [1, None, ("a",), b"x"])
def test_names_of_the_state_are_texts(name: Any) -> None:
    with pytest.raises(UnsupportedStateError, match="names in the state are texts"):
        capture({name: 1})


def test_a_defaultdict_with_a_function_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedStateError, match="defaultdict with the factory"):
        capture({"run": defaultdict(lambda: 0)})


def cyclic_list() -> Any:
    cycle: list[Any] = [1]
    cycle.append(cycle)
    return cycle


def cyclic_pair() -> Any:
    cycle: list[Any] = []
    cycle += [(cycle, cycle), cycle]
    return cycle


def cyclic_dict() -> Any:
    cycle: dict[Any, Any] = {}
    cycle[3] = {"deeper": [cycle]}
    return cycle


def cyclic_ordered() -> Any:
    cycle: OrderedDict[str, Any] = OrderedDict()
    cycle["self"] = cycle
    return cycle


def cyclic_default() -> Any:
    cycle: defaultdict[str, Any] = defaultdict(dict)
    cycle["self"] = cycle
    return cycle


def cyclic_deque() -> Any:
    cycle: deque[Any] = deque()
    cycle.append(cycle)
    return cycle


class Ouroboros:
    """Its state is another one of its kind."""

    def state_dict(self) -> Any:
        return {"again": Ouroboros()}

    def load_state_dict(self, state: Any) -> None: ...


@pytest.mark.parametrize("make", [cyclic_list, cyclic_pair, cyclic_dict, cyclic_ordered, cyclic_default, cyclic_deque])
def test_a_container_in_itself_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(UnsupportedStateError, match="nested more than 64 levels"):
        capture({"run": make()})


def test_an_object_inside_the_state_of_an_object_is_refused() -> None:
    with pytest.raises(UnsupportedStateError, match=r"run/again is a .*Ouroboros inside the state of another object"):
        capture({"run": Ouroboros()})


def nested(levels: int, innermost: Any, wrap: Callable[[Any], Any]) -> Any:
    for _ in range(levels):
        innermost = wrap(innermost)
    return innermost


def tuple_key(levels: int) -> Any:
    return nested(levels, (), lambda inner: (inner,))


WRAPS: dict[str, Callable[[Any], Any]] = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"a": inner},
    "keys": lambda inner: {1: inner},
    "ordered": lambda inner: OrderedDict(a=inner),
    "default": lambda inner: defaultdict(list, a=inner),
    "deque": lambda inner: deque([inner]),
    "tensor": lambda inner: [inner, torch.ones(1)],
}
INNERMOST: dict[str, Callable[[], Any]] = {
    "number": lambda: 1,
    "empty": list,
    "tensor": lambda: torch.ones(1),
    "tuple_key": lambda: {(1, (2, ())): 1},
    "deep_tuple_key": lambda: {tuple_key(40): 1},
    "deep_tuple_key_with_tensor": lambda: {tuple_key(40): torch.ones(1)},
    "metadata": lambda: nn.BatchNorm1d(1).state_dict(),
    "enum": lambda: Color.RED,
    "size": lambda: torch.Size([1]),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("innermost", INNERMOST)
def test_whatever_is_taken_at_the_limit_of_depth_can_be_read_again(wrap: str, innermost: str) -> None:
    num_taken = 0
    for levels in range(2, 68):
        state = {"run": nested(levels, INNERMOST[innermost](), WRAPS[wrap])}
        try:
            saved = save(state)
        except UnsupportedStateError as error:
            if "levels deep" not in str(error):
                raise
            continue
        num_taken += 1
        assert fingerprint(build_state(*saved)) == fingerprint(state)
    assert 0 < num_taken < 66


@pytest.mark.parametrize("value", [1, torch.ones(1)], ids=["plain", "tensor"])
def test_a_key_that_is_nested_without_end_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedStateError, match="levels deep"):
        capture({"run": {tuple_key(500): value}})


def test_a_tree_that_is_nested_too_deep_is_damage() -> None:
    tree = nested(2000, {"$": "torch.Size", "items": []}, lambda inner: {"$": "custom", "type": "x:y", "value": inner})
    with pytest.raises(CorruptCheckpointError, match="nested too deep"):
        build_state({"run": tree}, {})


@pytest.mark.parametrize("tree", [[], 3, {"$": "dict", "items": [[1, 2]]}, {"$": "tuple", "items": []}])
def test_a_tree_that_is_not_a_state_is_damage(tree: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="not a state with named entries"):
        plan_apply({}, tree)


@pytest.mark.parametrize(
    "node",
    [
        {"$": "torch.device", "name": "toaster:0"},
        {"$": "torch.device", "name": 3.5},
        {"$": "torch.dtype", "name": "float12"},
        {"$": "torch.Size", "items": [1.5]},
        {"$": "custom", "type": 3, "value": 1},
        {"$": "custom", "type": "collections:deque", "value": 1},
        {"$": "custom", "type": "collections:defaultdict", "value": {"factory": "exec", "items": {}}},
        {"$": "custom", "type": "collections:defaultdict", "value": 1},
        {"$": "tensor", "key": "state/x", "dtype": ["float32"], "shape": [1]},
        {"$": "npscalar", "dtype": "float32", "data": "!"},
        {"$": "unheard-of"},
        {"$": ["list"]},
    ],
)
def test_a_malformed_node_is_damage(node: Any) -> None:
    with pytest.raises(CorruptCheckpointError):
        build_state({"run": node}, {})
    for live in (None, deque()):
        with pytest.raises(CorruptCheckpointError):
            plan_apply({"run": live}, {"run": node}).execute({})


@pytest.mark.parametrize("live", [{}, OrderedDict(), defaultdict(list)])
def test_a_malformed_defaultdict_does_not_fit_a_live_dict(live: Any) -> None:
    with pytest.raises(ac.StateMismatchError, match="run"):
        plan_apply({"run": live}, {"run": {"$": "custom", "type": "collections:defaultdict", "value": 1}})


def test_a_member_that_an_enum_lost_is_no_damage() -> None:
    for value, change in ((Color.RED, {"name": "GREEN"}), (Access(3), {"value": 1 << 9})):
        tree, _ = save({"run": value})
        tree["run"].update(change)
        with pytest.raises(UnsupportedStateError, match="no such member now"):
            build_state(tree, {})


def test_an_enum_that_is_not_imported_here_says_what_to_import() -> None:
    tree, _ = save({"run": Color.RED})
    tree["run"]["type"] = "not_imported:Color"
    with pytest.raises(UnsupportedStateError, match="import not_imported first"):
        build_state(tree, {})


def test_every_value_survives_a_checkpoint_on_disk(tmp_path: Path) -> None:
    state = {**VALUES, "keys": {key: torch.full((2,), float(i)) for i, key in enumerate(KEYS)}}
    expected = fingerprint(state)
    ac.save_sync(tmp_path, 1, state)
    assert fingerprint(ac.load(tmp_path, 1)) == expected
