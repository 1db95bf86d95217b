"""What every store promises (`asyncckpt.testing.StoreSuite`), on all our stores and decorators."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from asyncckpt.errors import InvalidOptionError, StorageError
from asyncckpt.stores import LocalStore, Store
from asyncckpt.testing import Fault, FaultStore, Gate, RawDirectory, SlowStore, StoreSuite


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def raw(root: Path) -> RawDirectory:
    return RawDirectory(root)


class TestLocalStore(StoreSuite):
    """Every way of writing, and what only the local store promises."""

    @pytest.fixture(params=["syncfs", "each", "buffered"])
    def store(self, request: pytest.FixtureRequest, root: Path) -> LocalStore:
        if request.param == "buffered":
            return LocalStore(root, direct=False)
        return LocalStore(root, flush=request.param)

    def test_location_and_url_name_the_place(self, store: LocalStore) -> None:
        assert store.location("") == store.root
        assert store.location("a/b") == f"{store.root}/a/b"
        assert store.url == f"file://{store.root}"

    def test_create_notices_at_once_that_the_key_exists(self, store: LocalStore) -> None:
        store.put("key", b"first")
        for size in (3, 2 * 2**20):
            with pytest.raises(StorageError) as error:
                store.create("key", size)
            assert error.value.errno == errno.EEXIST

    def test_syncing_a_missing_directory_fails(self, store: LocalStore) -> None:
        with pytest.raises(StorageError) as error:
            store.sync_directory("missing")
        assert error.value.errno == errno.ENOENT
        assert error.value.fields["key"] == "missing"

    @pytest.mark.parametrize("key", ["/etc/passwd", "..", "a/../b", "a//b", "./a", "a/", "a/.", "nul\0"])
    def test_a_malformed_key_is_called_so(self, store: LocalStore, key: str) -> None:
        for call in (
            lambda: store.put(key, b""),
            lambda: store.create(key),
            lambda: store.read(key),
            lambda: store.entries(key),
            lambda: store.delete(key),
            lambda: store.rename("a", key),
            lambda: store.link("a", key),
            lambda: store.open_barrier(key),
            lambda: store.sync_directory(key),
            lambda: store.location(key),
        ):
            with pytest.raises(InvalidOptionError, match="is not a key"):
                call()

    def test_the_refusal_to_delete_the_root_says_so(self, store: LocalStore) -> None:
        with pytest.raises(InvalidOptionError, match="refusing"):
            store.delete("")


class TestSlowStore(StoreSuite):
    """Slow is not wrong."""

    @pytest.fixture
    def store(self, root: Path) -> SlowStore:
        return SlowStore(LocalStore(root), bytes_s=1e10)


class TestFaultStoreWithoutFaults(StoreSuite):
    """The decorator changes nothing as long as nothing goes wrong."""

    @pytest.fixture
    def store(self, root: Path) -> FaultStore:
        return FaultStore(LocalStore(root))


class TestFaultStoreWithFaultsThatNeverCome(StoreSuite):
    """Nor do faults that are not due, in a stack of two."""

    @pytest.fixture
    def store(self, root: Path) -> Store:
        inner = FaultStore(LocalStore(root, flush="each"), [Fault(key="never", crash=True)])
        return FaultStore(inner, [Fault(nth=10**9, error=errno.EIO)])


class TestFaultStoreWithOpenGates(StoreSuite):
    """A gate that stands open delays nothing, before and after."""

    @pytest.fixture
    def store(self, root: Path) -> FaultStore:
        with Gate() as gate:
            pass
        return FaultStore(
            LocalStore(root), [Fault(gate=gate, persistent=True), Fault("put", gate=gate, moment="after")]
        )
