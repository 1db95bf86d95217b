"""The writer starts wherever Python runs: on stdin, without a main guard, in a notebook kernel, below odd files."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import asyncckpt as ac

SAVE = """
import torch
import asyncckpt as ac
with ac.Checkpointer({root!r}, {{"w": torch.ones(1000)}}) as ckpt:
    ckpt.save(1).result(timeout=60)
print("durable")
"""


def run(command: list[str], cwd: Path, **options: str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, **options)  # type: ignore[call-overload]
    assert done.stdout.endswith("durable\n"), done.stderr
    # The main module must not be run again by the writer.
    assert done.stdout.count("durable") == 1
    assert ac.open(cwd / "run").verify(1).ok


def test_script_on_stdin(tmp_path: Path) -> None:
    run([sys.executable, "-"], tmp_path, input=SAVE.format(root=str(tmp_path / "run")))


def test_script_without_a_main_guard(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SAVE.format(root=str(tmp_path / "run")))
    run([sys.executable, "train.py"], tmp_path)


def test_files_of_the_user_do_not_shadow_modules_of_the_writer(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SAVE.format(root=str(tmp_path / "run")))
    for name in ("xxhash", "msgspec", "numcodecs"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the writer imported a file of the user')")
    # The trainer itself must not see them either; -P keeps the script's directory off its path.
    run([sys.executable, "-P", "train.py"], tmp_path)


def test_relative_root_and_later_chdir(tmp_path: Path) -> None:
    script = """
    import os, torch
    import asyncckpt as ac
    with ac.Checkpointer("run", {"w": torch.ones(1000)}) as ckpt:
        os.chdir("/")
        ckpt.save(1).result(timeout=60)
    print("durable")
    """
    run([sys.executable, "-c", textwrap.dedent(script)], tmp_path)


def test_notebook_kernel(tmp_path: Path) -> None:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(cwd=str(tmp_path))
    try:
        printed: list[str] = []

        def collect(message: dict[str, dict[str, str]]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        client.execute_interactive(SAVE.format(root=str(tmp_path / "run")), timeout=100, output_hook=collect)
        client.execute_interactive("info = await ac.Checkpointer('again', {'w': torch.ones(3)}).save(1)", timeout=100)
        client.execute_interactive("print('awaited', info.step)", timeout=100, output_hook=collect)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "durable" in "".join(printed)
    assert "awaited 1" in "".join(printed)
