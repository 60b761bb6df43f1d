"""A request in flight ends once, in whatever order things happen, and the backend is told to cancel when it must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from unittest.mock import Mock

import pytest
from fakes.api_fakes import done
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.messages import STREAMING, TYPE_NAMES, Accepted, Error, Message, Token
from shoal.daemon.server.in_flight import NEXT, Flight, FlightState, Peer

DEADLINE_S = 5.0
ACCEPTED = Accepted(model="m", prompt_tokens=1)
TOKEN = Token(text="a", ids=[1])
CANCELLED = Error(code="cancelled", message="cancelled before it began")
FAILED = Error(code="shutting_down", message="the daemon is stopping")


@dataclass
class Course:
    """A flight, the messages taken from it, and how often its backend was told to cancel."""

    kind: str = "generate"
    sent: list[Message] = field(default_factory=list)
    noted: int = 0
    cancels: int = 0

    def __post_init__(self) -> None:
        self.flight = Flight(Peer(Mock(), b"c", "c"), b"1", self.kind, 0.0, self._ready)
        self.flight.deadline_s = DEADLINE_S

    def _ready(self, flight: Flight) -> None:
        self.noted += 1

    def _told_to_cancel(self) -> None:
        self.cancels += 1

    def do(self, event: str) -> None:
        flight = self.flight
        match event:
            case "accepted":
                flight.emit(ACCEPTED)
            case "token":
                flight.emit(TOKEN)
            case "done":
                flight.emit(done())
            case "refused":
                flight.emit(Error(code="busy", message="full"))
            case "attach":
                flight.attach(self._told_to_cancel)
            case "cancel":
                flight.cancel()
            case "early":
                flight.expire(DEADLINE_S - 1)
            case "expire":
                flight.expire(DEADLINE_S)
            case "fail":
                flight.fail(FAILED)
            case "abandon":
                flight.abandon()
            case "take":
                flight.take()
                self.sent += flight.outgoing
                flight.outgoing.clear()

    def run(self, events: list[str]) -> Course:
        for event in events:
            self.do(event)
        return self


EVENTS = st.sampled_from(
    ["accepted", "token", "done", "refused", "cancel", "early", "expire", "fail", "abandon", "take", "take"]
)


@st.composite
def courses(draw: st.DrawFn) -> list[str]:
    """Any events in any order, with at most one `attach`."""
    events = draw(st.lists(EVENTS, max_size=12))
    if draw(st.booleans()):
        events.insert(draw(st.integers(0, len(events))), "attach")
    return events


def position(events: list[str], names: set[str]) -> int:
    """The index of the first of these events; the number of events if there is none."""
    return next((index for index, event in enumerate(events) if event in names), len(events))


@given(courses(), st.sampled_from(["generate", "chat", "load"]))
def test_any_course_ends_once_and_cancels_its_backend_when_that_is_due(events: list[str], kind: str) -> None:
    course = Course(kind).run([*events, "take"])
    kinds = [TYPE_NAMES[type(message)] for message in course.sent]
    assert [name not in STREAMING for name in kinds].count(True) <= 1, "two terminal messages"
    assert all(name in STREAMING for name in kinds[:-1]), "something after the terminal one"

    # The backend is told to cancel, unless it ended the request before that was dropped, or before `attach`.
    begun = 0 if kind == "load" else position(events, {"accepted", "attach"})
    ended = position(events, {"done", "refused"})
    cancelled, attached = position(events, {"cancel"}), position(events, {"attach"})
    dropped = position(events, {"fail", "abandon"})
    for early in (cancelled, position(events, {"expire"})):
        if early < begun:  # the backend has not accepted it yet, so it is ended here
            dropped = min(dropped, early)
    is_dropped = dropped < min(ended, len(events))
    is_told = cancelled < ended and attached < ended
    assert course.cancels == ("attach" in events and (is_dropped or is_told))
    assert course.flight.cancelled == (is_dropped or (cancelled < len(events) == ended))

    # When it has ended there is a terminal reply, unless the client has gone.
    over = is_dropped or ended < len(events)
    assert "abandon" in events or over == bool(kinds and kinds[-1] not in STREAMING)


@given(courses())
def test_whoever_sends_replies_is_told_of_them_once_until_they_are_taken(events: list[str]) -> None:
    course = Course()
    waiting = False
    for event in events:
        before = course.noted
        course.do(event)
        assert course.noted - before <= 1
        assert not (waiting and course.noted > before), "told again before it took what there was"
        waiting = (waiting or course.noted > before) and event != "take"
        holds = bool(course.flight._accepted or course.flight._tokens or course.flight._terminal)
        assert waiting or not holds, "a reply that nobody knows of"
        assert (course.flight.held_bytes > 0) == bool(course.flight._tokens)


def test_nothing_follows_an_end_and_every_state_is_reached() -> None:
    ends = {state for state, after in NEXT.items() if not after}
    assert ends == {FlightState.ENDED, FlightState.DROPPED}
    reached = {FlightState.WAITING}
    for _ in NEXT:
        reached |= {after for state in reached for after in NEXT[state]}
    assert reached == set(FlightState)


@pytest.mark.parametrize(
    ("events", "reply", "cancels"),
    [
        (["cancel", "take", "attach", "done"], [CANCELLED], 1),
        (["accepted", "cancel", "attach", "cancel", "done", "take"], [ACCEPTED, done()], 1),
        (["attach", "accepted", "token", "fail", "done", "take"], [ACCEPTED, FAILED], 1),
        (["attach", "accepted", "token", "done", "fail", "take"], [ACCEPTED, TOKEN, done()], 0),
        (["attach", "accepted", "done", "cancel", "abandon", "take"], [], 0),
        (["attach", "expire", "done", "take"], [done()], 0),
        (["early", "cancel", "expire", "take"], [CANCELLED], 0),
    ],
)
def test_a_course_in_full(events: list[str], reply: list[Message], cancels: int) -> None:
    course = Course().run(events)
    assert course.sent == reply
    assert course.cancels == cancels


@pytest.mark.parametrize("kind", ["load", "tokenize", "status"])
def test_what_has_no_end_of_its_own_here_is_answered_by_who_has_it(kind: str) -> None:
    course = Course(kind).run(["cancel", "expire", "take"])
    assert course.sent == []
    assert course.flight.cancelled  # the dispatcher looks at this before it begins
    assert course.run(["refused", "take"]).sent == [Error(code="busy", message="full")]


def test_a_cancel_that_fails_leaves_an_ended_request_without_anything() -> None:
    course = Course().run(["accepted", "token"])
    course.flight.attach(Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError):
        course.flight.abandon()
    assert course.run(["done", "take"]).sent == []
    assert course.flight.held_bytes == 0
