"""Python values as nodes: exactly the same value comes back, through JSON, and malformed nodes only raise."""

from __future__ import annotations

import base64
import collections
import contextlib
import enum
import math
import struct
import sys
import types
from collections import OrderedDict
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncckpt.errors import CorruptCheckpointError, UnsupportedStateError
from asyncckpt.format.tree import MAX_DEPTH, decode_value, encode_value
from asyncckpt.format.walk import iter_tensors


class Color(enum.Enum):
    RED = "r"
    ALSO_RED = RED


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    TRAIN = "train"


class Flags(enum.Flag):
    A = 1
    B = 2


class Outer:
    class Inner(enum.Enum):
        X = 1


def no_leaf(value: Any, path: str) -> None:
    return None


def refuse(node: dict[str, Any]) -> Any:
    raise CorruptCheckpointError(f"unknown tag {node['$']!r}")


def encode(value: Any) -> Any:
    return encode_value(value, "state", no_leaf)


def through_json(node: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(node))


def round_trip(value: Any) -> Any:
    return decode_value(through_json(encode(value)), refuse)


def exact(value: Any) -> Any:
    """A form of *value* that is equal only for the same types, bits and order."""
    kind = type(value)
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is complex:
        return kind, struct.pack(">dd", value.real, value.imag)
    if kind in (list, tuple):
        return kind, [exact(item) for item in value]
    if kind in (dict, OrderedDict):
        items = [(exact(key), exact(item)) for key, item in value.items()]
        return kind, items, exact(getattr(value, "_metadata", None))
    if kind is datetime:
        return kind, value.replace(tzinfo=None), value.utcoffset(), value.fold
    return kind, value


def nan(bits: int) -> float:
    return float(struct.unpack(">d", bits.to_bytes(8, "big"))[0])


TEXTS = st.text(st.characters(codec=None), max_size=6) | st.just("$")
OFFSETS = st.timedeltas(timedelta(hours=-23), timedelta(hours=23))
FLOATS = st.floats() | st.builds(nan, st.integers(0, 2**64 - 1))
KEY_ATOMS = st.none() | st.booleans() | st.integers() | FLOATS | TEXTS
KEYS = st.recursive(KEY_ATOMS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
ATOMS = (
    st.none() | st.booleans() | st.integers() | FLOATS | TEXTS
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([2**53, 2**53 + 1, -(2**53), -(2**53) - 1, 0.0, -0.0, math.inf, -math.inf, 1e22, 5e-324])
    | st.builds(complex, FLOATS, FLOATS)
    | st.binary(max_size=9)
    | st.sampled_from([Color.RED, Level.LOW, Mode.TRAIN, Outer.Inner.X, Flags.A, Flags.A | Flags.B, Flags(0)])
    | st.datetimes(timezones=st.none() | OFFSETS.map(timezone)).map(lambda when: when.replace(fold=1))
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.sampled_from([Path("/data/x y"), Path("."), Path("caf\udce9")])
)  # fmt: skip


def ordered(items: list[tuple[Any, Any]], metadata: Any) -> OrderedDict[Any, Any]:
    value = OrderedDict(items)
    if metadata is not None:
        value._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    return value


VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(TEXTS, inner, max_size=4)
        | st.builds(
            ordered,
            st.lists(st.tuples(KEYS, inner), max_size=3),
            st.none() | st.dictionaries(TEXTS, st.dictionaries(TEXTS, inner, max_size=2), max_size=2),
        )
    ),
    max_leaves=12,
)


@given(VALUES)
@example({"$": "tensor"})
@example({1: "int", "1": "str"})
@example([nan(0x7FF0000000000001), nan(0xFFF8DEADBEEF0001), -0.0])
@example({"b": 1, "a": 2, "\ud800": 3})
@example(OrderedDict({"b": 1, "a": 2}))
@example({(1, (None, -0.0), "x"): {(): []}})
@example(datetime(2000, 1, 1, tzinfo=timezone(timedelta(microseconds=1))))
@example(datetime(2000, 1, 1, tzinfo=timezone(-timedelta(microseconds=20))))
def test_every_value_comes_back_exactly(value: Any) -> None:
    assert exact(round_trip(value)) == exact(value)


