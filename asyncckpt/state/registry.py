"""Types that the user taught asyncckpt to store, and a few of the standard library's."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from asyncckpt.errors import CorruptCheckpointError, InvalidOptionError, UnsupportedStateError

__all__ = ["TypeCodec", "codec_by_name", "codec_for", "register_type"]

_T = TypeVar("_T")

# What the tree stores by itself; a codec for one of these would never be asked.
_BUILT_IN = (
    type(None), bool, int, float, complex, str, bytes, list, tuple, dict, collections.OrderedDict, object, type,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TypeCodec:
    """How values of one class are stored.

    Attributes:
        cls: the class.
        name: what the checkpoint calls it, ``module:QualName``.
        encode: value to a supported value.
        decode: the inverse.
    """

    cls: type
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


_codecs: dict[type, TypeCodec] = {}
_by_name: dict[str, TypeCodec] = {}
# Answers of `codec_for`, misses included; emptied by every registration.
_found: dict[type, TypeCodec | None] = {}


def register_type(cls: type[_T], encode: Callable[[_T], Any], decode: Callable[[Any], _T]) -> None:
    """Teach asyncckpt to store values of *cls* and of its subclasses.

    A subclass without a registration of its own is stored through its nearest registered base and
    comes back as that base. Registering a class again replaces its functions. Register before
    saving and before restoring: a checkpoint names the class, it never imports it.

    Args:
        cls: the class.
        encode: turns a value into supported ones (tensors, arrays and containers included).
        decode: turns what *encode* returned back into a value.

    Raises:
        InvalidOptionError: *cls* is not a class, or one that is stored without help.
    """
    if not isinstance(cls, type) or cls in _BUILT_IN:
        raise InvalidOptionError(f"register_type needs a class that is not stored already, not {cls!r}")
    codec = TypeCodec(cls, f"{cls.__module__}:{cls.__qualname__}", encode, decode)
    _codecs[cls] = codec
    _by_name[codec.name] = codec
    _found.clear()


def codec_for(cls: type) -> TypeCodec | None:
    """The codec of *cls*, else of the first registered class in its MRO, else None."""
    try:
        return _found[cls]
    except KeyError:
        found = next((_codecs[base] for base in cls.__mro__ if base in _codecs), None)
        _found[cls] = found
        return found


def codec_by_name(name: str) -> TypeCodec:
    """The codec a checkpoint names.

    Raises:
        CorruptCheckpointError: *name* is not a string.
        UnsupportedStateError: nothing is registered under it in this process.
    """
    if not isinstance(name, str):
        raise CorruptCheckpointError(f"the name of a registered type is {name!r}, not a string")
    codec = _by_name.get(name)
    if codec is None:
        raise UnsupportedStateError(
            f"the checkpoint holds a value of {name}, which is not registered here; call "
            "asyncckpt.register_type for it before restoring",
            type=name,
        )
    return codec


_FACTORIES: dict[str, Callable[[], Any]] = {
    factory.__name__: factory for factory in (bool, int, float, complex, str, bytes, list, tuple, dict, set)
}


def _encode_defaultdict(value: collections.defaultdict[Any, Any]) -> Any:
    factory = value.default_factory
    name = None if factory is None else getattr(factory, "__name__", "")
    if factory is not None and _FACTORIES.get(str(name)) is not factory:
        raise UnsupportedStateError(
            f"a defaultdict with the factory {factory!r} cannot be stored (only built-in types can); "
            "save dict(...) of it",
            type="collections.defaultdict",
        )
    return {"factory": name, "items": dict(value)}


def _decode_defaultdict(stored: Any) -> collections.defaultdict[Any, Any]:
    name = stored["factory"]
    return collections.defaultdict(None if name is None else _FACTORIES[name], stored["items"])


def _register_own(cls: type[_T], encode: Callable[[_T], Any], decode: Callable[[Any], _T]) -> None:
    """Register a class of the standard library: whatever its decoder cannot read is damage."""

    def decode_checked(stored: Any) -> _T:
        try:
            return decode(stored)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise CorruptCheckpointError(f"a {cls.__name__} in the checkpoint is malformed: {error!r}") from error

    register_type(cls, encode, decode_checked)


def _sorted_if_possible(values: set[Any] | frozenset[Any]) -> list[Any]:
    # The order of a set of strings differs from process to process; equal states should give equal headers.
    try:
        return sorted(values)
    except TypeError:
        return list(values)


_register_own(collections.Counter, dict, collections.Counter)
_register_own(
    collections.deque,
    lambda value: {"maxlen": value.maxlen, "items": list(value)},
    lambda stored: collections.deque(stored["items"], stored["maxlen"]),
)
_register_own(collections.defaultdict, _encode_defaultdict, _decode_defaultdict)
_register_own(set, _sorted_if_possible, set)
_register_own(frozenset, _sorted_if_possible, frozenset)
