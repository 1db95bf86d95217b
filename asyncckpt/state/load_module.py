"""Loads an ``nn.Module``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from asyncckpt.errors import StateMismatchError
from asyncckpt.state.backup import ModuleBackup
from asyncckpt.state.fresh import Fresh
from asyncckpt.state.loader import Copies
from asyncckpt.state.modules import ModuleState
from asyncckpt.state.problems import Problems, why_tensor_differs
from asyncckpt.state.registry import codec_for
from asyncckpt.state.selection import Selection
from asyncckpt.state.stored import StoredCustom, StoredTensor, array_keys
from asyncckpt.state.tensors import wrap_like
from asyncckpt.state.torch_types import is_bytes_only

__all__ = ["ModuleLoader", "compare_module", "runs_own_code", "would_be_cast"]


def compare_module(
    state: ModuleState, stored: Mapping[str, Any], path: str, selection: Selection
) -> tuple[dict[str, Any], Problems]:
    """Which selected entries can be loaded, by key of the live state dict, and what is wrong with the others."""
    problems = Problems()
    entries: dict[str, Any] = {}
    for name, (key, live) in zip(state.names, state.live.items(), strict=True):
        if not selection.is_everything and f"{path}/{name}" not in selection:
            continue
        if name not in stored:
            problems.missing(f"{path}/{name}")
            continue
        value = stored[name]
        # A registered class has to cope with what its own codec made: ``copy_`` decides.
        is_plain = isinstance(live, torch.Tensor) and not (type(value) is StoredCustom and codec_for(type(live)))
        why = why_tensor_differs(live, value) if is_plain else None
        if why is None:
            entries[key] = value
        else:
            problems.mismatched(f"{path}/{name}", why)
    known = set(state.names)
    for name in stored:
        if name not in known and f"{path}/{name}" in selection:
            problems.unexpected(f"{path}/{name}")
    return entries, problems


def would_be_cast(state: ModuleState, stored: Mapping[str, Any]) -> bool:
    """Whether ``load_state_dict`` would turn an entry into another type, which rounds, without a word."""
    return any(
        type(value) is StoredTensor and isinstance(live, torch.Tensor) and live.dtype is not value.dtype
        for live, value in zip(state.live.values(), map(stored.get, state.names), strict=True)
    )


def runs_own_code(module: nn.Module, live: Mapping[str, Any]) -> bool:
    """Whether ``load_state_dict`` of *module* may do anything but copy into parameters and buffers.

    If not, once names, shapes and types were compared, nothing can fail.
    """
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    if any(id(value) not in own or _is_odd(value) for value in live.values()):
        return True  # extra state, or a hook made the value: copying into it would change nothing
    return torch.__future__.get_swap_module_params_on_conversion() or any(map(_has_own_code, module.modules()))


def _is_odd(tensor: torch.Tensor) -> bool:
    return (
        is_lazy(tensor) or codec_for(type(tensor)) is not None or tensor.is_inference() or is_bytes_only(tensor.dtype)
    )


def _has_own_code(part: nn.Module) -> bool:
    if getattr(part, "_load_state_dict_pre_hooks", True) or getattr(part, "_load_state_dict_post_hooks", True):
        return True
    kind = type(part)
    if kind.set_extra_state is not nn.Module.set_extra_state:
        return True
    methods = ("load_state_dict", "_load_from_state_dict")
    return any(not getattr(kind, name).__module__.startswith("torch.") or name in vars(part) for name in methods)


class ModuleLoader:
    """Loads one module.

    Without code of its own, its tensors are written into by the copies, which cannot fail and need no
    backup of a large model. (``load_state_dict`` would do the same; torch's takes a second for 10,000
    tensors, and waits for each.) Otherwise ``load_state_dict`` runs in `load`, with tensors it may
    keep, and with a backup in host memory.

    Args:
        module: the module.
        state: its present state dict.
        entries: what to load, by key of the live state dict.
        metadata: versions of its submodules by canonical name.
        path: where it is.
        strict: whether its ``load_state_dict`` is to refuse other keys.
        own_code: what `runs_own_code` said.
    """

    rank = 1

    def __init__(
        self,
        module: nn.Module,
        state: ModuleState,
        entries: Mapping[str, Any],
        metadata: Mapping[str, Any] | None,
        path: str,
        *,
        strict: bool,
        own_code: bool,
    ) -> None:
        self.path = path
        self._module = module
        self._state = state
        self._entries = entries
        self._metadata = metadata
        self._strict = strict
        self._own_code = own_code
        self._value: OrderedDict[str, Any] = OrderedDict()
        self.copies: Copies = []
        self._backup: ModuleBackup | None = None

    def array_keys(self) -> Iterator[str]:
        return array_keys(dict(self._entries))

    def prepare(self, fresh: Fresh) -> None:
        live = self._state.live
        if not self._own_code:
            self.copies = [(live[key], fresh.source(stored)) for key, stored in self._entries.items()]
            return
        for key, stored in self._entries.items():
            present = live.get(key)
            value = fresh.value(stored, present)
            if isinstance(value, torch.Tensor) and isinstance(present, torch.Tensor):
                value = wrap_like(value, present)
            self._value[key] = value
        if self._metadata is not None:
            self._value._metadata = self._live_metadata(self._metadata)  # type: ignore[attr-defined]
        self._backup = ModuleBackup(self._module)

    def load(self) -> None:
        if not self._own_code:
            return
        live = self._state.live.values()
        is_inference = any(
            isinstance(value, torch.Tensor) and not is_lazy(value) and value.is_inference() for value in live
        )
        with torch.inference_mode() if is_inference else torch.no_grad():
            try:
                self._module.load_state_dict(self._value, strict=self._strict)
            except RuntimeError as error:
                if not str(error).startswith("Error(s) in loading state_dict"):  # a hook's, not torch's verdict
                    raise
                raise StateMismatchError(f"{self.path} does not fit its module: {error}") from error

    def undo(self) -> None:
        if self._backup is not None:
            self._backup.restore()

    def finish(self) -> None:
        self._value, self.copies, self._backup = OrderedDict(), [], None

    def _live_metadata(self, metadata: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Versions under the names the live module uses, wrappers included."""
        present = getattr(self._state.live, "_metadata", {})
        names = {name: self._state.rename(name) for name in present}
        entries = {name: metadata[canonical] for name, canonical in names.items() if canonical in metadata}
        # Torch adds this entry when it is to exchange parameters instead of copying into them.
        return OrderedDict(
            (name, {key: value for key, value in entry.items() if key != "assign_to_params_buffers"})
            for name, entry in (entries or metadata).items()
            if isinstance(entry, dict)
        )
