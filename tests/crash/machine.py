"""What several tests do to, or wait for from, the machine: processes and disks."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["frozen", "wait_gone"]

_TIMEOUT_S = 60


def wait_gone(pid: int) -> None:
    """Block until the process (not our child) has ended."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            assert select.select([descriptor], [], [], _TIMEOUT_S)[0], f"process {pid} is still there"
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def frozen(disk: Path) -> Iterator[None]:
    """A disk that hangs: whoever writes to it is kept in the kernel, where no signal reaches."""
    if subprocess.run(["fsfreeze", "-f", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("freezing a file system is not possible here")
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
