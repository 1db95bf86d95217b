"""A simulation of CUDA streams, events and memory that finds every race a missing wait makes possible.

Two independent checks. *Vector clocks*: each operation carries the clock of its stream, joined at waits and
synchronisations; an access that does not happen after a conflicting earlier one is a `Race`, whatever the
timing. *Execution*: operations run on real bytes, streams interleaved at random, so that what reaches the
host can be compared with what was there at ``save()``.

It stands in for ``torch.cuda`` (`SimRuntime`), for the tensor operations (`SimOps`) and for tensors (`SimTensor`).
Every call of the package that orders something is noted with the place in its source and can be left out, which
plants the bugs that must be found.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import asyncckpt.staging
from asyncckpt.memory import Arena

Clock = dict[str, int]
Site = tuple[str, ...]
"""What is called, and the innermost lines of the package it is called from: helpers serve several."""


_PACKAGE = Path(asyncckpt.staging.__file__).parent


class Race(AssertionError):
    """Two accesses to the same memory, one of them a write, in no order."""


class HostWaited(AssertionError):
    """The host waited for a device where it must not."""


def join(clock: Clock, other: Clock) -> None:
    for agent, time in other.items():
        clock[agent] = max(clock.get(agent, 0), time)


@dataclass
class Access:
    """Bytes ``[start, stop)`` of some memory, touched by *agent* at *time* of its clock."""

    start: int
    stop: int
    agent: str
    time: int
    is_write: bool
    what: str


@dataclass
class Operation:
    run: Callable[[], None]
    # Events that must have happened first, and the one that this operation is.
    after: list[SimEvent] = field(default_factory=list)
    signals: SimEvent | None = None


class Simulation:
    """One machine: devices, streams, host threads.

    Args:
        seed: chooses how streams interleave.
        leave_out: the place of a call that is not made; None makes all.
        num_devices: how many devices there are.
        free: free bytes of each device.
        peak: bytes that training took at its peak.
    """

    def __init__(
        self, seed: int = 0, leave_out: Site | None = None, num_devices: int = 1, free: int = 0, peak: int = 10**6
    ) -> None:
        self.random = random.Random(seed)
        self.leave_out = leave_out
        self.sites: set[Site] = set()
        self.free = free
        self.peak = peak
        self.clocks: dict[str, Clock] = {}
        self.host = "main"
        self.is_saving = False
        self.is_capturing = False
        self.num_host_waits = 0
        self.refuses_memory = False
        self.queues: dict[str, list[Operation]] = {}
        self.accesses: dict[object, list[Access]] = {}
        self.defaults = [SimStream(self, index, f"default{index}") for index in range(num_devices)]
        self.current = list(self.defaults)
        self.device = 0
        self.runtime = SimRuntime(self)
        self.ops = SimOps(self)
        self._names = itertools.count()

    # -- ordering ------------------------------------------------------------------------------

    def makes(self, call: str) -> bool:
        """Whether the package's ordering call *call* is made."""
        lines = []
        frame = sys._getframe(1)
        while frame is not None and len(lines) < 2:
            if Path(frame.f_code.co_filename).parent == _PACKAGE:
                lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            frame = frame.f_back  # type: ignore[assignment]
        site = (call, *lines)
        self.sites.add(site)
        return site != self.leave_out

    def clock(self, agent: str) -> Clock:
        return self.clocks.setdefault(agent, {agent: 0})

    def tick(self, agent: str) -> Clock:
        clock = self.clock(agent)
        clock[agent] += 1
        return clock

    @contextlib.contextmanager
    def thread(self, name: str) -> Iterator[None]:
        """Another host thread, which knows what the one before knew; what it learns, only it knows."""
        before, self.host = self.host, name
        join(self.tick(name), self.clock(before))
        try:
            yield
        finally:
            self.host = before

    def learn_from(self, thread: str) -> None:
        """The current host thread hears from *thread*."""
        join(self.tick(self.host), self.clock(thread))

    def access(self, memory: object, start: int, stop: int, agent: str, what: str, *, is_write: bool) -> None:
        clock = self.clock(agent)
        known = self.accesses.setdefault(memory, [])
        for earlier in known:
            overlaps = earlier.start < stop and start < earlier.stop
            if overlaps and (is_write or earlier.is_write) and clock.get(earlier.agent, 0) < earlier.time:
                raise Race(f"{what} on {agent} is not ordered after {earlier.what} on {earlier.agent}")
        known.append(Access(start, stop, agent, clock[agent], is_write, what))

    # -- execution -----------------------------------------------------------------------------

    def enqueue(self, stream: SimStream, operation: Operation) -> None:
        join(self.tick(stream.name), self.clock(self.host))
        self.queues.setdefault(stream.name, []).append(operation)

    def run(self, steps: int) -> None:
        """Execute up to *steps* operations, of streams chosen at random."""
        for _ in range(steps):
            ready = [
                queue for queue in self.queues.values() if queue and all(event.has_happened for event in queue[0].after)
            ]
            if not ready:
                return
            operation = self.random.choice(ready).pop(0)
            operation.run()
            if operation.signals is not None:
                operation.signals.has_happened = True

    def finish(self) -> None:
        self.run(10**6)
        assert not any(self.queues.values()), "deadlock"

    def wait_host(self, is_over: Callable[[], bool], clock: Clock) -> None:
        if self.is_saving and sys.exc_info()[0] is None:  # a save that fails may wait
            raise HostWaited("the host waited for a device inside save()")
        self.num_host_waits += 1
        while not is_over():
            before = sum(map(len, self.queues.values()))
            self.run(1)
            assert sum(map(len, self.queues.values())) < before, "deadlock"
        join(self.tick(self.host), clock)

    # -- what a training script does -------------------------------------------------------------

    def stream(self, index: int, name: str = "") -> SimStream:
        return SimStream(self, index, name or f"user{next(self._names)}")

    def write(self, tensor: SimTensor, what: str = "training") -> None:
        """Training changes *tensor* on the current stream of its device, like an in-place operator."""
        values = torch.tensor([self.random.randrange(256) for _ in range(tensor.nbytes)], dtype=torch.uint8)
        stream = self.current[tensor.device.index]
        tensor._version += 1
        tensor.expected = values.clone()
        self.enqueue(stream, Operation(lambda: tensor.memory.copy_(values)))
        self.access(tensor.identity, 0, tensor.nbytes, stream.name, what, is_write=True)

    def read_arena(self, arena: Arena, offset: int, num_bytes: int) -> bytes:
        """What the current host thread, or a process it tells, finds in staging memory."""
        self.tick(self.host)
        self.access(arena.arena_id, offset, offset + num_bytes, self.host, "the writer", is_write=False)
        return bytes(arena.buffer[offset : offset + num_bytes])

    def free_memory(self, tensor: SimTensor) -> None:
        """The allocator takes the memory back and gives it to the next tensor on the stream it came from.

        That tensor is written at once. Streams for which ``record_stream`` was called are waited for.
        """
        stream = tensor.home
        for other in tensor.recorded:
            event = SimEvent(self)
            event.happen_on(other)
            self.enqueue(stream, Operation(lambda: None, after=[event]))
            join(self.clock(stream.name), event.clock)
        memory, identity, size = tensor.memory, tensor.identity, tensor.nbytes
        self.enqueue(stream, Operation(lambda: memory.fill_(0xEE)))  # type: ignore[arg-type, return-value]
        self.access(identity, 0, size, stream.name, "the next owner of the memory", is_write=True)


