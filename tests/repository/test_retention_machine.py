"""Any sequence of saves, failures, damage, deletions, restarts and prunings that die: what matters stays.

`test_retention.py` tests single prunings at every call; here hypothesis looks for a history. Each property is
then shown to catch a bug that is planted in the package. (That the header goes first is shown there: a deletion
that dies halfway may have removed it by luck.)
"""

from __future__ import annotations

import inspect
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from asyncckpt.format.tree import encode_value
from asyncckpt.policies import Best, Keep
from asyncckpt.policies import keep as keep_module
from asyncckpt.repository import Catalog, CommittedStep, clean_partials, prepare_root, retention
from asyncckpt.stores import LocalStore
from asyncckpt.testing import Fault, FaultStore, SimulatedCrash
from asyncckpt.writer.pruning import Pruner
from tests.repository.test_retention import FILES, NOW, PARTIAL, leftovers, offered, write_step

SETTINGS = settings(
    stateful_step_count=8,
    report_multiple_bugs=False,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)

losses = st.sampled_from([None, math.nan, math.nan, math.inf, -math.inf, 0.0, 0.0, 1.0, 1.0, 2.0])
keeps = st.builds(
    Keep,
    last=st.sampled_from([1, 1, 2]),
    every_steps=st.sampled_from([None, None, None, 10]),
    best=st.sampled_from([None, Best("loss")])
    | st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 2)),
    tags=st.sampled_from([None, None, ("a",)]),
    kinds=st.sampled_from([(), ("manual", "final")]),
)


@dataclass(frozen=True)
class Known:
    """What the test knows about a committed step."""

    loss: float | None
    tags: tuple[str, ...]
    kind: str


saves = st.tuples(
    st.builds(
        Known,
        losses,
        st.sampled_from([(), (), (), (), ("a",), ("b",)]),
        st.sampled_from(["regular"] * 8 + ["best", "final", "manual", "emergency"]),
    ),
    st.integers(0, 10**6),
)


class RetentionMachine(RuleBasedStateMachine):
    """One root, its writer's pruner, and what must be there."""

    @initialize(keep=keeps)
    def open(self, keep: Keep) -> None:
        self.directory = tempfile.mkdtemp()
        self.root = Path(prepare_root(Path(self.directory) / "root").root)
        self.keep = keep
        self.present: dict[int, Known] = {}
        self.damaged: set[int] = set()
        self.restart()

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)

    @rule(saves=st.dictionaries(st.integers(0, 30), saves, min_size=3, max_size=8))
    def save(self, saves: dict[int, tuple[Known, int]]) -> None:
        for step, (known, age_s) in saves.items():
            if step in self.present or step in self.damaged:
                continue
            metrics = {} if known.loss is None else {"loss": known.loss}
            write_step(
                self.root,
                step,
                kind=known.kind,
                tags=list(known.tags),
                metrics=encode_value(metrics, "", lambda value, path: None),
                created=(NOW - timedelta(seconds=age_s)).isoformat(),
            )
            self.pruner.forget(step)
            self.present[step] = known

    @rule(step=st.integers(0, 30), what=st.sampled_from(["fail to save", "damage", "delete", "restart"]))
    def go_wrong(self, step: int, what: str) -> None:
        home = self.root / f"step-{step:08}"
        if what == "restart":
            self.restart()
        elif what == "fail to save" and not home.exists():
            write_step(self.root, step)
            home.rename(self.root / PARTIAL / f"{home.name}-nonce")
            self.restart()
        elif what == "damage" and step in self.present:
            (home / "zarr.json").write_bytes(b"{")
            del self.present[step]
            self.damaged.add(step)
            self.restart()  # the pruner trusts what it read once: damage while it runs shows at the next restart
        elif what == "delete" and step in self.present:
            CommittedStep(LocalStore(self.root), step).delete()
            del self.present[step]

    def restart(self) -> None:
        clean_partials(LocalStore(self.root))
        assert leftovers(self.root) == []
        self.pruner = Pruner(LocalStore(self.root), self.keep)

    @rule()
    def prune(self) -> None:
        removed, failure = self.pruner.run(NOW)
        assert failure is None
        left = offered(self.root)
        assert {decision.step for decision in removed} == self.present.keys() - left
        self._require_protected(left)
        again, _ = Pruner(LocalStore(self.root), self.keep).run(NOW)
        assert again == [], "pruning again removes nothing more"

    @rule(call=st.integers(1, 25), moment=st.sampled_from(["before", "halfway", "after"]))
    def die_while_pruning(self, call: int, moment: Any) -> None:
        store = FaultStore(LocalStore(self.root), [Fault(nth=call, crash=True, moment=moment)])
        try:
            Pruner(store, self.keep).run(NOW)
        except SimulatedCrash:
            pass
        finally:
            store.release()
        self._require_protected(offered(self.root))
        self.restart()

    @invariant()
    def everything_that_was_not_pruned_is_there(self) -> None:
        if hasattr(self, "root"):
            assert offered(self.root) == self.present.keys()
            assert all((self.root / f"step-{step:08}" / key).is_file() for step in self.damaged for key in FILES)

    def _require_protected(self, left: set[int]) -> None:
        assert left <= self.present.keys()
        gone = self.present.keys() - left
        assert not self.present or max(self.present) in left, "the newest was removed"
        for step in gone:
            known = self.present[step]
            assert not (known.tags if self.keep.tags is None else {*known.tags} & {*self.keep.tags}), "a tagged step"
            assert known.kind not in self.keep.kinds, "a step of a kind that is kept"
        if self.keep.best is not None:
            assert best_steps(self.present, self.keep.best) <= left, "the best was removed"
        self.present = {step: known for step, known in self.present.items() if step in left}


