"""Committed steps to tamper with."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `forge` is shared with fuzz_atheris.py, which runs without pytest
