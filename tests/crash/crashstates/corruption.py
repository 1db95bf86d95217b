"""Damage that is no crash: bits that rot, files cut, grown, lost, stale or foreign. None may pass verification."""

from __future__ import annotations

from collections.abc import Iterator

from asyncckpt.errors import CheckpointError
from asyncckpt.repository import Catalog, CommittedStep, verify_step
from crashstates.expectations import ROOT, Written, written_steps
from crashstates.history import History
from crashstates.image import Content, Image
from crashstates.image_store import ImageStore
from crashstates.states import Disk

__all__ = ["accepted_damage"]

_FLIPS_PER_FILE = 100


def accepted_damage(history: History) -> tuple[int, list[str]]:
    """Damage the newest step at the end of *history* in every way, and ask the package.

    Returns:
        How many damaged steps there were, and which of them passed although they are not what was written.
    """
    disk = Disk(history)
    written = written_steps(disk)
    final = disk.image(disk.everything(history.moments[-1]))
    step = Catalog(ImageStore(final, ROOT)).steps()[-1]
    count, accepted = 0, []
    for what, image in _damages(final, step, written):
        count += 1
        accepted += [f"step {found} verifies with {what}" for found in _wrongly_accepted(image, written)]
    return count, accepted


def _damages(final: Image, step: int, written: dict[str, Written]) -> Iterator[tuple[str, Image]]:
    prefix = CommittedStep(ImageStore(final, ROOT), step).prefix
    stale = next(other for other in written.values() if other.step != step).files
    for key, content in final.tree(final.find(f"{ROOT}/{prefix}") or 0).items():
        for what, data in _damaged(content.data, stale.get(key)):
            image = final.copy()
            image.files[image.find(f"{ROOT}/{prefix}/{key}") or 0] = Content(data)
            yield f"{key} {what}", image
        image = final.copy()
        ImageStore(image, ROOT).delete(f"{prefix}/{key}")
        yield f"{key} missing", image
    image = final.copy()
    ImageStore(image, ROOT).put(f"{prefix}/state/foreign", b"")
    yield "a foreign file", image
    image = final.copy()
    names = image.directories[image.find(ROOT) or 0]
    names["step-00000099"] = names[prefix]
    yield "the number of another step", image


def _damaged(data: bytes, stale: Content | None) -> Iterator[tuple[str, bytes]]:
    for position in sorted({*range(0, len(data), max(len(data) // _FLIPS_PER_FILE, 1)), len(data) - 1}):
        yield f"with a flipped bit at {position}", data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
    yield "empty", b""
    yield "cut by a byte", data[:-1]
    yield "cut in half", data[: len(data) // 2]
    yield "grown by a byte", data + b"\0"
    yield "zeroed", bytes(len(data))
    if stale is not None and stale.data != data:
        yield "of another step", stale.data


def _wrongly_accepted(image: Image, written: dict[str, Written]) -> Iterator[int]:
    store = ImageStore(image, ROOT)
    for step in Catalog(store).steps():
        committed = CommittedStep(store, step)
        files = image.tree(store.require(committed.prefix))
        is_as_written = any(other.step == step and other.equals(files) for other in written.values())
        try:
            if verify_step(committed, threads=1).ok and not is_as_written:
                yield step
        except CheckpointError:
            continue
