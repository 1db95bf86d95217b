"""Snapshots of CUDA tensors, on simulated devices: no race in any order of events, no wait of the host, exact bytes."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_sim import Race, SimEvent, SimTensor, Simulation, Site
from hypothesis import given
from hypothesis import strategies as st
from staging_sim import Run, Save, SimLeaf, with_small_tensors

from asyncckpt.errors import CheckpointError, GraphCaptureError, SnapshotMutatedError, StagingError, StagingMemoryError
from asyncckpt.memory import Arena
from asyncckpt.options import SnapshotMode
from asyncckpt.staging.guard import GuardedCopies, StepGuard, hookable
from asyncckpt.staging.pinning import HostPinner

AMPLE = 10**9
SEED = 3


@pytest.fixture(autouse=True)
def small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    with_small_tensors(monkeypatch)


MODES: list[tuple[SnapshotMode, int]] = [
    ("overlap", 0),  # all straight to the host
    ("overlap", AMPLE),  # small tensors and buffers are gathered first
    ("device", AMPLE),  # all is gathered first
    ("device", 0),
    ("auto", AMPLE),
    ("auto", 0),
]


# -- scripts: what training and saving do, in the order of the host ---------------------------------------------------


def train_on_the_same_stream(run: Run) -> None:
    for _ in range(3):
        run.forward()
        run.step()
        save = run.save()
        run.forward()
        run.step()
        run.complete(save)


def save_on_a_side_stream(run: Run) -> None:
    """Training only waits for the side stream when it changes what no optimizer owns."""
    simulation = run.simulation
    run.forward()
    run.step()
    main = list(simulation.current)
    for index in run.devices:
        side = simulation.stream(index)
        side.after(main[index])
        simulation.current[index] = side
    save = run.save()
    sides, simulation.current = simulation.current, main
    run.step()
    for index in run.devices:
        main[index].after(sides[index])
    run.forward()
    run.complete(save)


def step_on_another_stream(run: Run) -> None:
    simulation = run.simulation
    run.forward()
    run.step()
    save = run.save()
    main = list(simulation.current)
    for index in run.devices:
        stepping = simulation.stream(index)
        stepping.after(main[index])
        simulation.current[index] = stepping
    run.step()
    run.forward()
    run.complete(save)
    for index in run.devices:
        main[index].after(simulation.current[index])
    simulation.current = main
    run.step()
    run.complete(run.save())


def free_everything_after_save(run: Run) -> None:
    """FSDP frees the memory of tensors that are still referred to."""
    run.prepare()
    run.step()
    save = run.save()
    for leaf in run.leaves:
        run.simulation.free_memory(leaf.tensor)
    run.complete(save)


SCRIPTS: list[Callable[[Run], None]] = [
    train_on_the_same_stream,
    save_on_a_side_stream,
    step_on_another_stream,
    free_everything_after_save,
]


def play(
    script: Callable[[Run], None], mode: tuple[SnapshotMode, int], leave_out: Site | None = None, seed: int = SEED
) -> Simulation:
    simulation = Simulation(seed, leave_out, num_devices=2, free=mode[1])
    run = Run(simulation, mode[0], num_optimizers=2, from_others=script is free_everything_after_save)
    # What comes from other streams has been waited for.
    for index in run.devices:
        for home in {leaf.tensor.home for leaf in run.leaves if leaf.tensor.device.index == index}:
            if home is not simulation.current[index]:
                simulation.current[index].after(home)
    script(run)
    run.close()
    return simulation


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_snapshot_is_exact_and_the_host_never_waits(
    script: Callable[[Run], None], mode: tuple[SnapshotMode, int]
) -> None:
    for seed in range(5):
        play(script, mode, seed=seed)


def sites() -> list[Site]:
    """Every wait, record, record_stream and synchronisation in the source of the package."""
    with pytest.MonkeyPatch.context() as patch:
        with_small_tensors(patch)
        return sorted({site for script in SCRIPTS for mode in MODES for site in play(script, mode).sites})


def test_all_kinds_of_calls_are_known() -> None:
    kinds = [site[0] for site in sites()]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "record": 3,  # loose, guard, done
        "record_stream": 3,  # gathered, loose, owned
        "synchronize": 1,
        "wait_event": 2,  # the caller's stream, the optimizer's
        "wait_stream": 1,
    }


@pytest.mark.parametrize("site", sites(), ids=lambda site: " ".join(site))
def test_leaving_any_ordering_call_out_is_a_race(site: Site) -> None:
    found = []
    for script in SCRIPTS:
        for mode in MODES:
            try:
                play(script, mode, leave_out=site)
            except Race as race:
                found.append(str(race))
    assert found, f"nothing needs {site}"


@pytest.mark.parametrize("method", [(GuardedCopies, "wait_before"), (StepGuard, "_before_step"), (StepGuard, "watch")])
def test_without_the_hook_there_is_a_race(monkeypatch: pytest.MonkeyPatch, method: tuple[type, str]) -> None:
    monkeypatch.setattr(*method, lambda *args: None)
    found = 0
    for script in SCRIPTS:
        for mode in MODES:
            try:
                play(script, mode)
            except (Race, SnapshotMutatedError):
                found += 1
    assert found


def test_a_state_larger_than_the_memory_passes_through_in_parts() -> None:
    run = Run(Simulation(free=AMPLE), memory_limit=300)
    run.step()
    plan = run.stager.plan(run.leaves)
    assert len(plan.segments) > 1
    (slot,) = run.pool.slots
    run.stager.reserve(slot, plan)
    for number, segment in enumerate(plan.segments):
        arena = slot.arenas[number % 2]
        run.stager.copy(run.leaves, segment, slot, arena)
        for leaf, offset in zip(run.leaves[segment.start : segment.stop], segment.offsets, strict=True):
            expected = leaf.tensor.expected.numpy().tobytes()
            assert run.simulation.read_arena(arena, offset, len(expected)) == expected
    assert run.simulation.num_host_waits == len(plan.segments)
    run.step()
    run.close()


def test_tensors_on_the_host_are_copied_at_once_beside_those_on_devices(run: Run) -> None:
    here = torch.arange(5)
    leaves = [*run.leaves, SimLeaf("here", here, "int64")]
    plan = run.stager.plan(leaves)
    (slot,) = run.pool.slots
    run.stager.reserve(slot, plan)
    copies = run.stager.begin(leaves, plan.segments[0], slot, run.optimizers)
    here.zero_()
    copies.wait()
    offset = plan.segments[0].offsets[-1]
    assert torch.frombuffer(slot.arenas[0].buffer, dtype=torch.int64, count=5, offset=offset).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


# -- any legal schedule ------------------------------------------------------------------------------------------------

ACTIONS = st.lists(
    st.sampled_from(["forward", "step", "save", "complete", "switch", "snap", "execute", "free"]), max_size=25
)


class Loop:
    """A training loop that is correct by itself, on as many streams as it likes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.pending: list[Save] = []

    def switch(self) -> None:
        """Training goes on on other streams, which wait for those before."""
        simulation = self.run.simulation
        for index in self.run.devices:
            new = simulation.stream(index)
            new.after(simulation.current[index])
            simulation.current[index] = new

    def save(self) -> None:
        if self.run.pool.num_free:
            self.pending.append(self.run.save())

    def snap(self) -> None:
        """Save on streams of its own; training steps without waiting for them, and waits before anything else."""
        before = list(self.run.simulation.current)
        self.switch()
        self.save()
        sides, self.run.simulation.current = self.run.simulation.current, before
        self.run.step()
        for own, side in zip(before, sides, strict=True):
            own.after(side)

    def complete(self) -> None:
        if self.pending:
            self.run.complete(self.pending.pop(0))

    def free(self) -> None:
        """A buffer is replaced by another, of the same kind."""
        old = self.run.loose.pop(0)
        # Training changed it on its current stream, and must tell the allocator so.
        old.recorded.add(self.run.simulation.current[old.device.index])
        position = next(number for number, leaf in enumerate(self.run.leaves) if leaf.tensor is old)
        new = SimTensor(self.run.simulation, torch.zeros(old.nbytes, dtype=torch.uint8), old.device.index)
        self.run.leaves = list(self.run.leaves)
        self.run.leaves[position] = SimLeaf(self.run.leaves[position].key, new)
        self.run.loose.append(new)
        self.run.simulation.free_memory(old)

    def do(self, action: str) -> None:
        match action:
            case "forward" | "step":
                getattr(self.run, action)()
            case "execute":
                self.run.simulation.run(self.run.simulation.random.randrange(20))
            case _:
                getattr(self, action)()