class SimStream:
    def __init__(self, simulation: Simulation, index: int, name: str) -> None:
        self._simulation = simulation
        self.index = index
        self.name = name

    def wait_stream(self, other: SimStream) -> None:
        if self._simulation.makes("wait_stream"):
            event = SimEvent(self._simulation)
            event.happen_on(other)
            self.wait(event)

    def wait_event(self, event: SimEvent) -> None:
        if self._simulation.makes("wait_event"):
            self.wait(event)

    def wait(self, event: SimEvent) -> None:
        """What the training script's own waits do: never left out."""
        if event.was_recorded:  # waiting for an event that was never recorded waits for nothing
            self._simulation.enqueue(self, Operation(lambda: None, after=[event]))
            join(self._simulation.clock(self.name), event.clock)

    def after(self, other: SimStream) -> None:
        """The training script orders this stream after *other*."""
        event = SimEvent(self._simulation)
        event.happen_on(other)
        self.wait(event)

    def __repr__(self) -> str:
        return f"<SimStream {self.name}>"


class SimEvent:
    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.clock: Clock = {}
        self.was_recorded = False
        self.has_happened = True

    def record(self, stream: SimStream) -> None:
        if self._simulation.makes("record"):
            self.happen_on(stream)

    def happen_on(self, stream: SimStream) -> None:
        self.was_recorded, self.has_happened = True, False
        self._simulation.enqueue(stream, Operation(lambda: None, signals=self))
        self.clock = dict(self._simulation.clock(stream.name))

    def synchronize(self) -> None:
        if self._simulation.makes("synchronize"):
            self._simulation.wait_host(lambda: self.has_happened, self.clock)


