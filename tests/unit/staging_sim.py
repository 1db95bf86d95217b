"""A training run on simulated devices that takes snapshots with the real `Stager`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cuda_sim import SimTensor, Simulation

from asyncckpt.memory import Arena
from asyncckpt.options import SnapshotMode, Staging
from asyncckpt.staging.plan import SegmentPlan
from asyncckpt.staging.slots import Slot, SlotPool
from asyncckpt.staging.stager import Copies, Stager

SMALL_BYTES = 16
"""Simulated tensors are tiny: what is small among them."""


@dataclass(frozen=True)
class SimLeaf:
    key: str
    tensor: Any
    data_type: str = "uint8"
    torch_dtype: str | None = None
    trained: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


class SimOptimizer(torch.optim.Optimizer):
    """Changes its parameters and their moments on the current streams."""

    def __init__(self, simulation: Simulation, tensors: dict[torch.nn.Parameter, list[SimTensor]]) -> None:
        super().__init__(list(tensors), {})
        self._simulation = simulation
        self._tensors = tensors

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        if self._simulation.is_capturing:
            return  # recorded, not executed
        for tensors in self._tensors.values():
            for tensor in tensors:
                self._simulation.write(tensor, "the optimizer's step")


@dataclass
class Save:
    copies: Copies
    slot: Slot
    segment: SegmentPlan
    arena: Arena
    expected: list[bytes]


class Run:
    """Parameters with moments on every device, split over optimizers; buffers, large and small.

    Args:
        simulation: the machine.
        mode: how snapshots are taken.
        slots: how many at once.
        num_optimizers: each owns a large and a small parameter on every device.
        from_others: whether the memory of each tensor came from a stream of its own.
        memory_limit: of the staging memory.
    """

    def __init__(
        self,
        simulation: Simulation,
        mode: SnapshotMode = "overlap",
        slots: int = 1,
        num_optimizers: int = 1,
        *,
        from_others: bool = False,
        memory_limit: int | None = None,
    ) -> None:
        self.simulation = simulation
        self.leaves: list[SimLeaf] = []
        self.optimizers: list[SimOptimizer] = []
        self.loose: list[SimTensor] = []
        self.owned: list[SimTensor] = []
        self.devices = range(len(simulation.defaults))
        self._from_others = from_others
        for number in range(num_optimizers):
            self._add_optimizer(number)
        for index in self.devices:
            self.loose += [
                self._add(f"buffer{index}.{size}", torch.zeros(size, dtype=torch.uint8), index) for size in (8, 40)
            ]
        self.pool = SlotPool(slots)
        self.stager = Stager(
            Staging(snapshot=mode, slots=slots, memory_limit=memory_limit),
            shared=False,
            attach=lambda arena: None,
            detach=lambda arena: None,
            runtime=simulation.runtime,
            ops=simulation.ops,  # type: ignore[arg-type]
        )

    def _add_optimizer(self, number: int) -> None:
        tensors: dict[torch.nn.Parameter, list[SimTensor]] = {}
        moments: dict[torch.nn.Parameter, torch.Tensor] = {}
        for index in self.devices:
            for size in (2, 10):  # floats: 8 and 40 bytes
                parameter = torch.nn.Parameter(torch.zeros(size))
                moments[parameter] = torch.zeros(size)
                name = f"{number}.{index}.{size}"
                tensors[parameter] = [
                    self._add(f"weight{name}", parameter.detach(), index),
                    self._add(f"moment{name}", moments[parameter], index),
                ]
        optimizer = SimOptimizer(self.simulation, tensors)
        for parameter, moment in moments.items():
            optimizer.state[parameter]["momentum_buffer"] = moment
        self.optimizers.append(optimizer)
        self.owned += [tensor for pair in tensors.values() for tensor in pair]

    def _add(self, key: str, like: torch.Tensor, index: int) -> SimTensor:
        home = self.simulation.stream(index, f"home of {key}") if self._from_others else None
        tensor = SimTensor(self.simulation, like, index, home)
        self.leaves.append(SimLeaf(key, tensor))
        return tensor

    # -- training ------------------------------------------------------------------------------

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def forward(self) -> None:
        """Changes buffers and averages."""
        for tensor in self.loose:
            self.simulation.write(tensor, "the forward pass")

    # -- saving --------------------------------------------------------------------------------

    def prepare(self) -> None:
        """What the first ``Checkpointer.step()`` does."""
        for slot in self.pool.slots:
            self.stager.prepare(slot, self.stager.plan(self.leaves), self.leaves, self.optimizers)

    def save(self) -> Save:
        """Snapshot; fails if the host waits for a device."""
        slot = self.pool.acquire("skip", lambda: False)
        assert slot is not None
        plan = self.stager.plan(self.leaves)
        self.stager.reserve(slot, plan)
        (segment,) = plan.segments
        self.simulation.is_saving = True
        try:
            copies = self.stager.begin(self.leaves, segment, slot, self.optimizers)
        finally:
            self.simulation.is_saving = False
        expected = [leaf.tensor.expected.numpy().tobytes() for leaf in self.leaves]
        return Save(copies, slot, segment, slot.arenas[0], expected)

    def complete(self, save: Save) -> None:
        """What the thread behind `SaveFuture.staged` does, and then the writer; fails if the bytes are others."""
        with self.simulation.thread("completing"):
            try:
                save.copies.wait()
                for leaf, offset, expected in zip(self.leaves, save.segment.offsets, save.expected, strict=True):
                    found = self.simulation.read_arena(save.arena, offset, len(expected))
                    assert found == expected, f"{leaf.key} is not what it was at save()"
            finally:
                self.pool.release(save.slot)
        self.simulation.learn_from("completing")

    def close(self) -> None:
        self.simulation.finish()
        self.stager.close(self.pool.slots)


def with_small_tensors(monkeypatch: Any) -> None:
    """Let some simulated tensors count as large."""
    for module in ("packing", "buffers", "plan"):
        monkeypatch.setattr(f"asyncckpt.staging.{module}.SMALL_BYTES", SMALL_BYTES)