@given(
    actions=ACTIONS,
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
)
def test_every_legal_schedule_gives_exact_snapshots(
    actions: list[str], mode: tuple[SnapshotMode, int], seed: int, shape: tuple[int, int, int]
) -> None:
    num_devices, num_optimizers, slots = shape
    simulation = Simulation(seed, num_devices=num_devices, free=mode[1])
    loop = Loop(Run(simulation, mode[0], slots, num_optimizers))
    for action in actions:
        loop.do(action)
    while loop.pending:
        loop.complete()
    loop.run.close()


# -- what must not be found wrong, and what must -----------------------------------------------------------------------


@pytest.fixture
def run() -> Iterator[Run]:
    """Everything goes straight to the host, and the optimizer has been seen stepping."""
    run = Run(Simulation())
    run.step()
    run.complete(run.save())
    run.step()
    yield run
    run.close()


def test_the_caller_waits_for_what_no_optimizer_owns_and_only_the_optimizer_for_the_rest(run: Run) -> None:
    (caller,) = run.simulation.current
    before = dict(run.simulation.clock(caller.name))
    save = run.save()
    waits = [event for operation in run.simulation.queues[caller.name] for event in operation.after]
    assert len(waits) == 1
    assert before != run.simulation.clock(caller.name)
    run.step()
    waits = [event for operation in run.simulation.queues[caller.name] for event in operation.after]
    assert len(waits) == 2
    run.complete(save)
    run.step()
    assert not [event for operation in run.simulation.queues[caller.name] for event in operation.after]