@pytest.mark.parametrize(
    ("value", "node"),
    [
        (None, None),
        (True, True),
        (2**53, 2**53),
        (-(2**53), -(2**53)),
        (2**53 + 1, {"$": "int", "value": "0x20000000000001"}),
        (-(2**60), {"$": "int", "value": "-0x1000000000000000"}),
        (1.5, 1.5),
        (math.inf, {"$": "float", "bits": "7ff0000000000000"}),
        (nan(0x7FF8000000000001), {"$": "float", "bits": "7ff8000000000001"}),
        (1 + 2j, {"$": "complex", "real": 1.0, "imag": 2.0}),
        ("text", "text"),
        ("\ud800", {"$": "str", "value": "7aCA"}),
        (b"\0\1", {"$": "bytes", "value": "AAE="}),
        ([1, [2]], [1, [2]]),
        ((1,), {"$": "tuple", "items": [1]}),
        ({"a": 1}, {"a": 1}),
        ({"$": 1}, {"$": "dict", "items": [["$", 1]]}),
        ({"\ud800": 1}, {"$": "dict", "items": [[{"$": "str", "value": "7aCA"}, 1]]}),
        ({1: 2, None: 3}, {"$": "dict", "items": [[1, 2], [None, 3]]}),
        ({(1, "a"): 2}, {"$": "dict", "items": [[{"$": "tuple", "items": [1, "a"]}, 2]]}),
        (OrderedDict(a=1), {"$": "odict", "items": [["a", 1]]}),
        (ordered([], {"": {"version": 1}}), {"$": "odict", "items": [], "meta": {"": {"version": 1}}}),
        (Color.ALSO_RED, {"$": "enum", "type": f"{__name__}:Color", "name": "RED"}),
        (Outer.Inner.X, {"$": "enum", "type": f"{__name__}:Outer.Inner", "name": "X"}),
        (Flags.A | Flags.B, {"$": "enum", "type": f"{__name__}:Flags", "value": 3}),
        (PurePosixPath("/a"), {"$": "path", "value": "/a"}),
        (Path("\udce9"), {"$": "path", "value": {"$": "str", "value": "7bOp"}}),
        (
            datetime(2026, 1, 2, 3, 4, 5, 6, timezone(timedelta(hours=2)), fold=1),
            {"$": "datetime", "value": "2026-01-02T03:04:05.000006+02:00", "fold": 1},
        ),
    ],
)  # fmt: skip
def test_nodes_are_those_of_the_document(value: Any, node: Any) -> None:
    assert encode(value) == node
    assert exact(decode_value(through_json(node), refuse)) == exact(round_trip(value))


def test_floats_are_written_so_that_every_parser_reads_a_float() -> None:
    for value in (0.0, -0.0, 1e22, 1e15, 123456789012345680.0, 5e-324):
        text = msgspec.json.encode(encode(value)).decode()
        assert set(text) & {".", "e"}


# -- what cannot be stored -------------------------------------------------------------------------


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, Text("x"), collections.Counter("a"), datetime, bytearray(1), range(3),
     type("Number", (int,), {})(1), {b"key": 1}, {1j: 1}, {Text("x"): 1}, {Color.RED: 1}, {(1, b"x"): 1}],
)  # fmt: skip
def test_other_types_are_refused_with_path_and_type(value: Any) -> None:
    with pytest.raises(UnsupportedStateError, match=r"^state/a/0 ") as caught:
        encode_value({"a": [value]}, "state", no_leaf)
    assert caught.value.fields["key"] == "state/a/0"
    assert caught.value.fields["type"]


def test_leaves_know_better() -> None:
    value = {"a": [{1}]}
    node = encode_value(value, "", lambda leaf, path: {"$": "set", "path": path, "items": sorted(leaf)})
    assert node == {"a": [{"$": "set", "path": "a/0", "items": [1]}]}
    assert decode_value(node, lambda found, depth: set(found["items"])) == value


def test_an_enum_that_no_restore_could_find_is_refused_when_it_is_saved() -> None:
    class Local(enum.Enum):
        X = 1

    with pytest.raises(UnsupportedStateError, match="no restore could find"):
        encode(Local.X)


def nested(depth: int, wrap: Any, value: Any = 1) -> Any:
    for _ in range(depth):
        value = wrap(value)
    return value


WRAPS = {
    "list": lambda value: [value],
    "tuple": lambda value: (value,),
    "dict": lambda value: {"a": value},
    "items": lambda value: {1: value},
    "odict": lambda value: OrderedDict(a=value),
    "meta": lambda value: ordered([], {"": value}),
}


