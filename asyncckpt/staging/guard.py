"""Makes optimizers wait, on the device, for copies that read what they are about to change.

Which tensors may be left to an optimizer's step? Those it owns, if it is its `step` that changes them. That is
not so when the step was captured in a CUDA graph and is replayed, or compiled in a way that leaves hooks out. So an
optimizer has to be seen: only one whose hook ran since the last snapshot guards tensors in the next one.
Until then, as for everything that no optimizer owns, training waits for the copies at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from asyncckpt.errors import CheckpointError, SnapshotMutatedError

__all__ = [
    "Extent",
    "GuardedCopies",
    "Optimizer",
    "Ownership",
    "StepGuard",
    "Watched",
    "extent_of",
    "hookable",
    "is_capturing",
    "version_of",
    "versions_of",
]

Optimizer = torch.optim.Optimizer
Extent = tuple[int, int]
"""Address and bytes of a tensor. Not its storage: that may hold buffers beside the parameters."""


class Ownership(NamedTuple):
    """What optimizers promise about a snapshot.

    Attributes:
        optimizers: all whose next step waits for it.
        owners: memory that nothing but the steps of these optimizers changes. Not all that they own: see above.
    """

    optimizers: tuple[Optimizer, ...]
    owners: Mapping[Extent | None, tuple[Optimizer, ...]]


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


class Watched(NamedTuple):
    """A tensor that must not change until it is copied.

    Attributes:
        key: its name in the snapshot.
        tensor: held until then, so that its memory is not given to somebody else.
        version: its version counter at ``save()``.
    """

    key: str
    tensor: torch.Tensor
    version: int

    def check(self, when: str) -> None:
        """Raise `SnapshotMutatedError` if it was changed since it was captured."""
        if version_of(self.tensor) != self.version:
            raise SnapshotMutatedError(f"{self.key} was modified in place {when}", key=self.key)


class GuardedCopies:
    """Copies of one snapshot that its optimizers wait for.

    Args:
        runtime: the ``torch.cuda`` namespace.
        events: by device, recorded after the last such copy.
        watched: the tensors being copied.
        owners: positions in *watched* of what each optimizer owns.
    """

    def __init__(
        self,
        runtime: Any,
        events: Mapping[int, Any],
        watched: Sequence[Watched],
        owners: Mapping[Optimizer, Sequence[int]],
    ) -> None:
        self._runtime = runtime
        self._events = events
        self._owners = owners
        # Those whose change would go unnoticed by the optimizer that owns them; guarded by the guard's lock.
        self._unchecked = dict(enumerate(watched))
        self._error: CheckpointError | None = None

    def wait_before(self, optimizer: Optimizer) -> None:
        """*optimizer* is about to step: let its streams wait, and note whether anything changed before.

        From here its tensors change by right, although nobody may have noticed yet that they are copied.
        """
        owned = self._owners.get(optimizer)
        if owned is None:
            return
        self._check(owned, "after save() and before the optimizer's next step, while it was copied")
        for index, event in self._events.items():
            self._runtime.current_stream(index).wait_event(event)

    def spoil(self, optimizer: Optimizer) -> None:
        """*optimizer* steps where it cannot wait."""
        if optimizer in self._owners and self._error is None:
            self._error = SnapshotMutatedError(
                "an optimizer was captured in a CUDA graph while its state was copied; "
                "wait for the snapshot before (SaveFuture.wait_staged)"
            )

    def finish(self) -> CheckpointError | None:
        """The copies are complete; what is wrong with them if a tensor was changed that nobody waited for."""
        self._check(tuple(self._unchecked), "after save(), other than by its optimizer's step, while it was copied")
        return self._error

    def _check(self, positions: Iterable[int], when: str) -> None:
        for position in positions:
            watched = self._unchecked.pop(position, None)
            if watched is None or self._error is not None:
                continue
            try:
                watched.check(when)
            except CheckpointError as error:
                self._error = error


class StepGuard:
    """One hook per optimizer, which does nothing while no snapshot is being copied.

    The hooks stay until `close`: removing one from the thread that sees a copy end would change the dict over which a
    stepping optimizer iterates. Optimizers pickle and copy themselves without their hooks.

    Args:
        runtime: the ``torch.cuda`` namespace.
    """

    def __init__(self, runtime: Any = torch.cuda) -> None:
        self._runtime = runtime
        # Re-entrant: a signal handler may save in the middle of a step.
        self._lock = threading.RLock()
        self._in_flight: list[GuardedCopies] = []
        self._hooks: WeakKeyDictionary[Optimizer, Any] = WeakKeyDictionary()
        # Optimizers whose hook ran since the last snapshot, and those that were captured in a graph.
        self._seen: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._captured: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Hook *optimizers* that are not hooked."""
        for optimizer in map(hookable, optimizers):
            if optimizer is None:
                continue
            handle = self._hooks.get(optimizer)
            if handle is None or handle.id not in optimizer._optimizer_step_pre_hooks:
                self._hooks[optimizer] = optimizer.register_step_pre_hook(self._before_step)

    def take_ownership(self, optimizers: Iterable[Optimizer]) -> Ownership:
        """What *optimizers* promise about the snapshot that begins now."""
        self.watch(optimizers)
        hooked = [found for found in dict.fromkeys(map(hookable, optimizers)) if found is not None]
        owners: dict[Extent | None, tuple[Optimizer, ...]] = {}
        unseen: set[Extent | None] = {None}
        for optimizer in hooked:
            extents = _extents_of(optimizer)
            if self._seen.pop(optimizer, False) and optimizer not in self._captured:
                for extent in extents:
                    owners[extent] = (*owners.get(extent, ()), optimizer)
            else:
                unseen |= extents
        for extent in unseen:
            owners.pop(extent, None)
        return Ownership(tuple(hooked), owners)

    def add(self, copies: GuardedCopies) -> None:
        """From now on steps wait for *copies*; call it before the caller of ``save()`` goes on."""
        with self._lock:
            self._in_flight.append(copies)

    def finish(self, copies: GuardedCopies) -> CheckpointError | None:
        """*copies* are complete; nobody waits for them any more. See `GuardedCopies.finish`."""
        with self._lock:
            self._in_flight.remove(copies)
            return copies.finish()

    def close(self) -> None:
        """Remove the hooks; no optimizer may be stepping."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if is_capturing(self._runtime):
            self._captured[optimizer] = True
            with self._lock:
                for copies in tuple(self._in_flight):
                    copies.spoil(optimizer)
            return
        self._seen[optimizer] = True
        with self._lock:
            for copies in tuple(self._in_flight):
                copies.wait_before(optimizer)

    def __repr__(self) -> str:
        return f"<StepGuard {len(self._hooks)} optimizers, {len(self._in_flight)} snapshots>"


def is_capturing(runtime: Any) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return bool(runtime.is_initialized() and runtime.is_current_stream_capturing())


def hookable(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer whose ``step`` runs hooks: itself, or the one it wraps; None if there is none."""
    while optimizer is not None:
        has_hooks = "_optimizer_step_pre_hooks" in optimizer.__dict__ and getattr(type(optimizer).step, "hooked", False)
        if has_hooks:
            return optimizer
        optimizer = optimizer.__dict__.get("optimizer")  # accelerate's wrapper keeps the real one there
    return None


