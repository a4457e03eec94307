"""The actor kernel: who is answered what, in which order, and that nothing ends an actor but its stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from mcp.actors.actor import Actor, Alarm, Awaited, Envelope, Failure, Unheard, handles
from mcp.model.errors import AdapterError, Refused
from mcp.model.messages import Done, Failed, Probe, TakeInventory, Working


class Greeter(Actor):
    """Answers, fails in every way, and remembers."""

    def __init__(self, limit: int = 1000) -> None:
        super().__init__("greeter", limit=limit)
        self.heard: list[Any] = []
        self.gate = asyncio.Event()

    @handles
    async def on_text(self, message: str) -> str:
        self.heard.append(message)
        return f"hello {message}"

    @handles
    async def on_number(self, message: float | memoryview, envelope: Envelope) -> None:
        await envelope.reply.progress(Working(detail=f"at {message}"))
        await self.gate.wait()
        self.heard.append(message)

    @handles
    async def on_error(self, message: Exception) -> None:
        raise message

    @handles
    async def on_bytes(self, message: bytes, envelope: Envelope) -> object:
        return self.later(envelope, self._slow(message))

    async def _slow(self, message: bytes) -> str:
        await self.gate.wait()
        return message.decode()


class Politer(Greeter):
    """Greets better than its parent, and knows more."""

    @handles
    async def on_text(self, message: str) -> str:
        return f"good morning {message}"

    @handles
    async def on_probe(self, order: Probe) -> str:
        return "here"


class Late(Awaited):
    """The reply of somebody who has given up."""

    is_expired = True


@asynccontextmanager
async def living(actor: Actor) -> AsyncIterator[asyncio.Task[None]]:
    """Run an actor for the length of a block."""
    task = asyncio.create_task(actor.run())
    await asyncio.sleep(0)
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_what_a_handler_returns_is_the_reply() -> None:
    greeter = Greeter()
    async with living(greeter):
        assert await greeter.ask("world") == "hello world"


async def test_a_handler_that_returns_nothing_answers_done() -> None:
    greeter = Greeter()
    greeter.gate.set()
    async with living(greeter):
        assert await greeter.ask(1.0) == Done()


async def test_letters_are_handled_in_order_and_one_at_a_time() -> None:
    greeter = Greeter()
    async with living(greeter):
        asked = [asyncio.ensure_future(greeter.ask(message)) for message in (1.0, "after", 2.5)]
        await asyncio.sleep(0.01)
        assert greeter.heard == []
        greeter.gate.set()
        await asyncio.gather(*asked)
    assert greeter.heard == [1.0, "after", 2.5]


async def test_a_message_without_a_handler_is_refused_by_name() -> None:
    greeter = Greeter()
    async with living(greeter):
        with pytest.raises(Failure, match="greeter does not know TakeInventory") as caught:
            await greeter.ask(TakeInventory())
        assert caught.value.code == "unknown_message"
        assert await greeter.ask("still") == "hello still"


async def test_methods_that_are_not_marked_are_out_of_reach() -> None:
    assert set(Greeter.handlers) == {str, float, memoryview, Exception, bytes}


async def test_a_subclass_has_its_parents_handlers_and_may_replace_them() -> None:
    politer = Politer()
    politer.gate.set()
    async with living(politer):
        assert await politer.ask("you") == "good morning you"
        assert await politer.ask(Probe()) == "here"
        assert await politer.ask(3.0) == Done()
    assert Probe not in Greeter.handlers


async def test_our_errors_become_failures_with_code_reason_and_hint() -> None:
    greeter = Greeter()

    class Wrong(Greeter):
        @handles
        async def on_probe(self, order: Probe) -> None:
            raise AdapterError("cannot pull web:1: 401", code="auth_failed", hint="log in", retryable=True)

    async with living(wrong := Wrong()):
        with pytest.raises(Failure) as caught:
            await wrong.ask(Probe())
    expected = Failed(code="auth_failed", reason="cannot pull web:1: 401", hint="log in", retryable=True)
    assert caught.value.failed == expected
    assert not greeter.is_busy


async def test_a_bug_is_logged_with_its_operation_and_answered_and_the_actor_lives_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Buggy(Greeter):
        @handles
        async def on_probe(self, order: Probe) -> None:
            raise ZeroDivisionError("oh")

    async with living(buggy := Buggy()):
        with caplog.at_level(logging.ERROR), pytest.raises(Failure) as caught:
            await buggy.ask(Probe(), op="4f2c9a1b")
        assert caught.value.code == "internal"
        assert "4f2c9a1b" in caught.value.reason
        assert "grep 4f2c9a1b" in caught.value.hint
        assert await buggy.ask("again") == "hello again"
    (record,) = [r for r in caplog.records if r.exc_info]
    assert "4f2c9a1b" in record.getMessage()


async def test_letters_left_at_stop_time_are_answered() -> None:
    greeter = Greeter()
    async with living(greeter):
        asked = [asyncio.ensure_future(greeter.ask(message)) for message in (1.0, "left", b"beside")]
        await asyncio.sleep(0.01)
        assert greeter.is_busy
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [getattr(answer, "code", None) for answer in answers] == ["stopping"] * 3


async def test_a_letter_to_a_stopped_actor_is_refused_at_once() -> None:
    greeter = Greeter()
    async with living(greeter):
        pass
    with pytest.raises(Refused) as caught:
        await greeter.ask("anybody")
    assert caught.value.code == "stopping"
    assert greeter.tell("anybody") is False


async def test_an_answer_from_beside_the_mailbox_holds_nobody_up() -> None:
    greeter = Greeter()
    async with living(greeter):
        slow = asyncio.ensure_future(greeter.ask(b"slow"))
        assert await greeter.ask("quick") == "hello quick"
        assert not slow.done()
        greeter.gate.set()
        assert await slow == "slow"


async def test_an_answer_from_beside_the_mailbox_is_stopping_when_the_actor_stops() -> None:
    greeter = Greeter()
    async with living(greeter):
        slow = asyncio.ensure_future(greeter.ask(b"slow"))
        await greeter.ask("in between")
    with pytest.raises(Failure) as caught:
        await slow
    assert caught.value.code == "stopping"


async def test_a_full_mailbox_refuses_as_busy() -> None:
    greeter = Greeter(limit=2)
    assert greeter.tell("one")
    assert greeter.tell("two")
    assert greeter.tell("three") is False
    with pytest.raises(Refused) as caught:
        greeter.post(Envelope("four", Unheard()))
    assert caught.value.code == "busy"
    async with living(greeter):
        await asyncio.sleep(0.01)
        assert greeter.heard == ["one", "two"]
        assert await greeter.ask("three") == "hello three"


async def test_what_is_past_its_deadline_is_not_begun() -> None:
    greeter = Greeter()
    reply = Late()
    async with living(greeter):
        greeter.post(Envelope("too late", reply))
        with pytest.raises(Failure) as caught:
            await reply.end()
    assert caught.value.code == "expired"
    assert greeter.heard == []


async def test_progress_reaches_whoever_waits() -> None:
    greeter = Greeter()
    greeter.gate.set()
    said: list[Any] = []
    async with living(greeter):
        await greeter.ask(7.0, on_progress=said.append)
    assert said == [Working(detail="at 7.0")]


async def test_a_task_that_fails_ends_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    greeter = Greeter()

    async def fail() -> None:
        raise KeyError("lost")

    async with living(greeter):
        await greeter.ask("first")
        task = greeter.spawn(fail(), name="errand")
        await asyncio.wait([task])
        assert await greeter.ask("second") == "hello second"
    assert "errand" in caplog.text


async def test_tasks_end_with_their_actor() -> None:
    greeter = Greeter()
    ended = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with living(greeter):
        await greeter.ask("first")
        greeter.spawn(forever(), name="errand")
        await asyncio.sleep(0)
    assert ended.is_set()


async def test_a_task_cancelled_before_its_first_step_leaves_no_complaint(recwarn: pytest.WarningsRecorder) -> None:
    greeter = Greeter()
    async with living(greeter) as task:
        await greeter.ask("first")
        greeter.spawn(asyncio.sleep(5), name="errand")
        task.cancel()
    assert not [w for w in recwarn if "never awaited" in str(w.message)]


async def test_an_alarm_cuts_a_wait_short_even_when_it_rang_before() -> None:
    alarm = Alarm()
    loop = asyncio.get_running_loop()
    began = loop.time()
    loop.call_later(0.01, alarm.ring)
    assert await alarm.unless_rung(asyncio.sleep(5, "slept")) is None
    alarm.ring()
    assert await alarm.unless_rung(asyncio.sleep(5, "slept")) is None
    assert await alarm.unless_rung(asyncio.sleep(0.001, "slept")) == "slept"
    assert loop.time() - began < 2


async def test_an_actor_that_cannot_start_says_why() -> None:
    class Broken(Greeter):
        async def started(self) -> None:
            raise AdapterError("cannot read the records", code="records_failed")

    with pytest.raises(AdapterError, match="cannot read the records"):
        await Broken().run()
