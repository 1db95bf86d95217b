"""The kill loop of ``tests/crash/soak``: a short one here, a thousand kills with ``--full``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfd and a child subreaper")

RUN = Path(__file__).parent / "soak" / "run.py"


@pytest.mark.timeout(3600)
def test_random_kills_lose_nothing_tear_nothing_and_leave_nothing(tmp_path: Path, full: bool) -> None:
    # Twenty kills or as many as fit: a slow machine runs a shorter loop, not a longer one.
    kills, minutes = (1000, 55.0) if full else (20, 0.3)
    done = subprocess.run(
        [sys.executable, str(RUN), f"--kills={kills}", f"--minutes={minutes}", f"--directory={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    summary = json.loads(done.stdout)
    assert summary["violations"] == []
    assert done.returncode == 0
    assert summary["num_kills"] > 0
    assert summary["saves"].get("staged", 0) > 0
