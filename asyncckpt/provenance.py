"""Where a checkpoint comes from: the configuration, the code and the command of the run, as plain values."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

__all__ = ["run_metadata"]

_GIT_TIMEOUT_S = 5.0
_MAX_DEPTH = 20
_MAX_TEXT = 500
_HIDDEN = "(hidden)"
# Not a bare "key" or "token": `sort_key` and `pad_token` are no secrets.
_SECRET = re.compile(
    r"password|passwd|secret|credential|api_?key|access_?key|private_?key"
    r"|(^|_)(hf|hub|auth|access|api|github|gitlab|wandb|bearer|refresh)_?token|^token$",
    re.IGNORECASE,
)


def run_metadata(config: Any = None, **extra: Any) -> dict[str, Any]:
    """What made this run, for ``Checkpointer(metadata=...)``; never fails.

    The environment is not recorded. Values whose name says that they are secret (``api_key``, ``password``,
    ``hf_token``, ...) are replaced, in *config* and in the command line; names are all that is looked at.

    Args:
        config: a dataclass, namespace, mapping, or pydantic or attrs object. What is no plain value in it is
            recorded as its ``repr``.
        extra: more to record, converted likewise.

    Returns:
        ``config``, ``argv``, ``git`` (``commit``, ``branch``, ``dirty``; None without a repository or without
        git) and *extra*. The repository is that of the main script, else of the working directory.
    """
    plain_extra: dict[str, Any] = _plain(extra, 0)
    return {"config": _plain(config, 0), "argv": _argv(), "git": _git(_code_directory()), **plain_extra}


def _plain(value: Any, depth: int) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        return _plain_object(value, depth)
    except Exception as error:  # properties, reprs and iterators of the user's
        return f"({type(value).__qualname__} that cannot be described: {type(error).__name__})"


def _plain_object(value: Any, depth: int) -> Any:
    fields = _fields(value)
    if fields is not None and depth < _MAX_DEPTH:
        return {str(name): _named(str(name), item, depth + 1) for name, item in fields.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth < _MAX_DEPTH:
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bool | int | float | str):  # subclasses, NumPy's floats among them
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)[:_MAX_TEXT]


def _named(name: str, value: Any, depth: int) -> Any:
    # An empty secret hides nothing, and tells that none was given.
    return _HIDDEN if value and _SECRET.search(name) else _plain(value, depth)


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """The fields of a configuration object by name; None if it is none."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    names = getattr(type(value), "model_fields", None)  # pydantic
    if isinstance(names, dict):
        return {name: getattr(value, name) for name in names}
    attributes = getattr(type(value), "__attrs_attrs__", None)
    if attributes is not None:
        return {attribute.name: getattr(value, attribute.name) for attribute in attributes}
    is_namespace = isinstance(value, SimpleNamespace) or type(value).__name__ == "Namespace"
    return vars(value) if is_namespace else None


def _argv() -> list[str]:
    """The command line, without secrets: ``--api-key x``, ``--api-key=x``, ``api_key=x``."""
    shown: list[str] = []
    hides_next = False
    for argument in sys.argv:
        name, equals, _ = argument.partition("=")
        is_secret = bool(_SECRET.search(name.lstrip("-").replace("-", "_")))
        is_option = argument.startswith("-")
        if hides_next and not is_option:
            shown.append(_HIDDEN)
        else:
            shown.append(f"{name}={_HIDDEN}" if is_secret and equals else argument)
        hides_next = is_secret and is_option and not equals
    return shown


def _code_directory() -> Path:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(os.path.abspath(script)).parent if script else Path(os.path.abspath("."))


def _git(directory: Path) -> dict[str, Any] | None:
    try:
        commit = _run_git(directory, "rev-parse", "HEAD")
        if not commit:
            return None
        changes = _run_git(directory, "status", "--porcelain", "--untracked-files=no")
        branch = _run_git(directory, "symbolic-ref", "--short", "--quiet", "HEAD")
    except (OSError, subprocess.SubprocessError, ValueError):  # no git, no directory, a slow disk
        return None
    return {"commit": commit, "branch": branch or None, "dirty": None if changes is None else bool(changes)}


def _run_git(directory: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails. Takes no lock and runs nothing that the repository configures."""
    ended = subprocess.run(
        ["git", "-c", "core.fsmonitor=false", "-C", str(directory), *arguments],
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_GIT_TIMEOUT_S,
        check=False,
    )
    return ended.stdout.decode(errors="replace").strip() if ended.returncode == 0 else None
