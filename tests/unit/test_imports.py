"""What importing costs: the facade is lazy, and what runs beside the trainer stays light."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import asyncckpt
from asyncckpt import errors

TORCH_FREE = ("writer", "stores", "format", "policies", "repository", "telemetry", "cli")
CODEC_FREE = ("stores", "repository", "cli")


def modules_of(package: str) -> list[str]:
    """Every module of a subpackage, except those that run something when imported."""
    root = Path(asyncckpt.__file__).parent
    paths = (root / package).rglob("*.py")
    names = (path.relative_to(root.parent).with_suffix("").as_posix().replace("/", ".") for path in paths)
    return sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__"))


def loaded_after(code: str) -> set[str]:
    """Top-level modules in ``sys.modules`` of a fresh interpreter that ran *code*."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("package", TORCH_FREE)
def test_what_runs_beside_the_trainer_never_imports_torch(package: str) -> None:
    names = modules_of(package)
    assert names
    assert "torch" not in loaded_after(f"import {', '.join(names)}")


@pytest.mark.parametrize("package", CODEC_FREE)
def test_moving_and_committing_bytes_imports_no_codec(package: str) -> None:
    assert loaded_after(f"import {', '.join(modules_of(package))}").isdisjoint({"zarr", "numcodecs", "numpy"})


@pytest.mark.parametrize("verb", ["ls", "show", "verify", "run"])
def test_looking_at_checkpoints_imports_neither_torch_nor_zarr_nor_numpy(verb: str) -> None:
    loaded = loaded_after(f"import asyncckpt.cli.app, asyncckpt.cli.{verb}")
    assert loaded.isdisjoint({"torch", "zarr", "numcodecs", "numpy", "rich"})


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "zarr", "numcodecs", "numpy", "msgspec", "anyio", "xxhash", "typer"}
    assert loaded_after("import asyncckpt").isdisjoint(heavy)


@pytest.mark.parametrize("name", asyncckpt.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(asyncckpt, name) is not None
    assert name in dir(asyncckpt)


def test_type_checkers_see_what_runs() -> None:
    """The ``TYPE_CHECKING`` imports and the table of homes say the same."""
    tree = ast.parse(inspect.getsource(asyncckpt))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        (node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    run = {(home, name) for home, names in asyncckpt._HOMES.items() for name in names}
    assert typed == run
    assert sorted(name for _, name in run) == sorted(asyncckpt.__all__)


def test_every_error_is_public() -> None:
    classes = {name for name in errors.__all__ if inspect.isclass(getattr(errors, name))}
    assert classes <= set(asyncckpt.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Chekpointer'"):
        asyncckpt.Chekpointer  # noqa: B018