@pytest.mark.parametrize("name", WRAPS)
def test_what_can_be_nested_can_be_read_and_deeper_is_refused(name: str) -> None:
    levels = MAX_DEPTH // (2 if name == "meta" else 1)
    value = nested(levels, WRAPS[name])
    assert exact(round_trip(value)) == exact(value)
    with pytest.raises(UnsupportedStateError, match=f"nested more than {MAX_DEPTH} levels deep"):
        encode(nested(levels + 1, WRAPS[name]))


def test_keys_are_nested_no_deeper_either() -> None:
    value = {nested(MAX_DEPTH, WRAPS["tuple"]): 1}
    assert exact(round_trip(value)) == exact(value)
    with pytest.raises(UnsupportedStateError, match=f"nested more than {MAX_DEPTH} levels deep"):
        encode({nested(MAX_DEPTH + 1, WRAPS["tuple"]): 1})


# -- what is malformed -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda node: [node], lambda node: {"a": node}, lambda node: {"$": "tuple", "items": [node]},
    lambda node: {"$": "dict", "items": [[1, node]]}, lambda node: {"$": "odict", "items": [], "meta": {"a": node}},
])  # fmt: skip
def test_a_tree_that_nobody_could_write_is_refused_for_its_depth(wrap: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="levels deep"):
        decode_value(nested(3 * MAX_DEPTH, wrap), refuse)


MALFORMED: list[Any] = [
    {"$": None}, {"$": 1}, {"$": []}, {"$": {}}, {"$": "new"}, {"$": "tensor"},
    {"$": "int"}, {"$": "int", "value": 1}, {"$": "int", "value": "ten"}, {"$": "int", "value": None},
    {"$": "float"}, {"$": "float", "bits": "00"}, {"$": "float", "bits": "zz" * 8}, {"$": "float", "bits": 0.5},
    {"$": "complex", "real": 1.0}, {"$": "complex", "real": "x", "imag": 1.0}, {"$": "complex", "real": [], "imag": 1},
    {"$": "complex", "real": {"$": "float", "bits": ""}, "imag": 1.0},
    {"$": "str", "value": "!"}, {"$": "str", "value": "gA=="}, {"$": "str", "value": 1}, {"$": "str", "value": "é"},
    {"$": "bytes"}, {"$": "bytes", "value": "a"}, {"$": "bytes", "value": "AA==\n"}, {"$": "bytes", "value": None},
    {"$": "tuple"}, {"$": "tuple", "items": 1}, {"$": "tuple", "items": None}, {"$": "tuple", "items": [{"$": 1}]},
    {"$": "dict"}, {"$": "dict", "items": [1]}, {"$": "dict", "items": [[1]]}, {"$": "dict", "items": [[1, 2, 3]]},
    {"$": "dict", "items": [[[], 1]]}, {"$": "dict", "items": [[{}, 1]]},
    {"$": "odict", "items": {}, "meta": 1}, {"$": "odict", "items": [], "meta": [1]}, {"$": "odict", "meta": {}},
    {"$": "path"}, {"$": "path", "value": 1}, {"$": "path", "value": {"$": "str"}}, {"$": "path", "value": {"a": 1}},
    {"$": "datetime", "value": "now", "fold": 0}, {"$": "datetime", "value": "2026-01-01T00:00:00"},
    {"$": "datetime", "value": "2026-01-01T00:00:00", "fold": 2}, {"$": "datetime", "value": 1, "fold": 0},
    {"$": "enum"}, {"$": "enum", "type": 1, "name": "RED"}, {"$": "enum", "type": f"{__name__}:Color"},
    {"$": "enum", "type": f"{__name__}:Color", "name": []}, {"$": "enum", "type": f"{__name__}:Color", "value": 1},
    {"$": "enum", "type": f"{__name__}:Flags", "value": "x"},
    {"$": "enum", "type": f"{__name__}:Flags", "value": {"$": "int"}},
]  # fmt: skip


@pytest.mark.parametrize("node", MALFORMED, ids=repr)
@pytest.mark.parametrize("wrap", [lambda node: node, lambda node: {"a": [node]}], ids=["alone", "below"])
def test_malformed_nodes_are_damage(node: Any, wrap: Any) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode_value(wrap(node), refuse)


