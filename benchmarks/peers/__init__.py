"""The savers that are compared, each behind the same methods.

Each is set up the way its own documentation recommends for states on the CPU, and so that its
acknowledgement means the same as far as it can: file contents are fsynced before a save counts as
durable. What still differs is written beside each class and in README.md.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence

from peers.base import Pending, Saver
from peers.meta import TorchCheckpointing
from peers.ours import Asyncckpt, AsyncckptNone, AsyncckptSmall
from peers.tensor_files import Safetensors, TensorStore
from peers.torch_native import DcpProcess, DcpSave, DcpThread, TorchMmap, TorchSave

__all__ = ["PEERS", "Asyncckpt", "Pending", "Saver", "TorchCheckpointing", "TorchSave", "installed"]

PEERS: dict[str, type[Saver]] = {
    "torch.save": TorchSave,
    "torch.save mmap": TorchMmap,
    "dcp.save": DcpSave,
    "dcp.async_save thread": DcpThread,
    "dcp.async_save process": DcpProcess,
    "torch_checkpointing": TorchCheckpointing,
    "safetensors": Safetensors,
    "tensorstore": TensorStore,
    "asyncckpt fast": Asyncckpt,
    "asyncckpt none": AsyncckptNone,
    "asyncckpt small": AsyncckptSmall,
}
"""Every saver by the name it has in the tables."""


def installed(names: Sequence[str], savers: Mapping[str, type[Saver]] = PEERS) -> list[str]:
    """Those of *names* whose packages are installed; the others are told about."""
    found = []
    for name in names:
        if importlib.util.find_spec(savers[name].requires) is not None:
            found.append(name)
        else:
            print(f"{name}: {savers[name].requires} is not installed, left out", file=sys.stderr)
    return found
