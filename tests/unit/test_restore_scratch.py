"""Memory for restores: aligned, reused where it may be, freed with the last tensor where not."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import weakref

import numpy
import pytest

from asyncckpt.errors import StagingMemoryError
from asyncckpt.memory import ALIGNMENT_BYTES
from asyncckpt.restore.scratch import FreshMemory, Memory, Scratch

MIB = 2**20
SIZES = [3, 0, 64, 65, 2 * MIB, 1, 3 * MIB + 5, 0]


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@pytest.mark.parametrize("memory", [Scratch(), FreshMemory()], ids=["scratch", "fresh"])
def test_blocks_are_writable_aligned_and_apart(memory: Memory) -> None:
    views = memory.allocate(SIZES)
    assert [len(view) for view in views] == SIZES
    for number, view in enumerate(views):
        view[:] = bytes([number]) * len(view)
    for number, view in enumerate(views):
        assert set(view) <= {number}
        assert not view or address(view) % ALIGNMENT_BYTES == 0


@pytest.mark.parametrize("memory", [Scratch(), FreshMemory()], ids=["scratch", "fresh"])
def test_nothing_is_fine_too(memory: Memory) -> None:
    assert memory.allocate([]) == []
    assert [len(view) for view in memory.allocate([0, 0])] == [0, 0]


def test_scratch_uses_the_memory_it_can_borrow() -> None:
    arena = bytearray(4096)
    scratch = Scratch(lambda num_bytes: memoryview(arena) if num_bytes <= len(arena) else None)
    scratch.allocate([16])[0][:] = b"x" * 16
    assert arena[:17] == b"x" * 16 + b"\0"
    scratch.allocate([5000])[0][:] = b"y" * 5000
    assert b"y" not in arena


def test_scratch_frees_its_own_memory_with_the_last_view() -> None:
    array = numpy.frombuffer(Scratch().allocate([MIB])[0], dtype="u1")
    mapping = weakref.ref(array.base.obj if isinstance(array.base, memoryview) else array.base)
    array[:] = 7
    del array
    gc.collect()
    assert mapping() is None


def test_fresh_large_blocks_do_not_share_memory_with_others() -> None:
    views = FreshMemory().allocate([2 * MIB, 10, 2 * MIB, 10])
    assert len({id(view.obj) for view in views}) == 3
    assert views[1].obj is views[3].obj


@pytest.mark.parametrize("memory", [Scratch(), FreshMemory()], ids=["scratch", "fresh"])
@pytest.mark.parametrize("num_bytes", [2**50, 2**70], ids=["1 PiB", "1 ZiB"])
def test_absurd_sizes_are_refused_before_anything_is_touched(memory: Memory, num_bytes: int) -> None:
    with pytest.raises(StagingMemoryError, match=str(num_bytes)) as caught:
        memory.allocate([num_bytes])
    assert isinstance(caught.value, MemoryError)
    assert caught.value.fields == {"num_bytes": num_bytes}


@pytest.mark.parametrize("num_bytes", [2**62, 2**70])
def test_absurd_sizes_are_refused_where_the_kernel_does_not_tell(
    num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncckpt.restore.scratch._available_bytes", lambda: None)
    with pytest.raises(StagingMemoryError):
        Scratch().allocate([num_bytes])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_write_into_the_parents_memory() -> None:
    code = """
import os
from asyncckpt.restore.scratch import Scratch
(view,) = Scratch().allocate([4])
view[:] = b"mine"
child = os.fork()
if child == 0:
    view[:] = b"your"
    os._exit(0)
os.waitpid(child, 0)
print(bytes(view).decode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "mine"
