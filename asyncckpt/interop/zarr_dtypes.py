"""bfloat16 and float8 for zarr-python, on top of ml_dtypes' numpy types.

Names and fill values follow the zarr-extensions registry. zarr-python has no public home for the
mix-ins, and moves its modules between releases; both places known (3.1 and 3.4) are covered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import ZDType, data_type_registry

try:  # zarr 3.4
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # zarr 3.1
    from zarr.dtype import DataTypeValidationError

__all__ = ["ZARR_DTYPES", "BFloat16", "register_zarr_dtypes"]


class _MlDtype(ZDType, HasItemSize):  # type: ignore[type-arg]
    """What the types share; a concrete class names its ml_dtypes scalar and its Zarr name."""

    _scalar: ClassVar[type]

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """The data type for the numpy *dtype*.

        Raises:
            DataTypeValidationError: it is another one.
        """
        if dtype != np.dtype(cls._scalar):
            raise DataTypeValidationError(f"{dtype} is not {cls._zarr_v3_name}")
        return cls()

    def to_native_dtype(self) -> Any:
        """The numpy dtype."""
        return np.dtype(self._scalar)

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"{cls._zarr_v3_name} does not exist in Zarr format 2")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name}")
        return cls()

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        """The name in metadata.

        Raises:
            ValueError: *zarr_format* is 2.
        """
        if zarr_format != 3:
            raise ValueError(f"{self._zarr_v3_name} does not exist in Zarr format 2")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, (int, float, np.number, self._scalar))

    def cast_scalar(self, data: object) -> Any:
        """*data* as a scalar of this type.

        Raises:
            TypeError: it is not a number.
        """
        if not self._check_scalar(data):
            raise TypeError(f"cannot make a {self._zarr_v3_name} of {data!r}")
        return self._scalar(data)

    def default_scalar(self) -> Any:
        """The scalar whose bits are all zero; not the same as ``scalar(0)`` for float8_e8m0fnu, which has no zero."""
        return np.zeros((), dtype=np.dtype(self._scalar))[()]

    @property
    def item_size(self) -> int:
        """Bytes per element."""
        return int(np.dtype(self._scalar).itemsize)

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> Any:
        """The fill value that *data* stands for: hex of its bits, a number, or a name such as ``"NaN"``.

        Raises:
            TypeError: it is none of these.
        """
        if isinstance(data, str) and data.startswith("0x"):
            bits = int(data, 16).to_bytes(self.item_size, "little")
            return np.frombuffer(bits, dtype=np.dtype(self._scalar))[0]
        if isinstance(data, (int, float)) or data in ("NaN", "Infinity", "-Infinity"):
            return self._scalar(float(data))
        raise TypeError(f"{data!r} is not a fill value of {self._zarr_v3_name}")

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        """The fill value in metadata: hex of its bits."""
        bits = np.array(data, dtype=np.dtype(self._scalar)).tobytes()
        return f"0x{int.from_bytes(bits, 'little'):0{2 * self.item_size}x}"


@dataclass(frozen=True, kw_only=True)
class BFloat16(_MlDtype, HasEndianness):
    """Zarr ``bfloat16``."""

    dtype_cls = type(np.dtype(ml_dtypes.bfloat16))
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    _scalar = ml_dtypes.bfloat16

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        """The fill value in metadata: a number, as for the other floats."""
        value = float(self.cast_scalar(data))
        if math.isnan(value):
            return super().to_json_scalar(data, zarr_format=zarr_format)
        return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _float8(class_name: str, name: str) -> type[_MlDtype]:
    scalar = getattr(ml_dtypes, name)
    namespace = {
        "__doc__": f"Zarr ``{name}``.",
        "__module__": __name__,
        "dtype_cls": type(np.dtype(scalar)),
        "_zarr_v3_name": name,
        "_scalar": scalar,
    }
    return dataclass(frozen=True, kw_only=True)(type(class_name, (_MlDtype,), namespace))


# Each is an attribute of this module: pyproject.toml names them as entry points, and pickle looks for them here.
Float8E3M4 = _float8("Float8E3M4", "float8_e3m4")
Float8E4M3 = _float8("Float8E4M3", "float8_e4m3")
Float8E4M3B11FNUZ = _float8("Float8E4M3B11FNUZ", "float8_e4m3b11fnuz")
Float8E4M3FN = _float8("Float8E4M3FN", "float8_e4m3fn")
Float8E4M3FNUZ = _float8("Float8E4M3FNUZ", "float8_e4m3fnuz")
Float8E5M2 = _float8("Float8E5M2", "float8_e5m2")
Float8E5M2FNUZ = _float8("Float8E5M2FNUZ", "float8_e5m2fnuz")
Float8E8M0FNU = _float8("Float8E8M0FNU", "float8_e8m0fnu")

ZARR_DTYPES: dict[str, type[_MlDtype]] = {
    cls._zarr_v3_name: cls
    for cls in (
        BFloat16,
        Float8E3M4,
        Float8E4M3,
        Float8E4M3B11FNUZ,
        Float8E4M3FN,
        Float8E4M3FNUZ,
        Float8E5M2,
        Float8E5M2FNUZ,
        Float8E8M0FNU,
    )
}


def register_zarr_dtypes() -> None:
    """Teach zarr-python our data types; idempotent, and leaves types alone that it knows by then."""
    for name, cls in ZARR_DTYPES.items():
        if name not in data_type_registry.contents:
            data_type_registry.register(name, cls)
