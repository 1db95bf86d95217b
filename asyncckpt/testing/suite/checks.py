"""What the tests of the suite have in common."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import pytest

from asyncckpt.errors import StorageError
from asyncckpt.stores.contract import Store
from asyncckpt.testing.raw import RawAccess, RawFiles

__all__ = ["MiB", "difference", "pattern", "raw_files", "refused", "require"]

MiB = 2**20


def pattern(size: int) -> bytes:
    """*size* bytes that show where they came from."""
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


def difference(found: bytes | bytearray, expected: bytes) -> str | None:
    """How they differ, in few words; pytest takes minutes to explain it for megabytes."""
    if found == expected:
        return None
    if len(found) != len(expected):
        return f"{len(found)} bytes instead of {len(expected)}"
    first = next(at for at, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
    return f"another byte at {first}"


@contextlib.contextmanager
def refused(*codes: int, key: str | tuple[str, ...]) -> Iterator[None]:
    """The block must raise a `StorageError` with one of the errnos *codes* (if any are given) about *key*."""
    with pytest.raises(StorageError) as caught:
        yield
    names = [errno.errorcode[code] for code in codes]
    assert caught.value.errno is not None, "a StorageError has an errno"
    assert not codes or errno.errorcode.get(caught.value.errno) in names
    assert caught.value.fields["key"] in ((key,) if isinstance(key, str) else key)


def require(store: Store, ability: str) -> None:
    """Skip the test unless ``store.properties`` claims *ability*."""
    if not getattr(store.properties, ability):
        pytest.skip(f"the store does not claim {ability}")


def raw_files(raw: RawAccess) -> RawFiles:
    """*raw*, or the test is skipped when there is no file system below the store."""
    if not isinstance(raw, RawFiles):
        pytest.skip("there is no file system below the store")
    return raw
