"""The suite itself: it fits a store without a file system, and it notices what a broken store does wrong."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import asyncckpt
from asyncckpt.errors import InvalidOptionError, StorageError
from asyncckpt.stores import Entry, StoreProperties
from asyncckpt.testing import RawAccess, RawFiles, StoreSuite


class MemorySink:
    """Keeps the file to itself until it is closed, as an upload to an object store does."""

    def __init__(self, store: MemoryStore, key: str) -> None:
        self._store, self._key = store, key
        self._data: bytearray | None = bytearray()

    def write(self, buffer: bytes, /) -> None:
        assert self._data is not None
        self._data += memoryview(buffer).tobytes()

    def close(self) -> None:
        data, self._data = self._data, None
        if data is not None:
            self._store.put(self._key, data)

    def abort(self) -> None:
        self._data = None

    def __enter__(self) -> MemorySink:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close() if error is None else self.abort()


class MemoryBarrier:
    def wait(self) -> None:
        """Memory is as durable as it gets."""

    def close(self) -> None:
        """Nothing is held."""


class MemoryStore:
    """The smallest store that obeys the contract: no directories, no links, no renames."""

    properties = StoreProperties(atomic_create=True, hard_links=False, rename=False)
    url = "memory://test"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def location(self, key: str) -> str:
        if key and re.search(r"(?:^|/)\.{0,2}(?:/|$)|\0", key):
            raise InvalidOptionError(f"{key!r} is not a key")
        return f"{self.url}/{key}" if key else self.url

    def put(self, key: str, data: bytes, *, durable: bool = False) -> None:
        self.location(key)
        with self._lock:
            if key in self.files:
                raise StorageError("it exists", errno=errno.EEXIST, key=key)
            self.files[key] = memoryview(data).tobytes()

    def create(self, key: str, size_hint: int = 0) -> MemorySink:
        self.location(key)
        return MemorySink(self, key)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self.location(key)
        try:
            return self.files[key][offset : None if length is None else offset + length]
        except KeyError:
            raise StorageError("there is no such key", errno=errno.ENOENT, key=key) from None

    def read_into(self, key: str, out: memoryview, offset: int = 0, *, cache: bool = True) -> int:
        data = self.read(key, offset, out.nbytes)
        out.cast("B")[: len(data)] = data
        return len(data)

    def entries(self, prefix: str) -> list[Entry]:
        self.location(prefix)
        start = f"{prefix}/" if prefix else ""
        found: dict[str, Entry] = {}
        with self._lock:
            for key, data in self.files.items():
                if key.startswith(start):
                    name, slash, _ = key.removeprefix(start).partition("/")
                    found[name] = Entry(name, bool(slash), 0 if slash else len(data))
        return [found[name] for name in sorted(found)]

    def delete(self, prefix: str) -> None:
        if not prefix:
            raise InvalidOptionError("refusing to delete everything")
        self.location(prefix)
        with self._lock:
            for key in [key for key in self.files if f"{key}/".startswith(f"{prefix}/")]:
                del self.files[key]

    def open_barrier(self, prefix: str) -> MemoryBarrier:
        self.location(prefix)
        return MemoryBarrier()

    def sync_directory(self, prefix: str) -> None:
        self.location(prefix)

    def rename(self, source: str, target: str) -> None:
        raise NotImplementedError

    def link(self, source: str, target: str) -> None:
        raise NotImplementedError


class RawMemory:
    def __init__(self, store: MemoryStore) -> None:
        self._files = store.files

    def read(self, key: str) -> bytes:
        return self._files[key]

    def write(self, key: str, data: bytes) -> None:
        self._files[key] = data

    def names(self, prefix: str) -> list[str]:
        start = f"{prefix}/" if prefix else ""
        return list({key.removeprefix(start).partition("/")[0] for key in self._files if key.startswith(start)})


class TestMemoryStore(StoreSuite):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()

    @pytest.fixture
    def raw(self, store: MemoryStore) -> RawMemory:
        return RawMemory(store)

    def test_its_raw_access_has_no_file_system(self, raw: RawAccess) -> None:
        assert not isinstance(raw, RawFiles)


# One broken store each: the body of a class that inherits from LocalStore, and a test that must fail for it.
BROKEN = {
    "replaces": (
        "def put(self, key, data, **options): self.delete(key); super().put(key, data, **options)",
        "test_put_never_replaces_a_key",
    ),
    "leaves out the tail of large files": (
        "def put(self, key, data, **options): super().put(key, memoryview(data).cast('B')[:9 * 2**20], **options)",
        "test_put_stores_exactly_the_bytes",
    ),
    "keeps what was aborted": (
        """
        def create(self, key, size_hint=0):
            sink = super().create(key, size_hint)
            return type("Sink", (), {
                "write": lambda _, data: sink.write(data),
                "close": lambda _: sink.close(),
                "abort": lambda _: sink.close(),
            })()
        """,
        "test_abort_removes_the_file_and_is_final",
    ),
    "raises raw errors": (
        "def read(self, key, offset=0, length=None): return open(self.location(key), 'rb').read()[offset:][:length]",
        "test_a_missing_key_is_enoent",
    ),
    "follows links": (
        """
        def read(self, key, offset=0, length=None):
            return super().read(os.path.relpath(os.path.realpath(self.location(key)), self.root), offset, length)
        """,
        "test_a_link_inside_the_store_is_not_followed_either",
    ),
    "fills too much": (
        """
        def read_into(self, key, out, offset=0, *, cache=True):
            return super().read_into(key, memoryview(out.obj), offset, cache=cache)
        """,
        "test_read_into_touches_nothing_outside_of_the_view",
    ),
    "lists in any order": (
        "def entries(self, prefix): return super().entries(prefix)[::-1]",
        "test_entries_lists_one_level_sorted",
    ),
    "forgets that the list may be empty": (
        "def entries(self, prefix): os.listdir(self.location(prefix)); return super().entries(prefix)",
        "test_entries_of_nothing_is_empty",
    ),
    "deletes by prefix of the text": (
        """
        def delete(self, prefix):
            if not prefix: super().delete(prefix)
            for entry in self.entries(""):
                if entry.name.startswith(prefix): super().delete(entry.name)
        """,
        "test_delete_takes_nothing_whose_name_begins_alike",
    ),
    "complains about what is missing": (
        """
        def delete(self, prefix):
            if prefix: os.lstat(self.location(prefix))
            super().delete(prefix)
        """,
        "test_delete_removes_files_and_trees_and_is_idempotent",
    ),
    "renames by copying": (
        """
        half_was_listed = threading.Event()
        def entries(self, prefix):
            found = super().entries(prefix)
            if 0 < len(found) < 8: self.half_was_listed.set()
            return found
        def rename(self, source, target):
            for entry in self.entries(source):
                self.put(f"{target}/{entry.name}", self.read(f"{source}/{entry.name}"))
                assert self.half_was_listed.wait(60)
            self.delete(source)
        """,
        "test_a_renamed_directory_appears_whole",
    ),
    "renames over what is there": (
        "def rename(self, source, target): self.delete(target); super().rename(source, target)",
        "test_rename_never_replaces",
    ),
    "links by copying": (
        "def link(self, source, target): self.put(target, self.read(source))",
        "test_link_shares_the_file",
    ),
    "names no key in its errors": (
        """
        def put(self, key, data, **options):
            try: super().put(key, data, **options)
            except StorageError as error: raise StorageError("failed", errno=error.errno) from None
        """,
        "test_put_durable_never_replaces_a_key",
    ),
    "takes any key": (
        "def location(self, key): return f'{self.root}/{key}'",
        "test_malformed_keys_are_refused_everywhere",
    ),
    "caches what exists": (
        """
        def put(self, key, data, **options):
            if key in self.__dict__.setdefault("known", set()): raise StorageError("exists", errno=17, key=key)
            self.known.add(key)
            super().put(key, data, **options)
        """,
        "test_a_deleted_key_can_be_written_again",
    ),
    "looks before it writes": (
        """
        def put(self, key, data, **options):
            if os.path.exists(self.location(key)): raise StorageError("exists", errno=17, key=key)
            everybody_looked.wait()
            super().put(f"{key}.tmp-{threading.get_ident()}", data)
            os.replace(self.location(f"{key}.tmp-{threading.get_ident()}"), self.location(key))
        """,
        "test_of_concurrent_creators_one_wins",
    ),
    "watches what does not exist": (
        "def open_barrier(self, prefix): return TreeBarrier(self.location(prefix), prefix)",
        "test_a_barrier_may_wait_for_nothing",
    ),
}

MODULE = """
import os, threading
import pytest
from asyncckpt.errors import StorageError
from asyncckpt.stores import LocalStore
from asyncckpt.stores.durability import TreeBarrier
from asyncckpt.testing import RawDirectory, StoreSuite