def test_a_change_that_bypasses_the_optimizer_fails_the_snapshot(run: Run) -> None:
    save = run.save()
    run.owned[2]._version += 1
    with pytest.raises(SnapshotMutatedError, match=r"moment0\.0\.10|weight0\.0\.10"):
        run.complete(save)
    assert run.pool.num_free == 1


def test_a_change_before_the_step_is_noticed_although_the_step_changes_it_again(run: Run) -> None:
    save = run.save()
    run.owned[2]._version += 1
    run.step()
    with pytest.raises(SnapshotMutatedError, match=r"before the optimizer's next step") as caught:
        run.complete(save)
    assert caught.value.fields["key"] == "weight0.0.10"


def test_a_change_by_another_thread_inside_save_fails_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    download = run.simulation.ops.download

    def download_and_train(*args: object) -> None:
        download(*args)  # type: ignore[arg-type]
        run.loose[0]._version += 1

    monkeypatch.setattr(run.simulation.ops, "download", download_and_train)
    with pytest.raises(SnapshotMutatedError, match=r"buffer0\.8"):
        run.save()


@pytest.mark.parametrize("free", [0, AMPLE])
def test_steps_before_anybody_notices_the_end_are_no_mutation(free: int) -> None:
    run = Run(Simulation(free=free), num_optimizers=2)
    run.step()
    for _ in range(3):
        save = run.save()
        run.simulation.finish()
        for _ in range(2):
            run.step()
            run.forward()
        run.complete(save)
    run.close()


def test_tensors_shared_by_two_optimizers_wait_for_both(run: Run) -> None:
    twin = type(run.optimizers[0])(run.simulation, dict(run.optimizers[0]._tensors))
    twin.state = run.optimizers[0].state
    run.optimizers.append(twin)
    for step in (run.step, run.optimizers[0].step, twin.step):
        run.complete(run.save())
        run.step()
        save = run.save()
        step()
        run.complete(save)
        run.step()


