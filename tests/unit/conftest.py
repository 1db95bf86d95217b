"""Helpers beside the tests, for the importlib import mode, and stores whose calls wait or fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncckpt.stores import LocalStore, Store
from asyncckpt.testing import Fault, FaultStore, Gate
from asyncckpt.writer import service

sys.path.insert(0, str(Path(__file__).parent))  # `state_helpers` is shared by the tests of `asyncckpt.state`


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate() as gate:
        yield gate


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the store of a thread writer meet these faults."""

    def install(*faults: Fault) -> None:
        def open_faulty(url: str) -> Store:
            return FaultStore(LocalStore(url.removeprefix("file://")), faults)

        monkeypatch.setattr(service, "open_store", open_faulty)

    return install


@pytest.fixture
def commit_gate(gate: Gate, faulty: Callable[..., None]) -> Gate:
    """Every commit of a thread writer waits here."""
    faulty(Fault("rename", key="*step-*", gate=gate))
    return gate
