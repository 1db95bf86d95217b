"""Bugs planted where steps are written, removed and set aside: flushes left out, and wrong orders."""

from __future__ import annotations

from crashstates.mutants import Mutant

__all__ = ["EQUIVALENT_WRITER_MUTANTS", "WRITER_MUTANTS"]

_ACKNOWLEDGE = '__import__("builtins").acknowledge()'
_PRUNE = '__import__("builtins").prune()'

_ROOT = "repository/root.py"
_COMMIT = "repository/commit.py"
_CATALOG = "repository/catalog.py"
_RETENTION = "repository/retention.py"
_QUARANTINE = "repository/quarantine.py"
_PIPELINE = "writer/pipeline.py"
_DURABILITY = "stores/durability.py"
_LOCAL = "stores/local.py"
_SINKS = "stores/sinks.py"

_SYNC_PATH = '        _sync_path(f"{root}/{PARTIAL}")\n'
_WAIT = "            self._barrier.wait()\n"
_PUT_HEADER = '            store.put(f"{self._prefix}/{HEADER}", header_file, durable=True)\n'
_SYNC_STEP = "            store.sync_directory(self._prefix)\n"
_RENAME = "            self._rename()\n"
_RENAMED = f"{_RENAME}            self._prefix = step_name(self._step)\n"
_SYNC_RENAMES = "                sync_renames(store)\n"
_SYNC_ROOT = '    store.sync_directory("")\n'
_SYNC_PARTIAL = "    store.sync_directory(PARTIAL)\n"
_SYNC_SELF = "            self._sync_tree(child)\n        sync_directory_path(path)\n"
_BELOW = "        for child in below:"
_DELETE_HEADER = "        self.store.delete(header_key(self.step))\n"
_SYNC_HEADER = "        self.store.sync_directory(self.prefix)\n"
_SYNC_KEPT = "        sync_renames(store)\n"
_SYNC_OWN = "    store.sync_directory(OWN)"
_MOVE = "    store.rename(step_name(step), target)\n"
_SYNC_DAMAGED = "    store.sync_directory(DAMAGED)\n"
_IS_SYNCED = "if self._is_synced or is_dropped:"
_TAIL = "            self._append(self._staging.view[whole : self._used])\n"
_CONFIRM = "        sync_renames(self._store)\n"


def _drop(name: str, file: str, line: str, **options) -> Mutant:
    return Mutant(name, ((file, line, ""),), **options)


def _change(name: str, file: str, old: str, new: str, **options) -> Mutant:
    return Mutant(name, ((file, old, new),), **options)


def _acknowledged_before(what: str, line: str) -> Mutant:
    indent = line[: len(line) - len(line.lstrip())]
    return _change(f"commit: acknowledged before {what}", _COMMIT, line, f"{indent}{_ACKNOWLEDGE}\n{line}")


def _not_flushed(directory: str) -> Mutant:
    call = "            sync_directory_path(path)"
    skipping = f"            path.endswith({'/' + directory!r}) or sync_directory_path(path)"
    return _change(f"prepare: the directory {directory} not flushed", _ROOT, call, skipping)