def test_an_optimizer_that_was_not_seen_makes_training_wait_at_once() -> None:
    run = Run(Simulation())
    run.step()  # nobody looked
    save = run.save()
    for tensor in run.owned:
        run.simulation.write(tensor, "a replayed graph")
    run.complete(save)
    save = run.save()  # no step since
    for tensor in run.owned:
        run.simulation.write(tensor, "a replayed graph")
    run.complete(save)
    run.close()


def test_an_optimizer_captured_in_a_graph_makes_training_wait_at_once(run: Run) -> None:
    run.simulation.is_capturing = True
    run.step()
    run.simulation.is_capturing = False
    run.step()  # outside of the graph, for once
    save = run.save()
    for tensor in run.owned:
        run.simulation.write(tensor, "a replayed graph")
    run.complete(save)


def test_a_capture_while_a_snapshot_is_copied_fails_it(run: Run) -> None:
    save = run.save()
    run.simulation.is_capturing = True
    run.step()
    run.simulation.is_capturing = False
    with pytest.raises(SnapshotMutatedError, match="captured in a CUDA graph"):
        run.complete(save)


def test_saving_during_a_capture_is_refused(run: Run) -> None:
    run.simulation.is_capturing = True
    with pytest.raises(GraphCaptureError, match="between replays"):
        run.stager.require_no_capture()
    run.simulation.is_capturing = False
    run.stager.require_no_capture()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "free", "expected"),
    [
        ("device", AMPLE, 2 * (8 + 40) + 8 + 40),
        ("auto", AMPLE, 2 * (8 + 40) + 8 + 40),
        ("overlap", AMPLE, 2 * 8 + 8 + 40),
        ("blocking", AMPLE, 3 * 8),
        ("device", 0, 0),
        ("auto", 0, 0),
    ],
)
def test_what_is_gathered_on_the_device(mode: SnapshotMode, free: int, expected: int) -> None:
    run = Run(Simulation(free=free), mode)
    run.step()
    run.stager._guard.watch(run.optimizers)
    run.step()
    if mode == "blocking":
        plan = run.stager.plan(run.leaves)
        slot = run.pool.slots[0]
        run.stager.reserve(slot, plan)
        run.stager.begin(run.leaves, plan.segments[0], slot, run.optimizers).wait()
        assert run.simulation.num_host_waits == 1
    else:
        run.complete(run.save())
    assert sum(buffer.numel() for buffer in run.simulation.ops.buffers) >= expected
    assert sum(buffer.numel() for buffer in run.simulation.ops.buffers) < expected + 64 * len(run.leaves) + 1
    assert bool(run.simulation.ops.buffers) == bool(expected)
    run.close()


def test_buffers_are_reused_and_freed_by_close() -> None:
    run = Run(Simulation(free=AMPLE), "device")
    for _ in range(3):
        run.step()
        run.complete(run.save())
        gc.collect()
        assert len(run.simulation.ops.buffers) == 1
    run.close()
    gc.collect()
    assert not run.simulation.ops.buffers


def test_a_device_without_memory_is_no_error() -> None:
    simulation = Simulation(free=AMPLE)
    run = Run(simulation, "device")
    run.step()
    simulation.refuses_memory = True
    run.complete(run.save())
    run.step()
    simulation.refuses_memory = False
    run.complete(run.save())
    assert len(simulation.ops.buffers) == 1
    simulation.free = 0
    simulation.peak = 2 * AMPLE  # another process took memory that training needs: ours is given back
    simulation.runtime.memory_reserved = lambda index: AMPLE  # type: ignore[method-assign]
    run.step()
    run.complete(run.save())
    gc.collect()
    assert not simulation.ops.buffers
    run.close()


def test_no_reference_to_the_state_stays_behind(run: Run) -> None:
    save = run.save()
    tensor = weakref.ref(run.loose.pop(0))
    run.leaves, leaves = [], run.leaves
    save.expected = []
    del leaves
    gc.collect()
    assert tensor() is not None, "freed while it is copied"
    save.copies.wait()
    run.pool.release(save.slot)
    gc.collect()
    assert tensor() is None


