"""The two scripts beside this file as modules, and the enum that the fixture holds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"compat_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and named tuples look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reader() -> ModuleType:
    """``reader.py``, the second implementation."""
    return _load("reader")


@pytest.fixture(scope="session")
def fixture() -> ModuleType:
    """``make_fixture.py``: what must be in the fixture, and under ``fixture_enums`` the enum in it."""
    module = _load("make_fixture")
    enums = ModuleType("fixture_enums")
    enums.Phase = module.Phase  # type: ignore[attr-defined]
    sys.modules["fixture_enums"] = enums
    return module