TAGS = ["int", "float", "complex", "str", "bytes", "tuple", "dict", "odict", "path", "datetime", "enum", "tensor"]
NAMES = ["$", "value", "items", "bits", "real", "imag", "meta", "type", "name", "fold", "key", "dtype", "shape"]
NODES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
    | st.sampled_from([*TAGS, "0x1", "AA==", "7ff0000000000000", f"{__name__}:Color", "RED"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    | st.builds(lambda tag, rest: {**rest, "$": tag}, st.sampled_from(TAGS),
                st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)),
    max_leaves=10,
)  # fmt: skip


@given(NODES)
def test_any_json_is_a_value_or_damage(node: Any) -> None:
    with contextlib.suppress(CorruptCheckpointError, UnsupportedStateError):
        decode_value(node, refuse)
    with contextlib.suppress(CorruptCheckpointError):
        list(iter_tensors(node))


# -- enums of other programs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["not_imported_anywhere:Color", f"{__name__}:Nothing", f"{__name__}:MAX_DEPTH", f"{__name__}:Text", "", ":",
             f"{__name__}:Color.RED", "builtins:int"]
)  # fmt: skip
def test_an_enum_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(UnsupportedStateError, match="is not an enum imported here") as caught:
        decode_value({"$": "enum", "type": name, "name": "RED"}, refuse)
    assert caught.value.fields["type"] == name


@pytest.mark.parametrize("member", [("Color", "name", "BLUE"), ("Flags", "value", 99)])
def test_a_member_that_the_enum_has_no_longer_is_no_damage(member: tuple[str, str, Any]) -> None:
    name, field, value = member
    with pytest.raises(UnsupportedStateError, match=f"{value}.*has no such member now"):
        decode_value({"$": "enum", "type": f"{__name__}:{name}", field: value}, refuse)


def test_a_checkpoint_causes_no_import(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = types.ModuleType("lazy_module")
    asked: list[str] = []
    lazy.__getattr__ = asked.append  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)
    for name in ("lazy_module:Color", "colorsys:Color"):
        with pytest.raises(UnsupportedStateError):
            decode_value({"$": "enum", "type": name, "name": "RED"}, refuse)
    assert asked == []


# -- looking for tensors ---------------------------------------------------------------------------


def tensor(name: str, **more: Any) -> dict[str, Any]:
    return {"$": "tensor", "key": name, "dtype": "float32", "shape": [2], **more}


def test_tensors_are_found_wherever_they_are_with_their_paths() -> None:
    tree = {
        "model": {"$": "odict", "items": [["w", tensor("k0")], [{"$": "tuple", "items": [1, "a"]}, tensor("k1")]]},
        "list": [1, tensor("k2"), {"$": "tuple", "items": [tensor("k3")]}],
        "other": {"$": "optimizer", "slots": {"exp_avg": {"w": tensor("k4")}}},
        "array": {"$": "ndarray", "key": "k5", "dtype": "int8", "shape": []},
        "keys": {"$": "dict", "items": [[{"$": "int", "value": "0xff"}, tensor("k6")], [None, tensor("k7")]]},
    }
    assert [(path, node["key"]) for path, node in iter_tensors(tree)] == [
        ("model/w", "k0"), ("model/(1, 'a')", "k1"), ("list/1", "k2"), ("list/2/0", "k3"),
        ("other/slots/exp_avg/w", "k4"), ("array", "k5"), ("keys/255", "k6"), ("keys/None", "k7"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "node",
    [
        tensor("k", key=1), tensor("k", dtype=None), tensor("k", shape=2), tensor("k", shape=[-1]),
        tensor("k", shape=["2"]), {"$": "tensor"}, {"$": "dict"}, {"$": "dict", "items": [1]},
        {"$": "dict", "items": [[1]]}, {"$": "tuple"}, {"$": "odict", "items": 5},
        {"$": "dict", "items": [[{"$": "int", "value": "x"}, 1]]},
    ],
)  # fmt: skip
def test_malformed_trees_are_damage_for_those_who_only_look_too(node: Any) -> None:
    with pytest.raises(CorruptCheckpointError):
        list(iter_tensors([node]))


def test_base64_in_the_document_is_the_plain_alphabet() -> None:
    assert encode(b"\xfb\xff")["value"] == base64.b64encode(b"\xfb\xff").decode() == "+/8="
