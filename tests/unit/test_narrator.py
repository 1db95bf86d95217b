"""The events of one save come in the order of its life, whichever threads they come from."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest

from asyncckpt.checkpointer.narrator import Narrator
from asyncckpt.checkpointer.ticket import SaveFacts
from asyncckpt.errors import StorageError
from asyncckpt.events import CATALOGUE, Event, EventDispatcher
from asyncckpt.future import SavePromise

CALLED = datetime(2026, 1, 1, tzinfo=UTC)


def facts(step: int = 7) -> SaveFacts:
    return SaveFacts(1, step, "regular", "n0nce", "run", CALLED, f"/x/step-{step}", {}, (), {}, {}, 0.0)


def names(events: list[Event]) -> list[str]:
    return [event.name for event in events]


def test_what_happens_during_the_call_is_told_at_its_end_and_knows_how_long_it_blocked() -> None:
    told: list[Event] = []
    narrator, promise = Narrator(EventDispatcher(told.append)), SavePromise(7)
    story = narrator.begin(facts(), promise)
    promise.set_staged(stage_s=0.25, raw_bytes=10)
    narrator.note_staged(promise)
    narrator.note_end(promise, "durable", None)
    assert told == []
    promise.update_stats(blocked_s=0.5)
    narrator.announce(story)
    assert names(told) == ["save.started", "save.staged", "save.durable"]
    assert [event.fields["blocked_s"] for event in told] == [0.5, 0.5, 0.5]
    assert told[0].time == CALLED.timestamp()
    assert told[1].fields["raw_bytes"] == 10
    for event in told:
        assert event.fields["nonce"] == "n0nce"
        assert set(event.fields) == set(CATALOGUE[event.name].fields)
    assert repr(narrator) == "<Narrator of 0 saves>"


def test_staged_is_told_once_and_before_durable_even_if_the_writer_was_quicker() -> None:
    told: list[Event] = []
    narrator, promise = Narrator(EventDispatcher(told.append)), SavePromise(7)
    narrator.announce(narrator.begin(facts(), promise))
    narrator.note_end(promise, "durable", None)
    narrator.note_staged(promise)
    assert names(told) == ["save.started", "save.staged", "save.durable"]


def test_an_event_that_comes_while_another_is_told_is_told_after_it_and_nobody_waits() -> None:
    told: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def slow(event: Event) -> None:
        if event.name == "save.staged":
            inside.set()
            assert leave.wait(60)
        told.append(event.name)

    narrator, promise = Narrator(EventDispatcher(slow)), SavePromise(7)
    narrator.announce(narrator.begin(facts(), promise))
    stager = threading.Thread(target=narrator.note_staged, args=(promise,))
    stager.start()
    assert inside.wait(60)
    narrator.note_end(promise, "durable", None)  # returns although the callback is busy
    assert told == ["save.started"]
    leave.set()
    stager.join(60)
    assert told == ["save.started", "save.staged", "save.durable"]


def test_a_failed_save_names_its_error() -> None:
    told: list[Event] = []
    narrator, promise = Narrator(EventDispatcher(told.append)), SavePromise(7)
    narrator.announce(narrator.begin(facts(), promise))
    narrator.note_end(promise, "failed", StorageError("no space left", errno=28))
    assert names(told) == ["save.started", "save.failed"]
    assert (told[1].fields["error"], told[1].fields["message"]) == ("storage", "no space left")
    assert set(told[1].fields) == set(CATALOGUE["save.failed"].fields)


def test_a_call_that_raised_leaves_nothing_to_tell() -> None:
    told: list[Event] = []
    narrator, promise = Narrator(EventDispatcher(told.append)), SavePromise(7)
    narrator.forget(narrator.begin(facts(), promise))
    narrator.note_staged(promise)
    narrator.note_end(promise, "failed", ValueError())
    assert told == []
    assert repr(narrator) == "<Narrator of 0 saves>"


def test_an_interrupt_out_of_a_callback_does_not_silence_the_save() -> None:
    told: list[str] = []

    def interrupt(event: Event) -> None:
        told.append(event.name)
        if event.name == "save.started":
            raise KeyboardInterrupt

    narrator, promise = Narrator(EventDispatcher(interrupt)), SavePromise(7)
    story = narrator.begin(facts(), promise)
    with pytest.raises(KeyboardInterrupt):
        narrator.announce(story)
    narrator.note_end(promise, "durable", None)
    assert told == ["save.started", "save.staged", "save.durable"]