WRITER_MUTANTS = (
    _drop("prepare: nothing flushed", _ROOT, _SYNC_PATH),
    *map(_not_flushed, (".asyncckpt", "root", "deeper", "new", "top")),
    _change(
        "prepare: only new directories flushed",
        _ROOT,
        _SYNC_PATH,
        '        sync_directory_path(f"{root}/{OWN}")\n        sync_directory_path(root)\n',
        scenario="pipeline",
    ),
    _drop("commit: data not flushed", _COMMIT, _WAIT),
    _change("commit: header not flushed", _COMMIT, "header_file, durable=True", "header_file", flushes=("syncfs",)),
    _drop("commit: step directory not flushed", _COMMIT, _SYNC_STEP),
    _drop("commit: root not flushed", _COMMIT, _SYNC_ROOT),
    _drop("commit: partial directory not flushed", _COMMIT, _SYNC_PARTIAL),
    Mutant(
        "commit: data flushed too early",
        (
            (_COMMIT, _WAIT, ""),
            (
                _COMMIT,
                "        return cls(store, step, prefix, store.open_barrier(prefix))\n",
                "        barrier = store.open_barrier(prefix)\n        barrier.wait()\n"
                "        return cls(store, step, prefix, barrier)\n",
            ),
        ),
    ),
    Mutant(
        "commit: renamed before the data is flushed",
        (
            (_COMMIT, _RENAME, ""),
            (_COMMIT, _WAIT, f"{_RENAMED}            self._barrier = store.open_barrier(self._prefix)\n{_WAIT}"),
        ),
    ),
    Mutant(
        "commit: renamed before the header is written",
        ((_COMMIT, _RENAME, ""), (_COMMIT, _PUT_HEADER, f"{_RENAMED}{_PUT_HEADER}")),
    ),
    _acknowledged_before("the data is flushed", _WAIT),
    _acknowledged_before("the header is written", _PUT_HEADER),
    _acknowledged_before("the step directory is flushed", _SYNC_STEP),
    _acknowledged_before("the rename", _RENAME),
    _acknowledged_before("the root is flushed", _SYNC_ROOT),
    _acknowledged_before("the partial directory is flushed", _SYNC_PARTIAL),
    _change(
        "pipeline: acknowledged before the commit",
        _PIPELINE,
        "            await anyio.to_thread.run_sync(step.commit,",
        f"            {_ACKNOWLEDGE}\n            await anyio.to_thread.run_sync(step.commit,",
        scenario="pipeline",
    ),
    _drop("pipeline: a commit found done is not flushed", _PIPELINE, _CONFIRM, scenario="pipeline"),
    _change(
        "pipeline: of a commit found done, only the root is flushed",
        _PIPELINE,
        _CONFIRM,
        '        self._store.sync_directory("")\n',
        scenario="pipeline",
    ),
    _drop("put: not flushed", _LOCAL, "                if is_synced:\n                    sync_file(fd)\n"),
    _change(
        "create: not flushed",
        _LOCAL,
        'size_hint, is_synced=self.flush == "each"',
        "size_hint, is_synced=False",
        flushes=("each",),
    ),
    _change("sink: not flushed", _SINKS, _IS_SYNCED, "if is_dropped:", flushes=("each",)),
    Mutant(
        "sink: flushed before its tail",
        (
            (_SINKS, _IS_SYNCED, "if is_dropped:"),
            (_SINKS, _TAIL, f"            sync_file(self._fd)\n{_TAIL}"),
        ),
        flushes=("each",),
    ),
    _change("syncfs: not called", _DURABILITY, "if libc.syncfs(self._fd) != 0", "if False", flushes=("syncfs",)),
    _change("syncfs: fsync instead", _DURABILITY, "libc.syncfs(", "libc.fsync(", flushes=("syncfs",)),
    _change("tree: only its top flushed", _DURABILITY, "for child in below:", "for child in ():", flushes=("each",)),
    _change(
        "tree: its leaves not flushed",
        _DURABILITY,
        _SYNC_SELF,
        "            self._sync_tree(child)\n        if below:\n            sync_directory_path(path)\n",
        flushes=("each",),
    ),
    _drop("delete: header not flushed", _CATALOG, _SYNC_HEADER),
    _drop("delete: in any order", _CATALOG, _DELETE_HEADER + _SYNC_HEADER),
    _change(
        "delete: data first",
        _CATALOG,
        _DELETE_HEADER,
        f'        self.store.delete(f"{{self.prefix}}/state")\n{_DELETE_HEADER}',
    ),
    _change("retention: what is kept is not flushed", _RETENTION, _SYNC_KEPT, "        pass\n"),
    Mutant(
        "retention: the oldest is kept",
        (
            (_RETENTION, "info.step, reverse=True)", "info.step)"),
            (_RETENTION, "info.step), reverse=True)", "info.step))"),
        ),
    ),
    Mutant(
        "retention: before the new step is durable",
        (
            (_COMMIT, _SYNC_RENAMES, f"                {_PRUNE}\n{_SYNC_RENAMES}"),
            (_RETENTION, _SYNC_KEPT, "        pass\n"),
        ),
    ),
    _change("set aside: .asyncckpt not flushed", _QUARANTINE, _SYNC_OWN, "    pass"),
    Mutant(
        "set aside: moved before .asyncckpt is flushed",
        ((_QUARANTINE, _MOVE, ""), (_QUARANTINE, _SYNC_OWN, f"{_MOVE}{_SYNC_OWN}")),
    ),
    _drop("set aside: the new directory not flushed", _QUARANTINE, _SYNC_DAMAGED),
    _drop("set aside: root not flushed", _QUARANTINE, _SYNC_ROOT),
    Mutant(
        "set aside: root flushed first",
        ((_QUARANTINE, _SYNC_DAMAGED, ""), (_QUARANTINE, _SYNC_ROOT, f"{_SYNC_ROOT}{_SYNC_DAMAGED}")),
    ),
)

EQUIVALENT_WRITER_MUTANTS = (
    _change(
        "commit: header not flushed by itself",
        _COMMIT,
        "header_file, durable=True",
        "header_file",
        flushes=("each",),
        equivalent="in this mode every file is flushed when it is written, asked or not",
    ),
    Mutant(
        "commit: header written before the data is flushed",
        ((_COMMIT, _WAIT, ""), (_COMMIT, _SYNC_STEP, f"{_WAIT}{_SYNC_STEP}")),
        equivalent="nobody sees the header before the rename; the order matters for stores without one, and "
        "because the fsync of the header reports journal errors that syncfs lost",
    ),
    Mutant(
        "commit: renamed before the step directory is flushed",
        (
            (_COMMIT, _SYNC_STEP, ""),
            (
                _COMMIT,
                _SYNC_RENAMES,
                f'                store.sync_directory("step-{{:08}}".format(self._step))\n{_SYNC_RENAMES}',
            ),
        ),
        equivalent="a cut between the two leaves at worst a step without a header, not acknowledged, which is "
        "cleaned away; but readers could see one",
    ),
    Mutant(
        "commit: partial directory flushed before the root",
        ((_COMMIT, _SYNC_PARTIAL, ""), (_COMMIT, _SYNC_ROOT, f"{_SYNC_PARTIAL}{_SYNC_ROOT}")),
        equivalent="both are flushed before the acknowledgement; a cut between them can lose a step that was "
        "complete, but not yet acknowledged",
    ),
    _change(
        "tree: its top not flushed",
        _DURABILITY,
        _SYNC_SELF,
        "            self._sync_tree(child)\n        if path != self._path:\n            sync_directory_path(path)\n",
        flushes=("each",),
        equivalent="the commit flushes the same directory again when the header is in it; the barrier does it "
        "because its contract says so",
    ),
    Mutant(
        "tree: from the top down",
        (
            (_DURABILITY, _SYNC_SELF, "            self._sync_tree(child)\n"),
            (_DURABILITY, _BELOW, f"        sync_directory_path(path)\n{_BELOW}"),
        ),
        flushes=("each",),
        equivalent="all of it is flushed before anything is visible; bottom up is a habit, not a need",
    ),
)
