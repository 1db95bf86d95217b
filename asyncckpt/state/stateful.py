"""What counts as an object with state of its own."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

__all__ = ["Stateful", "is_stateful"]


class Stateful(Protocol):
    """Anything with ``state_dict()`` and ``load_state_dict()``: schedulers, scalers, loaders, your own."""

    def state_dict(self) -> Any:
        """The state as supported values."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take over what `state_dict` returned."""


def is_stateful(value: object) -> TypeGuard[Stateful]:
    """Whether *value* is an instance (not a class) with both methods."""
    return (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )
