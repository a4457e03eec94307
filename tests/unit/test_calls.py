"""What the call mux does with frames of all kinds, without any bus."""

from __future__ import annotations

import asyncio
from typing import Any

import attrs
import pytest

from mcp.bus.calls import QUEUE_LIMIT, CallFailed, Calls
from mcp.bus.codec import FrameKind, Letter, seal
from mcp.bus.transport import Frame
from mcp.model.errors import BusUnreachable, NoAnswer, NobodyListens, NotPermitted
from mcp.model.messages import Done, Failed, Probe, ProbeAnswer, Working
from tests.helpers import soon

SUBJECT = "mcp.work.orion.probe"
REPLY = "mcp.node.orion.reply.p1-1-1"
ALIVE = ProbeAnswer(incarnation="first", engine="up", inventory_version=1)


class Wire:
    """Stands for a transport: it writes down what is published."""

    def __init__(self) -> None:
        self.sent: list[Frame] = []
        self.is_connected = True

    async def publish(self, frame: Frame) -> None:
        if not self.is_connected:
            raise BusUnreachable("the connection to the bus is lost: nothing was sent")
        self.sent.append(frame)


class Caller:
    """One mux with one call that is open."""

    def __init__(self) -> None:
        self.calls, self.wire, self.heard = Calls(), Wire(), list[Letter]()
        self.task: asyncio.Future[Any]

    async def ask(self, **more: Any) -> None:
        limits = {"timeout_s": 10.0, "idle_s": 10.0, "on_frame": self.heard.append, **more}
        frame = seal(SUBJECT, Probe(), op="p1", reply=REPLY)
        self.task = asyncio.ensure_future(self.calls.call(self.wire, frame, **limits))  # type: ignore[arg-type]
        await soon("it is asked", lambda: self.wire.sent)

    def answer(self, message: Any, frame: FrameKind = "final", subject: str = REPLY) -> bool:
        return self.calls.deliver(seal(subject, message, op="p1", frame=frame))


@pytest.fixture
async def caller() -> Caller:
    made = Caller()
    await made.ask()
    return made


async def test_frames_are_told_in_order_and_the_final_one_is_the_answer(caller: Caller) -> None:
    caller.answer(Working(detail="a"), "accepted")
    caller.answer(Working(detail="b"), "progress")
    caller.answer(ALIVE)
    assert await caller.task == ALIVE
    assert [(letter.frame, letter.message.detail) for letter in caller.heard] == [("accepted", "a"), ("progress", "b")]


async def test_a_call_that_is_over_hears_nothing_more(caller: Caller) -> None:
    assert caller.answer(ALIVE)
    await caller.task
    assert not caller.answer(ALIVE)
    assert caller.calls.strays == {"late or foreign": 1}


async def test_a_frame_on_any_other_subject_is_nobodys(caller: Caller) -> None:
    for subject in ("mcp.node.orion.reply.p1-1-2", "mcp.node.svc.reply.p1-1-1", REPLY.upper()):
        assert not caller.answer(ALIVE, subject=subject)
    assert caller.calls.strays == {"late or foreign": 3}
    assert not caller.task.done()
    caller.answer(ALIVE)
    await caller.task


@pytest.mark.parametrize(
    "frame",
    [
        Frame(REPLY, b"\xc1", {"Mcp-Kind": "done/1", "Mcp-Frame": "final"}),
        Frame(REPLY, b"\x80"),
        seal(REPLY, ALIVE),  # which of the frames is it?
        attrs.evolve(seal(REPLY, ALIVE, frame="final"), status="404"),
    ],
    ids=["rubbish", "no headers", "no frame kind", "another status"],
)
async def test_what_is_no_answer_leaves_the_call_open(caller: Caller, frame: Frame) -> None:
    caller.calls.deliver(frame)
    if frame.status:
        assert await caller.task == ALIVE  # only 503 is special
        return
    assert caller.calls.strays == {"malformed": 1}
    caller.answer(ALIVE)
    assert await caller.task == ALIVE


async def test_503_means_that_nothing_was_done(caller: Caller) -> None:
    caller.calls.deliver(Frame(REPLY, status="503"))
    with pytest.raises(NobodyListens, match=r"nobody listens on mcp\.work\.orion\.probe: nothing was done"):
        await caller.task


async def test_an_error_frame_that_is_no_failure_of_ours_is_still_one(caller: Caller) -> None:
    caller.answer(Done(), "error")
    with pytest.raises(CallFailed, match="sent a Done instead of a reason") as caught:
        await caller.task
    assert caught.value.failed.code == "internal"


async def test_an_error_frame_has_the_code_and_the_hint_of_the_other_side(caller: Caller) -> None:
    caller.answer(Failed(code="disk_full", reason="orion: disk full", hint="free some"), "error")
    with pytest.raises(CallFailed) as caught:
        await caller.task
    assert (caught.value.code, caught.value.reason, caught.value.hint) == ("disk_full", "orion: disk full", "free some")


async def test_a_lost_bus_ends_every_call_with_its_outcome_unknown(caller: Caller) -> None:
    caller.calls.lost()
    with pytest.raises(NoAnswer, match=r"the bus was lost while waiting for .*: it may have been done"):
        await caller.task


async def test_a_bus_that_was_not_there_means_that_nothing_was_sent() -> None:
    caller = Caller()
    caller.wire.is_connected = False
    frame = seal(SUBJECT, Probe(), reply=REPLY)
    with pytest.raises(BusUnreachable, match="nothing was sent"):
        await caller.calls.call(caller.wire, frame, timeout_s=1, idle_s=1)  # type: ignore[arg-type]
    assert not caller.answer(ALIVE)


async def test_a_refusal_ends_the_calls_that_asked_there_and_no_others(caller: Caller) -> None:
    caller.calls.denied("mcp.work.orion.prob")
    caller.calls.denied("mcp.work.orion.probe.x")
    assert not caller.task.done()
    caller.calls.denied(SUBJECT)
    with pytest.raises(NotPermitted) as caught:
        await caller.task
    assert caught.value.subject == SUBJECT


async def test_an_answer_of_another_kind_than_expected_leaves_the_outcome_unknown() -> None:
    caller = Caller()
    await caller.ask(expects=ProbeAnswer)
    caller.answer(Done())
    with pytest.raises(NoAnswer, match="was answered with a done, which is no answer"):
        await caller.task


async def test_a_flood_of_progress_is_bounded_and_loses_neither_the_end_nor_the_order(caller: Caller) -> None:
    for i in range(QUEUE_LIMIT + 50):  # without a pause, so that the caller takes none of them in
        caller.answer(Working(done=i), "progress")
    caller.answer(ALIVE)
    assert await caller.task == ALIVE
    assert caller.calls.strays == {"too many progress frames": 50}
    told = [letter.message.done for letter in caller.heard]
    assert told == sorted(told)
    assert len(told) >= QUEUE_LIMIT - 1


async def test_a_call_that_is_cancelled_is_forgotten(caller: Caller) -> None:
    caller.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller.task
    assert not caller.answer(ALIVE)
    caller.calls.lost()
    caller.calls.denied(SUBJECT)


async def test_silence_and_the_deadline_are_told_apart() -> None:
    for limits, said in (
        ({"timeout_s": 10.0, "idle_s": 0.02}, r"after 0\.02 s of silence"),
        ({"timeout_s": 0.02, "idle_s": 10.0}, r"after 0\.02 s: it may"),
        ({"timeout_s": -1.0, "idle_s": 10.0}, "it may have been done"),
    ):
        caller = Caller()
        await caller.ask(**limits)
        with pytest.raises(NoAnswer, match=said):
            await caller.task
