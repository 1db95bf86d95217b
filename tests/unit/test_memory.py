"""Arenas: shared, sized, freed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from asyncckpt.memory import Arena, is_memfd_available

needs_memfd = pytest.mark.skipif(not is_memfd_available(), reason="needs Linux memfd")


@needs_memfd
def test_attached_arena_sees_what_the_creator_writes() -> None:
    arena = Arena.create(100_000, shared=True)
    other = Arena.attach(arena.arena_id, arena.num_bytes, os.dup(arena.fd))
    arena.buffer[99_999] = 7
    assert other.buffer[99_999] == 7
    other.close()
    arena.close()


def test_local_arena_is_found_by_id_until_closed() -> None:
    arena = Arena.create(10, shared=False)
    assert Arena.find_local(arena.arena_id) is arena
    arena.close()
    with pytest.raises(KeyError):
        Arena.find_local(arena.arena_id)


def test_populate_keeps_contents_and_commits_pages() -> None:
    arena = Arena.create(3 * 2**20, shared=False)
    arena.buffer[5] = 9
    arena.populate()
    assert arena.buffer[5] == 9
    arena.close()


@needs_memfd
def test_close_frees_the_descriptor_and_is_idempotent() -> None:
    arena = Arena.create(10, shared=True)
    fd = arena.fd
    arena.close()
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_close_tolerates_a_live_view() -> None:
    arena = Arena.create(10, shared=False)
    view = memoryview(arena.buffer)
    arena.close()
    view[0] = 1
    assert view[0] == 1


@needs_memfd
def test_forked_child_does_not_map_the_arena() -> None:
    arena = Arena.create(4096, shared=True)
    address = arena.address
    pid = os.fork()
    if pid == 0:  # the child only looks at its own memory map
        with open("/proc/self/maps") as maps:
            mapped = any(line.startswith(f"{address:x}-") for line in maps)
        os._exit(1 if mapped else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    arena.close()


def test_repr_names_kind_and_size() -> None:
    arena = Arena.create(2**20, shared=False)
    assert "local" in repr(arena)
    assert "1.0 MiB" in repr(arena)
    arena.close()


FORK = """
import gc, mmap, os, sys
from asyncckpt.memory import Arena

arena = Arena.create(2**22, shared=sys.argv[1] == "shared")
child = os.fork()
if child == 0:
    # Some of it comes to lie where the arena is in the parent.
    own = [mmap.mmap(-1, 2**21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(64)]
    if sys.argv[2] == "close":
        arena.close()
    del arena
    gc.collect()
    for mapping in own:
        mapping[:1] = b"x"
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, os.waitstatus_to_exitcode(status)
arena.close()
"""


@needs_memfd
@pytest.mark.parametrize("kind", ["shared", "local"])
@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_forked_child_keeps_its_memory_when_it_lets_go_of_an_arena(kind: str, end: str) -> None:
    command = [sys.executable, "-c", FORK, kind, end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
