"""Valid input, changed at random: the readers end in a documented error, within a second."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from forge import seal_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import HEADER, TARGETS, TREE, feed, seeds

SEEDS = seeds()
HARMLESS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

# (position as a fraction, how many bytes are replaced, by what)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40)), max_size=4)

_WORDS = ["", "..", "/etc/passwd", "state/w", "float32", "qint8", "tensor", "tuple", "custom", "\0"]
_NAMES = ["$", "key", "shape", "items", "value", "dtype", "view", "x"]
junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(_WORDS),
        st.text(max_size=8),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4),
    max_leaves=8,
)


def edit(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for where, length, new in changes:
        at = int(where * len(data))
        data = data[:at] + new + data[at + length :]
    return data


def change_at(node: Any, path: list[int], new: Any, other: Any) -> None:
    """Replace what lies down *path*; sometimes also exchange it with a part of *other*."""
    while isinstance(node, (dict, list)) and node:
        key = list(node)[path[0] % len(node)] if isinstance(node, dict) else path[0] % len(node)
        if len(path) == 1 or not isinstance(node[key], (dict, list)) or not node[key]:
            node[key] = new if new is not None else other
            return
        node, path = node[key], path[1:]


@pytest.mark.parametrize("target", range(len(TARGETS)), ids=[target.__name__ for target in TARGETS])
@HARMLESS
@given(data=st.data())
def test_changed_bytes(target: int, data: st.DataObject) -> None:
    own = [seed for number, seed in SEEDS if number == target]
    feed(target, edit(data.draw(st.sampled_from(own)), data.draw(edits)))


@HARMLESS
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), junk, st.sampled_from(list(TREE.values())))
def test_changed_trees(path: list[int], new: Any, other: Any) -> None:
    tree = copy.deepcopy(TREE)
    change_at(tree, path, new, copy.deepcopy(other))
    feed(1, json.dumps(tree).encode())


@HARMLESS
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), junk)
def test_changed_headers(path: list[int], new: Any) -> None:
    header = copy.deepcopy(HEADER)
    change_at(header, path, new, None)
    feed(0, seal_header(header))


def test_the_seeds_are_valid() -> None:
    for number, seed in SEEDS:
        TARGETS[number](seed)
