"""Helpers beside the tests, for the importlib import mode."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `state_helpers` is shared by the tests of `asyncckpt.state`
