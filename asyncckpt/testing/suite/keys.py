"""What is a key, and where it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from asyncckpt.errors import InvalidOptionError
from asyncckpt.stores.contract import Store
from asyncckpt.testing.raw import RawAccess

_CALLS: dict[str, Callable[[Store, str], object]] = {
    "put": lambda store, key: store.put(key, b""),
    "put durable": lambda store, key: store.put(key, b"", durable=True),
    "put large": lambda store, key: store.put(key, bytes(2**21)),
    "create": lambda store, key: store.create(key),
    "read": lambda store, key: store.read(key),
    "read_into": lambda store, key: store.read_into(key, memoryview(bytearray(1))),
    "entries": lambda store, key: store.entries(key),
    "delete": lambda store, key: store.delete(key),
    "rename from": lambda store, key: store.rename(key, "b"),
    "rename to": lambda store, key: store.rename("a", key),
    "link from": lambda store, key: store.link(key, "b"),
    "link to": lambda store, key: store.link("a", key),
    "open_barrier": lambda store, key: store.open_barrier(key),
    "sync_directory": lambda store, key: store.sync_directory(key),
    "location": lambda store, key: store.location(key),
}
# Nothing that would hurt if the store took it, least of all in `delete`.
_MALFORMED = ["/no/such/file", "../outside", "a/..", "a/../b", "a//b", "./a", ".", "a/", "a/.", "nul\0"]
_ABILITIES = {"rename from": "rename", "rename to": "rename", "link from": "hard_links", "link to": "hard_links"}


class KeyTests:
    """Part of `StoreSuite`."""

    @pytest.mark.parametrize("key", _MALFORMED)
    def test_malformed_keys_are_refused_everywhere(self, store: Store, raw: RawAccess, key: str) -> None:
        for name, call in _CALLS.items():
            ability = _ABILITIES.get(name)
            if ability is None or getattr(store.properties, ability):
                with pytest.raises(InvalidOptionError):
                    call(store, key)
        assert raw.names("") == []

    @pytest.mark.parametrize("key", ["a..b/...c/.d", "step-00000500/state/w/c.0", "%2E~x/A-_9", "x" * 200])
    def test_odd_but_proper_keys_are_fine(self, store: Store, raw: RawAccess, key: str) -> None:
        store.put(key, b"1")
        assert raw.read(key) == b"1"
        assert store.read(key) == b"1"

    def test_location_names_each_key(self, store: Store) -> None:
        assert store.location("a/b").startswith(store.location(""))
        assert store.location("a/b").endswith("/a/b")

    def test_the_url_is_one_without_trailing_slash(self, store: Store) -> None:
        scheme, separator, _ = store.url.partition("://")
        assert scheme.isidentifier()
        assert separator
        assert not store.url.endswith("/")
