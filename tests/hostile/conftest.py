"""One committed step with everything in it, to be copied and tampered with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# `forge` and `victim` are shared with programs that run without pytest.
sys.path.insert(0, str(Path(__file__).parent))

import victim


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with step 5; read only."""
    root = tmp_path_factory.mktemp("pristine") / "run"
    victim.save(root, victim.STEP)
    return root
