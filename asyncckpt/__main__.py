"""``python -m asyncckpt``: the command line."""

from __future__ import annotations

from asyncckpt.cli import main

main()
