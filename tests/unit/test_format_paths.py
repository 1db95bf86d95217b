"""Names in a root: any text becomes one safe component, and comes back."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.paths import (
    check_key,
    escape_component,
    join_key,
    parse_step_name,
    step_name,
    unescape_component,
)

# Surrogates included, which `st.text` leaves out.
TEXTS = st.text(st.characters(codec=None), max_size=80) | st.text("c.01_%~/zarrjson\\", max_size=12)


@pytest.mark.parametrize(
    ("text", "component"),
    [
        ("weight", "weight"),
        ("h.0.attn", "h.0.attn"),
        ("", "%"),
        (".", "%2E"),
        ("..", "%2E."),
        ("...", "..."),
        ("a/b", "a%2Fb"),
        ("%41", "%2541"),
        ("a~b", "a%7Eb"),
        ("é", "%C3%A9"),
        ("\ud800", "%ED%A0%80"),
        ("zarr.json", "%7Aarr.json"),
        ("zarr.jsons", "zarr.jsons"),
        ("__init__", "%5F_init__"),
        ("_x", "_x"),
        ("c", "%63"),
        ("c.0", "%63.0"),
        ("c.0.17", "%63.0.17"),
        ("c.", "c."),
        ("c.x", "c.x"),
        ("c0", "c0"),
        ("c.0\n", "c.0%0A"),
        ("c.\u0661", "c.%D9%A1"),  # a digit, but not one of a chunk's name
    ],
)
def test_escapes_are_those_of_the_document(text: str, component: str) -> None:
    assert escape_component(text) == component
    assert unescape_component(component) == text


@given(TEXTS)
@example("c" + ".0" * 3)
@example("x" * 200)
@example("\U0001f600" * 20)
def test_every_text_becomes_one_safe_component_and_comes_back(text: str) -> None:
    component = escape_component(text)
    assert re.fullmatch(r"[A-Za-z0-9._%~-]{1,200}", component)
    assert component not in (".", "..", "zarr.json")
    assert not re.fullmatch(r"c(\.\d+)*|__.*", component)
    assert check_key(component) == component
    assert unescape_component(component) == (None if "~" in component else text)


@given(TEXTS, TEXTS)
def test_different_texts_have_different_components(one: str, other: str) -> None:
    assert (escape_component(one) == escape_component(other)) == (one == other)


def test_long_texts_are_cut_and_keep_apart() -> None:
    assert escape_component("x" * 200) == "x" * 200
    cut = escape_component("x" * 201)
    assert re.fullmatch(r"x{167}~[0-9a-f]{32}", cut)
    assert cut != escape_component("x" * 202)
    assert unescape_component(cut) is None


@pytest.mark.parametrize("component", ["%4", "%zz", "%61", "%c3%a9", "%C3", "é", "a/b", "c.0", "%41%", "a b", "% 1"])
def test_components_nobody_wrote_are_refused(component: str) -> None:
    with pytest.raises(CorruptCheckpointError, match="is not an escaped key"):
        unescape_component(component)


def test_keys_are_escaped_part_by_part() -> None:
    assert join_key(["state", "a/b", "c"]) == "state/a%2Fb/%63"
    assert check_key("state/a%2Fb/%63~0") == "state/a%2Fb/%63~0"


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", ".", "a/..", "../a", "a/./b", "a b", "é", "a\\b", "a\0", "a\n", "x" * 256]
)
def test_keys_that_leave_the_step_are_refused(key: str) -> None:
    with pytest.raises(CorruptCheckpointError, match="is not a key of a checkpoint"):
        check_key(key)


@given(st.integers(0, 10**18 - 1))
@example(0)
@example(99_999_999)
@example(100_000_000)
def test_step_names_come_back(step: int) -> None:
    assert parse_step_name(step_name(step)) == step


def test_steps_are_padded_to_eight_digits() -> None:
    assert step_name(500) == "step-00000500"
    assert step_name(123_456_789) == "step-123456789"


@pytest.mark.parametrize(
    "name",
    ["step-500", "step-000000500", "step-0000050a", "step--0000001", "step-00000500\n", "xstep-00000500", "step-",
     "step-" + "1" * 19, "step-\u0660\u0661\u0661\u0661\u0661\u0661\u0661\u0661"],
)  # fmt: skip
def test_other_names_are_no_steps(name: str) -> None:
    assert parse_step_name(name) is None
