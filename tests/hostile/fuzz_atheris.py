"""Coverage-guided fuzzing of everything that parses stored bytes (`targets`); by hand, not part of the tests.

    pip install atheris
    python tests/hostile/fuzz_atheris.py -max_total_time=3600

The first byte of an input chooses the target. A failure is a crash, and libFuzzer writes the input to ``crash-*``.
With ``KEEP_GOING=DIR`` in the environment one input per place of failure is written to that directory instead,
and fuzzing goes on.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(include=["asyncckpt.format", "asyncckpt.state", "targets"]):
    from targets import feed, seeds


def fuzz_one(data: bytes) -> None:
    if data:
        feed(data[0], data[1:])


def fuzz_one_and_go_on(data: bytes) -> None:
    try:
        fuzz_one(data)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__}-{Path(frame.filename).stem}-{frame.lineno}"
        found = Path(os.environ["KEEP_GOING"], place)
        if not found.exists():
            print(f"FAILED {place}: {error}", flush=True)
            found.write_bytes(data)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="asyncckpt-corpus-") as corpus:
        for number, (target, data) in enumerate(seeds()):
            Path(corpus, f"seed-{number}").write_bytes(bytes([target]) + data)
        atheris.Setup([*sys.argv, corpus], fuzz_one_and_go_on if "KEEP_GOING" in os.environ else fuzz_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