def best_steps(present: dict[int, Known], best: Best) -> set[int]:
    """The best ``best.n``: each is beaten by fewer than so many, found without sorting."""
    found = {
        step: known.loss if best.mode == "min" else -known.loss
        for step, known in present.items()
        if known.loss is not None and not math.isnan(known.loss)
    }
    return {
        step
        for step, value in found.items()
        if sum(other < value or (other == value and number < step) for number, other in found.items()) < best.n
    }


def test_no_history_loses_what_matters(full: bool) -> None:
    run_state_machine_as_test(RetentionMachine, settings=settings(SETTINGS, max_examples=2000 if full else 50))


def edited(function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """*function* with a bug: its source with *old* replaced by *new*, in its own module's names."""
    source = inspect.cleandoc("\n" + inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {function.__qualname__}: adapt this bug"
    names = dict(vars(inspect.getmodule(function)))  # type: ignore[arg-type]
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), "<planted bug>", "exec"), names)
    return names[function.__name__]  # type: ignore[no-any-return]


BUGS: dict[str, tuple[ModuleType | type, str, str, str]] = {
    "NaN wins": (keep_module, "_score", "if math.isnan(number):\n        return None",
                 "if math.isnan(number):\n        number = -1e9"),
    "the worst is kept": (keep_module, "_score", 'best.mode == "min"', 'best.mode != "min"'),
    "fewer than n are kept": (retention, "_reasons", "[: keep.best.n]", "[: keep.best.n - 1]"),
    "the last of equal ones is best": (keep_module, "rank_best", "pair[1].step))", "-pair[1].step))"),
    "tags do not protect": (retention, "_reasons", "if protecting:", "if protecting and keep.tags is not None:"),
    "chosen tags do not protect": (retention, "_reasons", "if tag in keep.tags]", "if tag not in keep.tags]"),
    "kinds do not protect": (retention, "_reasons", "if info.kind in keep.kinds:", "if info.kind in keep.kinds[1:]:"),
    "the oldest is taken for the newest": (retention, "plan_retention", "reverse=True", "reverse=False"),
    "the last saved is the newest": (retention, "plan_retention", "key=lambda info: info.step", "key=_created_s"),
    "a wrong step is removed": (retention, "execute_retention", "CommittedStep(store, decision.step)",
                                "CommittedStep(store, max(Catalog(store).steps()))"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, function, old, new = BUGS[name]
    original = getattr(home, function)
    broken = edited(original, old, new)
    broken.__globals__.setdefault("Catalog", Catalog)
    monkeypatch.setattr(home, function, broken)
    for module in [module for key, module in sys.modules.items() if key.startswith("asyncckpt.")]:
        if vars(module).get(function) is original:  # it was imported from where the bug is
            monkeypatch.setattr(module, function, broken)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            RetentionMachine, settings=settings(SETTINGS, max_examples=300, phases=[Phase.generate])
        )
