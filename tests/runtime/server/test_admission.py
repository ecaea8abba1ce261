from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.errors import ConfigError, RequestError
from unipinrec.runtime.server.admission import Admission, Ticket
from unipinrec.runtime.server.bodies import ApiError


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_there_is_room_for_so_many() -> None:
    admission = Admission(3)
    with admission.admit(1.0) as ticket:
        ticket.add(2)
        with pytest.raises(ApiError, match="3 requests are waiting, of at most 3"), admission.admit(1.0):
            pass
        assert (admission.pending, admission.refused) == (3, 1)
    assert (admission.pending, admission.most_pending) == (0, 3)


def test_what_does_not_fit_takes_no_room() -> None:
    admission = Admission(3)
    with pytest.raises(ApiError, match="1 requests are waiting"), admission.admit(1.0) as ticket:
        ticket.add(3)
    assert admission.pending == 0
    with admission.admit(1.0) as ticket:
        ticket.add(2)


def test_nobody_waits_for_what_comes_too_late() -> None:
    admission = Admission(100)
    admission.learn(0.5)
    with admission.admit(10.0) as ticket:
        ticket.add(3)
        with pytest.raises(ApiError, match="4 requests are ahead, which may take 2000 ms") as refused:
            admission.take(1, within_s=1.9)
        assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "2"})
        admission.take(1, within_s=2.1)
    admission.pending = 0
    with admission.admit(0.1):  # nothing is ahead of it
        pass


def test_an_answer_that_may_take_much_longer_is_counted_as_such() -> None:
    admission = Admission(100)
    for seconds in (0.1, 0.3):
        admission.learn(seconds)
    assert (admission.seconds_each, admission.deviation) == pytest.approx((0.2, 0.1))
    with admission.admit(10.0):
        with pytest.raises(ApiError, match="1 requests are ahead, which may take 400 ms"):
            admission.take(1, within_s=0.39)
        admission.take(1, within_s=0.41)


def test_how_long_an_answer_takes_is_shared_by_those_ahead(clock: Clock) -> None:
    admission = Admission(100, clock)
    with admission.admit(9.0) as ticket:
        ticket.add(3)
        with admission.admit(9.0):
            clock.now += 1.0
        assert admission.seconds_each == pytest.approx(0.2)
        clock.now += 1.0
    assert admission.seconds_each == pytest.approx((0.2 + 2.0 / 4) / 2)


def test_what_a_client_takes_to_send_does_not_count(clock: Clock) -> None:
    admission = Admission(100, clock)
    with admission.admit(9.0) as ticket:
        clock.now += 5.0
        ticket.begin()
        clock.now += 0.1
    assert admission.seconds_each == pytest.approx(0.1)


def test_nobody_waits_for_what_a_client_has_not_sent(clock: Clock) -> None:
    admission = Admission(3, clock)
    admission.learn(1.0)
    with admission.admit(9.0, arriving=True) as slow, admission.admit(9.0, arriving=True):
        with admission.admit(0.1, arriving=True) as ticket:  # though two of a second are before it
            ticket.begin()
            clock.now += 0.5
            with pytest.raises(ApiError, match="3 requests are waiting, of at most 3"), admission.admit(9.0):
                pass  # they take room all the same
        assert admission.seconds_each == pytest.approx((1.0 + 0.5) / 2)
        slow.begin()
        with pytest.raises(ApiError, match="1 requests are ahead"), admission.admit(0.1):
            pass
    assert (admission.pending, admission.arriving) == (0, 0)


def test_only_answers_and_deadlines_that_passed_are_learnt_from(clock: Clock) -> None:
    admission = Admission(100, clock)
    with admission.admit(9.0):
        clock.now += 0.1

    def fail(error: Exception, after_s: float) -> None:
        with pytest.raises(type(error)), admission.admit(9.0):  # noqa: PT012 - time passes inside
            clock.now += after_s
            raise error

    fail(RequestError("wrong"), 0.0)
    fail(ApiError(422, "cold_start", ""), 0.0)
    fail(ApiError(504, "deadline_exceeded", ""), 0.001)  # its own deadline was that short
    with admission.admit(9.0, measured=False):
        clock.now += 5.0
    assert admission.seconds_each == pytest.approx(0.1)
    fail(ApiError(504, "deadline_exceeded", ""), 0.5)
    assert admission.seconds_each == pytest.approx(0.3)
    assert admission.pending == 0


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_place_is_held_as_long_as_something_computes(data: st.DataObject) -> None:
    """Requests end or are given up, computations end or go on: no place is freed twice, too early or never."""
    limit = data.draw(st.integers(1, 4))
    admission = Admission(limit)
    held: list[tuple[ExitStack, Ticket, Future[None]]] = []
    going_on: list[Future[None]] = []

    async def scenario() -> None:
        for _ in range(data.draw(st.integers(1, 30))):
            action = data.draw(st.sampled_from(["arrive", "answer", "give up", "compute"]))
            if action == "arrive":
                entered, computation = ExitStack(), Future[None]()
                computation.set_running_or_notify_cancel()
                if len(held) + len(going_on) == limit:
                    with pytest.raises(ApiError, match="are waiting, of at most"):
                        entered.enter_context(admission.admit(9.0))
                else:
                    held.append((entered, entered.enter_context(admission.admit(9.0, arriving=True)), computation))
            elif action == "compute" and going_on:
                going_on.pop().set_result(None)
                await asyncio.sleep(0)
            elif action in {"answer", "give up"} and held:
                entered, ticket, computation = held.pop(data.draw(st.integers(0, len(held) - 1)))
                if action == "answer":
                    computation.set_result(None)
                else:
                    going_on.append(computation)
                ticket.outlast(computation)
                entered.close()
            assert admission.pending == len(held) + len(going_on)
            assert admission.arriving == len(held)
        for entered, _, _ in held:
            entered.close()

    asyncio.run(scenario())
    for computation in going_on:  # when the loop is closed
        computation.set_result(None)


def test_the_means_follow_what_is_measured() -> None:
    admission = Admission(1)
    admission.learn(1.0)
    assert (admission.seconds_each, admission.deviation) == (1.0, 0.0)
    for turn in range(300):
        admission.learn(0.1 if turn % 2 else 0.3)
    assert admission.seconds_each == pytest.approx(0.2, abs=0.01)
    assert admission.deviation == pytest.approx(0.1, abs=0.01)


def test_a_queue_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="must hold at least 1"):
        Admission(0)
