"""Looks at one crash state with the real package and says which promises are broken."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from asyncckpt.errors import CheckpointError
from asyncckpt.repository import Catalog, CommittedStep, clean_partials, verify_step
from asyncckpt.repository.names import HEADER, OWN, PARTIAL
from crashstates.expectations import ROOT, Expectations, Written, expectations, written_steps
from crashstates.image import Image
from crashstates.image_store import ImageStore
from crashstates.program import write_step
from crashstates.states import Disk

__all__ = ["Promises"]

Offered = dict[int, str]


class Promises:
    """Checks the states of one disk.

    Verifying a step gives the same answer wherever its bytes are the same, so answers are kept by
    digest; everything else runs anew on every state.
    """

    def __init__(self, disk: Disk) -> None:
        self._written = written_steps(disk)
        self._expectations = expectations(disk.history)
        self._marks = sorted(self._expectations)
        self._verdicts: dict[tuple[int, str], str | None] = {}

    def mark_at(self, moment: int) -> int:
        """The last mark before *moment*: states that are equal and have it in common need one check."""
        return self._marks[bisect.bisect_right(self._marks, moment) - 1]

    def check(self, image: Image, moment: int, *, saves: bool = False) -> list[str]:
        """The broken promises.

        Args:
            saves: also save after the recovery, which is slow.
        """
        expected = self._expectations[self.mark_at(moment)]
        try:
            return list(self._check(image, expected, saves))
        except CheckpointError as error:
            return [f"the package fails on what it finds: {error!r}"]

    def _check(self, image: Image, expected: Expectations, saves: bool) -> Iterator[str]:
        if expected.is_prepared and image.find(f"{ROOT}/{PARTIAL}") is None:
            yield "a directory of the prepared root is missing"
        yield from self._check_steps(image, expected, "")
        yield from self._check_aside(image, expected)
        yield from self._check_recovery(image, expected, saves)

    def _check_steps(self, image: Image, expected: Expectations, when: str) -> Iterator[str]:
        catalog = Catalog(ImageStore(image, ROOT))
        committed = {step.step: step.header.nonce for step in catalog.committed()}
        digests = image.digests()
        for step, nonce in committed.items():
            if nonce in expected.gone:
                yield f"step {step} is offered{when} although it was removed or set aside ({nonce})"
            if nonce in expected.damaged:
                continue
            key = (step, digests[image.find(f"{ROOT}/{CommittedStep(catalog.store, step).prefix}") or 0])
            if key not in self._verdicts:
                self._verdicts[key] = self._verdict(image, step, nonce)
            if (reason := self._verdicts[key]) is not None:
                yield f"step {step} is offered{when} but {reason}"
        for damaged in catalog.damaged:
            yield f"step {damaged.step} has a damaged header{when}: {damaged.error}"
        whole = [step for step, nonce in committed.items() if nonce not in expected.damaged]
        if max(whole, default=0) < expected.newest:
            yield f"of the steps from {expected.newest}, the newest acknowledged one, on none is there{when}"
        for step, nonce in expected.acknowledged.items():
            if committed.get(step) != nonce:
                yield f"step {step} was acknowledged ({nonce}) and is not there{when}"

    def _verdict(self, image: Image, step: int, nonce: str) -> str | None:
        store = ImageStore(image, ROOT)
        prefix = CommittedStep(store, step).prefix
        written = self._written.get(nonce)
        if written is None or written.step != step:
            return f"nobody wrote it ({nonce})"
        report = verify_step(CommittedStep(store, step), threads=1)
        if not report.ok:
            return f"it is torn: {report.damaged[0].key}: {report.damaged[0].reason}"
        if not written.equals(image.tree(store.require(prefix))):
            return "it verifies although it is not what was written"
        return None

    def _check_aside(self, image: Image, expected: Expectations) -> Iterator[str]:
        for nonce in expected.aside:
            written = self._written[nonce]
            if not any(self._holds(image, inode, nonce, written) for inode in self._places_of_aside(image, written)):
                yield f"the damaged step {written.step} is lost, or part of it"

    def _places_of_aside(self, image: Image, written: Written) -> Iterator[int]:
        names = image.directories.get(image.find(f"{ROOT}/{OWN}/damaged") or -1, {})
        yield from (inode for name, inode in names.items() if name.startswith(f"step-{written.step:08}-"))
        in_place = image.find(f"{ROOT}/step-{written.step:08}")
        if in_place is not None:
            yield in_place

    @staticmethod
    def _holds(image: Image, inode: int, nonce: str, written: Written) -> bool:
        files = image.tree(inode)
        return files.keys() == written.files.keys() and nonce.encode() in files[HEADER].data

    def _check_recovery(self, image: Image, expected: Expectations, saves: bool) -> Iterator[str]:
        """What the next run does: clear what is unfinished, and save."""
        image = image.copy()
        store = ImageStore(image, ROOT)
        if clean_partials(store) or saves:
            yield from self._check_cleaned(store)
            yield from self._check_steps(image, expected, " after cleaning")
        if saves:
            yield from self._check_saves(store, expected)

    @staticmethod
    def _check_cleaned(store: ImageStore) -> Iterator[str]:
        if left := store.entries(PARTIAL):
            yield f"cleaning leaves {left[0].name}"
        for entry in store.entries(""):
            if entry.name.startswith("step-") and not any(e.name == HEADER for e in store.entries(entry.name)):
                yield f"cleaning leaves {entry.name} without a header"

    def _check_saves(self, store: ImageStore, expected: Expectations) -> Iterator[str]:
        """The next step, and every number that is not taken, can be saved."""
        taken = Catalog(store).steps()
        for step in sorted({*range(1, max(taken, default=0) + 2)} - {*taken}):
            write_step(store, step, "after-the-crash")
            if not verify_step(CommittedStep(store, step), threads=1).ok:
                yield f"step {step}, saved after the crash, does not verify"
        yield from self._check_steps(_without(store.image, "after-the-crash"), expected, " after new saves")


def _without(image: Image, nonce: str) -> Image:
    """*image* without the steps of *nonce*, which nobody expects."""
    names = image.directories[image.find(ROOT) or 0]
    for step in [step for step in Catalog(ImageStore(image, ROOT)).committed() if step.header.nonce == nonce]:
        del names[step.prefix]
    return image
