"""Random generators go on with the very numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from state_helpers import build_state, generators, restore, save

import asyncckpt as ac
from asyncckpt.errors import InvalidOptionError, StateMismatchError


def draw() -> list[Any]:
    """From every generator, normal deviates too: they come in pairs, one of which waits."""
    return [
        random.random(),
        random.gauss(0, 1),
        random.getrandbits(100),
        np.random.rand(3).tolist(),
        np.random.randn(3).tolist(),
        np.random.randint(10**9),
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
        torch.randperm(20).tolist(),
    ]


@pytest.fixture(autouse=True)
def _own_generators() -> Iterator[None]:
    before = ac.RNG().state_dict()
    yield
    np.random.set_bit_generator(np.random.MT19937())  # type: ignore[attr-defined]
    ac.RNG().load_state_dict(before)


@pytest.mark.parametrize("drawn_before", [0, 1, 700])
@pytest.mark.parametrize("drawn_between", [0, 1, 3])
def test_generators_go_on_where_they_were(drawn_before: int, drawn_between: int) -> None:
    for _ in range(drawn_before):
        draw()
    saved = save({"rng": ac.RNG()})
    expected = [draw() for _ in range(3)]
    for _ in range(drawn_between):
        draw()
    restore({"rng": ac.RNG()}, saved)
    assert [draw() for _ in range(3)] == expected


def test_a_waiting_deviate_is_part_of_the_state() -> None:
    random.gauss(0, 1)
    np.random.randn()
    saved = save({"rng": ac.RNG()})
    expected = random.gauss(0, 1), np.random.randn()
    random.seed(0)
    np.random.seed(0)
    restore({"rng": ac.RNG()}, saved)
    assert (random.gauss(0, 1), np.random.randn()) == expected


def test_saving_draws_nothing() -> None:
    before = generators()
    save({"rng": ac.RNG()})
    assert generators() == before


def test_another_bit_generator_of_numpy_is_kept() -> None:
    np.random.set_bit_generator(np.random.PCG64(5))  # type: ignore[attr-defined]
    np.random.rand()
    saved = save({"rng": ac.RNG()})
    expected = np.random.rand(3).tolist()
    restore({"rng": ac.RNG()}, saved)
    assert np.random.rand(3).tolist() == expected


def test_a_state_of_another_bit_generator_is_refused_and_nothing_moves() -> None:
    saved = save({"rng": ac.RNG()})
    np.random.set_bit_generator(np.random.PCG64(5))  # type: ignore[attr-defined]
    before = generators()
    with pytest.raises(StateMismatchError, match="random state cannot be set here"):
        restore({"rng": ac.RNG()}, saved)
    assert generators() == before


@pytest.mark.parametrize("part", ["python", "numpy", "torch", "cuda"])
@pytest.mark.parametrize("value", [None, 3, {}, torch.ones(3)])
def test_a_state_that_is_none_is_refused_and_nothing_moves(part: str, value: Any) -> None:
    rng = ac.RNG()
    state = rng.state_dict()
    draw()
    before = generators()
    if part == "cuda" and value == {}:
        return
    with pytest.raises(StateMismatchError, match="random state cannot be set here"):
        rng.load_state_dict({**state, part: value})
    assert generators() == before


@pytest.mark.parametrize("broken", [None, {}, {"python": {}}, []])
def test_a_state_of_another_form_is_refused(broken: Any) -> None:
    before = generators()
    with pytest.raises(StateMismatchError):
        ac.RNG().load_state_dict(broken)
    assert generators() == before


def test_states_of_devices_that_are_not_here_are_ignored() -> None:
    rng = ac.RNG()
    state = rng.state_dict()
    rng.load_state_dict({**state, "cuda": {**state["cuda"], 99: torch.zeros(16, dtype=torch.uint8)}})


def test_what_is_built_is_what_load_state_dict_takes(tmp_path: Path) -> None:
    ac.save_sync(tmp_path, 1, {"rng": ac.RNG()})
    expected = draw()
    for built in (build_state(*save({"rng": ac.RNG()})), ac.load(tmp_path, 1)):
        assert sorted(built["rng"]) == ["cuda", "numpy", "python", "torch"]
    ac.RNG().load_state_dict(built["rng"])
    assert draw() == expected


class Drawing:
    """Draws from every generator whenever it is saved or loaded."""

    def state_dict(self) -> dict[str, Any]:
        draw()
        return {"x": 1}

    def load_state_dict(self, state: Any) -> None:
        draw()


@pytest.mark.parametrize("position", [0, 1, 2])
def test_generators_are_saved_and_loaded_after_everything_that_may_draw(position: int) -> None:
    def make() -> dict[str, Any]:
        values: list[Any] = [Drawing(), Drawing()]
        values.insert(position, ac.RNG())
        return {str(index): value for index, value in enumerate(values)}

    saved = save(make())
    expected = draw()
    restore(make(), saved)
    assert draw() == expected


def test_devices_have_an_index() -> None:
    assert repr(ac.RNG()) == "RNG()"
    assert repr(ac.RNG(["cuda:1", 0, torch.device("cuda", 2)])) == "RNG(devices=[1, 0, 2])"
    with pytest.raises(InvalidOptionError, match="needs devices with an index"):
        ac.RNG(["cuda"])
