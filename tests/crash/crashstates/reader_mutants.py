"""Bugs planted where steps are found, checked and cleaned up: checks left out."""

from __future__ import annotations

from crashstates.mutants import Mutant

__all__ = ["EQUIVALENT_READER_MUTANTS", "READER_MUTANTS"]

_ROOT = "repository/root.py"
_CATALOG = "repository/catalog.py"
_VERIFY = "repository/verify.py"
_HEADER = "format/header.py"
_INDEX = "format/index.py"

_INDEX_DAMAGE = "damaged.append(_damage(reference.key, error))"


def _blind(name: str, file: str, old: str, new: str, **options) -> Mutant:
    """A check left out: damaged steps must show it, in one flush mode, since they are the same in both."""
    return Mutant(name, ((file, old, new),), flushes=("syncfs",), judged_by="damage", **options)


def _careless(name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, tuple((_ROOT, old, new) for old, new in edits), judged_by="recovery")


READER_MUTANTS = (
    _blind(
        "header: digest not checked",
        _HEADER,
        'if xxhash.xxh3_128_hexdigest(data[:start] + _ZEROS + data[end:]).encode("ascii") != tail[1]:',
        "if False:",
    ),
    _blind("header: of another step accepted", _CATALOG, "if header.step != self.step:", "if False:"),
    _blind(
        "index: digest of its zarr.json not checked",
        _INDEX,
        "if xxhash.xxh3_128_hexdigest(metadata) != reference.metadata_digest:",
        "if False:",
    ),
    _blind(
        "index: digest not checked",
        _INDEX,
        "or xxhash.xxh3_128_hexdigest(chunk) != reference.digest:",
        "or False:",
    ),
    Mutant(
        "verify: a damaged index ignored, with all it would name",
        (
            (_VERIFY, _INDEX_DAMAGE, "self._is_blind = True"),
            (_VERIFY, "        if not damaged:  #", '        if not hasattr(self, "_is_blind"):  #'),
        ),
        flushes=("syncfs",),
        judged_by="damage",
    ),
    _blind("verify: a damaged header ignored", _VERIFY, "damaged = (_damage(HEADER, error),)", "damaged = ()"),
    _blind("verify: sizes not checked", _VERIFY, "if entry.bytes != record.bytes:", "if False:"),
    _blind("verify: digests not checked", _VERIFY, "if digest.hexdigest() != record.stored:", "if False:"),
    _blind(
        "verify: missing files ignored",
        _VERIFY,
        'damaged.append(Damage(record.key, "the file is missing"))',
        "pass",
    ),
    _blind("verify: foreign files ignored", _VERIFY, "        if not damaged:  #", "        if False:  #"),
    _careless("clean: partial steps left", ("leftovers = store.entries(PARTIAL)", "leftovers = []")),
    _careless("clean: steps without a header left", ("and not _has_header(store, entry.name)", "and False")),
    _careless("clean: every step removed", ("and not _has_header(store, entry.name)", "and True")),
    _careless(
        "clean: steps without a header looked for too early",
        (
            "    partials = discard_partials(store)\n",
            "",
        ),
        ("    for key in headerless:\n", "    partials = discard_partials(store)\n    for key in headerless:\n"),
    ),
)

EQUIVALENT_READER_MUTANTS = (
    _blind(
        "verify: a damaged index ignored",
        _VERIFY,
        _INDEX_DAMAGE,
        "pass",
        equivalent="every file that the index would have named is then a foreign one",
    ),
    _blind(
        "index: size not checked",
        _INDEX,
        "if len(chunk) != reference.bytes or",
        "if",
        equivalent="the digest is of the whole file, so a wrong size has a wrong digest",
    ),
)