class SimTensor:
    """A tensor on a simulated device; the bytes are those of *like*, a tensor on the CPU, if there is one.

    So an optimizer that owns *like* owns this one.
    """

    is_cuda = True
    is_cpu = False

    def __init__(
        self, simulation: Simulation, like: torch.Tensor, index: int = 0, home: SimStream | None = None
    ) -> None:
        self._simulation = simulation
        self._like = like
        self.device = torch.device("cuda", index)
        self.dtype = like.dtype
        self.shape = like.shape
        self.memory = like.detach().reshape(-1).view(torch.uint8)
        self.expected = self.memory.clone()
        self.home = home or simulation.current[index]
        self.identity = object()
        self.recorded: set[SimStream] = set()
        self._version = 0

    @property
    def nbytes(self) -> int:
        return self._like.numel() * self._like.element_size()

    def numel(self) -> int:
        return self._like.numel()

    def element_size(self) -> int:
        return self._like.element_size()

    def data_ptr(self) -> int:
        return self._like.data_ptr()

    def is_inference(self) -> bool:
        return False

    def record_stream(self, stream: SimStream) -> None:
        # The real one ignores the stream from which the memory came, too.
        if stream is not self.home and self._simulation.makes("record_stream"):
            self.recorded.add(stream)

    def __getitem__(self, part: slice) -> SimView:
        return SimView(self, part.start, part.stop)


@dataclass(frozen=True)
class SimView:
    """Bytes of a buffer."""

    base: SimTensor
    start: int
    stop: int


class SimOps:
    """`DeviceOps` on simulated devices."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.buffers: weakref.WeakSet[SimTensor] = weakref.WeakSet()
        self.is_pinned = True

    def allocate(self, num_bytes: int, index: int) -> SimTensor:
        if self._simulation.refuses_memory:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        buffer = SimTensor(self._simulation, torch.zeros(num_bytes, dtype=torch.uint8), index)
        self.buffers.add(buffer)
        return buffer

    def view(self, buffer: SimTensor, place: int, like: SimTensor) -> SimView:
        return SimView(buffer, place, place + like.nbytes)

    def gather(self, targets: list[SimView], sources: list[SimTensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            self._copy(target, source)

    def _copy(self, target: SimView, source: SimTensor) -> None:
        stream = self._simulation.current[source.device.index]
        memory = target.base.memory[target.start : target.stop]
        self._simulation.enqueue(stream, Operation(lambda: memory.copy_(source.memory)))  # type: ignore[arg-type, return-value]
        self._simulation.access(source.identity, 0, source.nbytes, stream.name, "gathering", is_write=False)
        self._simulation.access(
            target.base.identity, target.start, target.stop, stream.name, "gathering", is_write=True
        )

    def download(self, arena: Arena, offset: int, source: SimTensor | SimView) -> None:
        view = source if isinstance(source, SimView) else SimView(source, 0, source.nbytes)
        simulation, stream = self._simulation, self._simulation.current[view.base.device.index]
        size = view.stop - view.start
        memory = view.base.memory[view.start : view.stop]
        address = arena.address + offset

        def move() -> None:
            ctypes.memmove(address, memory.data_ptr(), size)

        simulation.enqueue(stream, Operation(move))
        simulation.access(view.base.identity, view.start, view.stop, stream.name, "the download", is_write=False)
        simulation.access(arena.arena_id, offset, offset + size, stream.name, "the download", is_write=True)


class SimRuntime:
    """What the package uses of ``torch.cuda``."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.registered: dict[int, int] = {}
        self.register_code = 0
        self._sides = itertools.count()

    def is_initialized(self) -> bool:
        return True

    def is_current_stream_capturing(self) -> bool:
        return self._simulation.is_capturing

    def Stream(self, device: int) -> SimStream:
        return SimStream(self._simulation, device, f"side{device}.{next(self._sides)}")

    def Event(self, blocking: bool) -> SimEvent:
        assert blocking, "a spinning thread takes a core from training"
        return SimEvent(self._simulation)

    def current_stream(self, index: int) -> SimStream:
        return self._simulation.current[index]

    @contextlib.contextmanager
    def stream(self, stream: SimStream) -> Iterator[None]:
        before = self._simulation.current[stream.index]
        self._simulation.current[stream.index] = stream
        try:
            yield
        finally:
            self._simulation.current[stream.index] = before

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        yield

    def synchronize(self, index: int) -> None:
        clock: Clock = {}
        for agent, other in self._simulation.clocks.items():
            if agent in self._simulation.queues:
                join(clock, other)
        self._simulation.wait_host(lambda: not any(self._simulation.queues.values()), clock)

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return self._simulation.free, 10**12

    def memory_reserved(self, index: int) -> int:
        return self._simulation.peak

    def memory_allocated(self, index: int) -> int:
        return 0

    def max_memory_allocated(self, index: int) -> int:
        return self._simulation.peak

    def cudart(self) -> SimRuntime:
        return self

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if self.register_code == 0:
            self.registered[address] = flags
        return self.register_code

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0