def test_unpinned_memory_is_still_exact() -> None:
    run = Run(Simulation(free=AMPLE), "overlap")
    run.simulation.runtime.register_code = 2
    run.step()
    run.complete(run.save())
    run.close()


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_device_error_while_copying_is_on_the_snapshot(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save = run.save()
    synchronize = SimEvent.synchronize

    def fail(event: SimEvent) -> None:
        synchronize(event)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(SimEvent, "synchronize", fail)
    with pytest.raises(StagingError, match="illegal memory access") as caught:
        run.complete(save)
    assert type(caught.value) is StagingError
    monkeypatch.undo()
    with_small_tensors(monkeypatch)
    run.simulation.learn_from("completing")
    run.step()
    run.complete(run.save())


@pytest.mark.parametrize(
    ("error", "expected"),
    [(torch.OutOfMemoryError("none left"), StagingMemoryError), (RuntimeError("CUDA error: launch"), StagingError)],
)
def test_an_error_inside_save_leaves_nothing_under_way(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[CheckpointError]
) -> None:
    download = run.simulation.ops.download
    calls = []

    def fail(*args: object) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise error
        download(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(run.simulation.ops, "download", fail)
    with pytest.raises(expected) as caught:
        run.save()
    assert type(caught.value) is expected
    assert not any(run.simulation.queues.values())
    assert not run.stager._guard._in_flight


# -- hooks -------------------------------------------------------------------------------------------------------------


def parameters() -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    for parameter in made:
        parameter.grad = torch.ones(4)
    return made


class Recorder(Simulation):
    """A machine whose `StepGuard` tells which optimizers it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.guard = StepGuard(self.runtime)

    def saw(self, optimizer: torch.optim.Optimizer) -> bool:
        return bool(self.guard.take_ownership([optimizer]).owners)


def closure() -> float:
    return 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True),
        lambda params: torch.optim.Adam(params, fused=True),
        lambda params: torch.optim.AdamW(params, foreach=True),
        lambda params: torch.optim.LBFGS(params, max_iter=3),
        lambda params: torch.optim.Adagrad(params),
    ],
)
@pytest.mark.parametrize("through", ["step", "scaler", "scheduler", "compiled"])
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, inside torch.compile
def test_every_way_to_step_runs_the_hook_before_anything_changes(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], through: str
) -> None:
    params = parameters()
    optimizer = make(params)
    recorder = Recorder()
    recorder.guard.watch([optimizer])
    versions = []
    optimizer.register_step_pre_hook(lambda *args: versions.append([parameter._version for parameter in params]))
    before = [parameter._version for parameter in params]
    if through == "step":
        optimizer.step(closure)
    elif through == "scaler":
        if isinstance(optimizer, torch.optim.LBFGS):
            pytest.skip("torch refuses closures with a scaler")
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(1))
        scaler.step(optimizer)
    elif through == "scheduler":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        optimizer.step(closure)
    else:
        if optimizer.defaults.get("foreach"):
            pytest.skip("torch does not compile every foreach optimizer on the CPU")
        torch.compile(optimizer.step, backend="eager")(closure)
    assert versions == [before]
    assert recorder.saw(optimizer)
    recorder.guard.close()


def test_parameters_and_moments_are_owned_and_nothing_else() -> None:
    params = parameters()
    optimizer = torch.optim.LBFGS(params, lr=1, history_size=3)
    recorder = Recorder()
    recorder.guard.watch([optimizer])

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.stack([(parameter**4).sum() for parameter in params]).sum()
        value.backward()
        return value

    optimizer.step(loss)
    owned = recorder.guard.take_ownership([optimizer]).owners
    state = optimizer.state[params[0]]
    for tensor in [*params, *state["old_dirs"], state["d"]]:
        assert (tensor.data_ptr(), tensor.nbytes) in owned
    assert (params[0].grad.data_ptr(), params[0].grad.nbytes) not in owned  # type: ignore[union-attr]


def test_averaged_models_are_not_owned() -> None:
    model = torch.nn.Linear(3, 3)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder()
    recorder.guard.watch([optimizer])
    optimizer.step()
    owned = recorder.guard.take_ownership([optimizer]).owners
    assert {(parameter.data_ptr(), parameter.nbytes) for parameter in model.parameters()} == set(owned)
    assert not {(tensor.data_ptr(), tensor.nbytes) for tensor in average.parameters()} & set(owned)


def test_a_buffer_beside_a_parameter_in_one_storage_is_not_owned() -> None:
    flat = torch.zeros(8)
    parameter = torch.nn.Parameter(flat[:4])
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    recorder = Recorder()
    recorder.guard.watch([optimizer])
    optimizer.step()
    owned = recorder.guard.take_ownership([optimizer]).owners
    assert (parameter.data_ptr(), parameter.nbytes) in owned
    assert (flat[4:].data_ptr(), flat[4:].nbytes) not in owned


def test_hooks_do_not_accumulate_and_go_with_the_guard() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    recorder = Recorder()
    for _ in range(5):
        recorder.guard.take_ownership([optimizer])
        optimizer.step()
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    optimizer._optimizer_step_pre_hooks.clear()  # somebody else tidied up
    recorder.guard.watch([optimizer])
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    recorder.guard.close()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_of_an_optimizer_have_no_hook(clone: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    guard = StepGuard(Simulation().runtime)
    guard.watch([optimizer])
    twin = clone(optimizer)
    assert not twin._optimizer_step_pre_hooks
    twin.step()


def test_the_guard_does_not_keep_optimizers() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    guard = StepGuard(Simulation().runtime)
    guard.watch([optimizer])
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    guard.close()


def test_a_wrapped_optimizer_is_hooked_where_it_steps() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As accelerate's: it is one, but was never initialised as one."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    inner = torch.optim.SGD(parameters(), lr=0.1)
    assert hookable(Wrapper(inner)) is inner
    assert hookable(Wrapper(None)) is None  # type: ignore[arg-type]
    assert hookable(inner) is inner


# -- pinning -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(4096, shared=False)
    yield arena
    arena.close()


def test_an_arena_is_pinned_once_for_all_devices_and_unpinned(arena: Arena) -> None:
    runtime = Simulation().runtime
    pinner = HostPinner(runtime)
    pinner.start(arena, 0)
    pinner.start(arena, 1)
    assert pinner.wait(arena)
    assert list(runtime.registered.values()) == [1]
    pinner.unpin(arena)
    pinner.unpin(arena)
    assert not runtime.registered


@pytest.mark.parametrize("refusal", [2, RuntimeError("CUDA error: operation not permitted")])
def test_refused_pinning_warns_once_and_is_not_tried_again(
    caplog: pytest.LogCaptureFixture, refusal: int | RuntimeError
) -> None:
    runtime = Simulation().runtime
    calls = []

    def refuse(address: int, num_bytes: int, flags: int) -> int:
        calls.append(address)
        if isinstance(refusal, RuntimeError):
            raise refusal
        return refusal

    runtime.cudaHostRegister = refuse  # type: ignore[method-assign]
    pinner = HostPinner(runtime)
    arenas = [Arena.create(4096, shared=False) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for arena in arenas:
            pinner.start(arena, 0)
            assert not pinner.wait(arena)
            pinner.unpin(arena)
            arena.close()
    assert len(calls) == 1
    assert len(caplog.records) == 1
    assert "memlock" in caplog.text


def test_closing_unpins_before_it_unmaps(run: Run) -> None:
    assert len(run.simulation.runtime.registered) == 1
    (slot,) = run.pool.slots
    (arena,) = slot.arenas
    unregister = run.simulation.runtime.cudaHostUnregister
    mapped = []

    def look(address: int) -> int:
        mapped.append(len(arena.buffer))
        return unregister(address)

    run.simulation.runtime.cudaHostUnregister = look  # type: ignore[method-assign]
    run.stager.close(run.pool.slots)
    assert mapped
    assert not run.simulation.runtime.registered


def test_preparing_pins_and_watches_ahead_of_the_first_save() -> None:
    run = Run(Simulation())
    (slot,) = run.pool.slots
    run.stager.prepare(slot, run.stager.plan(run.leaves), run.leaves, run.optimizers)
    assert run.stager._pinner.wait(slot.arenas[0])
    assert len(run.optimizers[0]._optimizer_step_pre_hooks) == 1
    run.close()
