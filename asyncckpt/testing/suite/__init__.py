"""What every store promises (`asyncckpt.stores.contract`), one behaviour per test."""

from __future__ import annotations

from asyncckpt.testing.suite.durability import DurabilityTests
from asyncckpt.testing.suite.keys import KeyTests
from asyncckpt.testing.suite.listing import ListingTests
from asyncckpt.testing.suite.moving import MovingTests
from asyncckpt.testing.suite.reading import ReadingTests
from asyncckpt.testing.suite.removing import RemovingTests
from asyncckpt.testing.suite.sinks import SinkTests
from asyncckpt.testing.suite.threads import ThreadTests
from asyncckpt.testing.suite.writing import WritingTests

__all__ = ["StoreSuite"]


class StoreSuite(
    WritingTests,
    SinkTests,
    ReadingTests,
    ListingTests,
    RemovingTests,
    MovingTests,
    DurabilityTests,
    KeyTests,
    ThreadTests,
):
    """The conformance suite. Subclass it as ``class TestMyStore(StoreSuite)`` and define two fixtures.

    ``store``: a new, empty store. ``raw``: a `RawAccess` to the place where it keeps its files; a
    `RawFiles` when that is a file system. Tests of an ability that ``store.properties`` does not claim,
    and tests that need a `RawFiles`, are skipped otherwise.
    """
