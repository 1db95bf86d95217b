"""Names inside a root: step directories, and keys that are safe on every file system."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

import xxhash

from asyncckpt.errors import CorruptCheckpointError

__all__ = ["check_key", "escape_component", "join_key", "parse_step_name", "step_name", "unescape_component"]

_STEP = re.compile(r"step-(\d{8,18})\Z", re.ASCII)
_SAFE = re.compile(r"[A-Za-z0-9._-]+\Z")
_UNSAFE_BYTE = re.compile(rb"[^A-Za-z0-9._-]")
_PART = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._%~-]{1,255}"
_KEY = re.compile(rf"{_PART}(?:/{_PART})*\Z")  # one match for all parts: a restore checks every file of the step
_CHUNK_FILE = re.compile(r"c(\.\d+)*\Z")
_MAX_COMPONENT = 200
_HASH_DIGITS = 32


def step_name(step: int) -> str:
    """Directory of a committed step: ``step-00000500``."""
    return f"step-{step:08d}"


def parse_step_name(name: str) -> int | None:
    """The step that `step_name` gave *name*, or None for any other name."""
    match = _STEP.match(name)
    if match is None or step_name(int(match[1])) != name:
        return None
    return int(match[1])


@lru_cache(maxsize=65536)
def escape_component(text: str) -> str:
    """*text* as one path component of ``[A-Za-z0-9._%~-]``; different texts give different components.

    Bytes of the UTF-8 form outside ``[A-Za-z0-9._-]`` become ``%XX``. So does the first byte of names
    with a meaning of their own (``.``, ``..``, ``__x``, ``zarr.json``, ``c``, ``c.0``), and the empty
    text becomes ``%``. A result over 200 characters is cut and ends in ``~`` and the XXH3-128 of *text*.
    """
    if _SAFE.match(text) and len(text) <= _MAX_COMPONENT and not _is_reserved(text):
        return text
    if not text:
        return "%"
    data = text.encode("utf-8", "surrogatepass")
    escaped = _UNSAFE_BYTE.sub(lambda match: b"%%%02X" % match[0][0], data).decode("ascii")
    if _is_reserved(escaped):
        escaped = f"%{ord(escaped[0]):02X}{escaped[1:]}"
    if len(escaped) > _MAX_COMPONENT:
        kept = escaped[: _MAX_COMPONENT - _HASH_DIGITS - 1]
        escaped = f"{kept}~{xxhash.xxh3_128_hexdigest(data)}"
    return escaped


def _is_reserved(text: str) -> bool:
    return text in (".", "..", "zarr.json") or text.startswith("__") or _CHUNK_FILE.match(text) is not None


def unescape_component(component: str) -> str | None:
    """The text that `escape_component` turned into *component*; None when it was cut.

    Raises:
        CorruptCheckpointError: `escape_component` never gives this.
    """
    if "~" in component:
        return None
    try:
        data = b"" if component == "%" else _unescape_bytes(component)
        text = data.decode("utf-8", "surrogatepass")
    except (ValueError, UnicodeError) as error:
        raise CorruptCheckpointError(f"{component!r} is not an escaped key") from error
    if escape_component(text) != component:
        raise CorruptCheckpointError(f"{component!r} is not an escaped key")
    return text


def _unescape_bytes(component: str) -> bytes:
    first, *rest = component.split("%")
    return first.encode("ascii") + b"".join(bytes.fromhex(part[:2]) + part[2:].encode("ascii") for part in rest)


def join_key(parts: Iterable[str]) -> str:
    """Escape each part and join them with ``/``."""
    return "/".join(map(escape_component, parts))


def check_key(key: str) -> str:
    """*key* unchanged, if it stays inside the step and could have been written by us.

    Raises:
        CorruptCheckpointError: it is absolute, empty, has ``.`` or ``..`` parts, or odd characters.
    """
    if not _KEY.match(key):
        raise CorruptCheckpointError(f"{key[:300]!r} is not a key of a checkpoint", key=key[:300])
    return key