def _extents_of(optimizer: Optimizer) -> set[Extent | None]:
    """Memory that ``optimizer.step()`` changes: its parameters and their state."""
    owned: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        _collect(list(group["params"]), owned)
    _collect(list(optimizer.state.values()), owned)
    return set(map(extent_of, owned))


def _collect(values: Iterable[Any], tensors: list[torch.Tensor]) -> None:
    """Add the tensors in *values*, at any depth, to *tensors*."""
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            tensors.append(value)
        elif isinstance(value, torch.Tensor):
            tensors.append(_local_part(value))
        elif isinstance(value, dict):
            _collect(value.values(), tensors)
        elif isinstance(value, (list, tuple)):
            _collect(value, tensors)


def _local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside a DTensor, which is what is captured of it."""
    to_local: Any = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        local: torch.Tensor = to_local()
    return local


def extent_of(tensor: torch.Tensor) -> Extent | None:
    """Where *tensor* lies; None when it has no memory."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # sparse tensors and wrappers
        return None
    return (address, tensor.nbytes) if address else None


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """`version_of` each, quickly."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [version_of(tensor) for tensor in tensors]


def version_of(tensor: torch.Tensor) -> int:
    """Its version counter; tensors made under ``torch.inference_mode()`` have none."""
    return -1 if tensor.is_inference() else tensor._version