everybody_looked = threading.Barrier(4)

class Suite(StoreSuite):
    @pytest.fixture
    def raw(self, tmp_path):
        (tmp_path / "root").mkdir()
        return RawDirectory(tmp_path / "root")

    @pytest.fixture
    def store(self, raw):
        return self.Broken(raw.root)
"""


def test_every_broken_store_is_found_out(tmp_path: Path) -> None:
    module = tmp_path / "test_broken.py"
    parts = [MODULE]
    selected = []
    for number, (body, test) in enumerate(BROKEN.values()):
        code = textwrap.indent(textwrap.dedent(body).strip(), " " * 8)
        parts.append(f"class Test{number}(Suite):\n    class Broken(LocalStore):\n{code}\n")
        selected.append(f"{module}::Test{number}::{test}")
    module.write_text("\n".join(parts))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *selected],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(asyncckpt.__file__).parent.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = {int(number) for number in re.findall(r"^FAILED .*::Test(\d+)::", done.stdout, re.MULTILINE)}
    missed = [name for number, name in enumerate(BROKEN) if number not in failed]
    assert missed == [], done.stdout
    assert "ERROR" not in done.stdout
    # Assertions of the suite are rewritten: they show what they compared.
    assert "At index 0 diff" in done.stdout


def test_the_suite_needs_pytest_and_the_rest_does_not() -> None:
    script = (
        "import sys, asyncckpt\n"
        "assert not any(name.startswith('asyncckpt.testing') for name in sys.modules)\n"
        "import asyncckpt.testing\n"
        "assert {'pytest', 'torch', 'zarr', 'numpy'}.isdisjoint(sys.modules), sorted(sys.modules)\n"
        "asyncckpt.testing.StoreSuite\n"
        "assert 'pytest' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_resolves() -> None:
    import asyncckpt.testing as testing

    for name in testing.__all__:
        assert getattr(testing, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'StoreSweet'"):
        testing.StoreSweet  # noqa: B018
