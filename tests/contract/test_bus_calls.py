"""What a call promises to whoever asks, on the bus in memory and on a real nats-server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mcp.bus.calls import CallFailed, Calls
from mcp.bus.codec import Letter, seal
from mcp.bus.links import AgentLink, MasterLink, Order, Request
from mcp.bus.transport import MAX_BODY_BYTES
from mcp.model.errors import BusUnreachable, MalformedMessage, NoAnswer, NobodyListens, NotPermitted
from mcp.model.messages import ContainerLog, Done, Failed, ImagesPulled, Probe, ProbeAnswer, PullImages, Working
from mcp.model.operator_messages import (
    DeployService,
    ListOperations,
    OperationAccepted,
    OperationEnded,
    OperationList,
    OperationProgress,
    StopService,
)
from tests.builders import service
from tests.contract.bus_fixtures import TestBus
from tests.helpers import soon

LONG_S = 20.0
"""A limit that no test reaches."""

ALIVE = ProbeAnswer(incarnation="first", engine="up", inventory_version=1)


def answering(handle: Callable[[Any], Awaitable[None]]) -> Callable[[Any], None]:
    """Turn a coroutine into a callback that only enqueues, as links want it."""
    tasks: set[asyncio.Task[None]] = set()

    async def run(request: Any) -> None:
        await handle(request)

    def take(request: Any) -> None:
        task = asyncio.get_running_loop().create_task(run(request))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return take


async def ignore(_: object) -> None:
    """Hear it and say nothing."""


async def commanded(bus: TestBus, handle: Callable[[Request], Awaitable[None]]) -> MasterLink:
    """A master that handles commands like this."""
    master = await bus.master()
    await master.start(answering(handle), answering(ignore))
    await master.hearing.flush()
    return master


async def ordered(bus: TestBus, handle: Callable[[Order], Awaitable[None]]) -> tuple[MasterLink, AgentLink]:
    """A master, and orion that handles orders like this."""
    master, orion = await commanded(bus, ignore), await bus.agent("orion")
    await master.watch("orion", lambda report: None)
    await orion.start(answering(handle))
    await master.hearing.flush()
    await orion.transport.flush()
    return master, orion


# ------------------------------------------------------------------------ frames


async def test_a_command_is_accepted_then_followed_then_ended(bus: TestBus) -> None:
    async def deploy(request: Request) -> None:
        assert (request.who, request.kind, request.is_open) == ("kyle", "deploy_service", True)
        assert request.message == DeployService(spec=service("web"))
        await request.accepted(OperationAccepted(op="op1", service="web", kind="deploy"))
        for _ in range(5):
            await request.progress(OperationProgress(op="op1"))
        await request.final(OperationEnded(op="op1", service="web", kind="deploy", outcome="deployed"))
        await request.progress(OperationProgress(op="late"))  # after the end: not said any more
        assert not request.is_open

    await commanded(bus, deploy)
    kyle, frames = await bus.operator("kyle"), list[Letter]()
    ended = await kyle.call(
        DeployService(spec=service("web")), op="mine", timeout_s=LONG_S, idle_s=LONG_S, on_frame=frames.append
    )
    assert (ended.outcome, ended.op) == ("deployed", "op1")
    assert [frame.frame for frame in frames] == ["accepted"] + ["progress"] * 5
    assert {frame.op for frame in frames} == {"mine"}


async def test_an_error_frame_fails_the_call_with_everything_it_says(bus: TestBus) -> None:
    logs = (ContainerLog(component="web", container="mcp.web.g1", exit_code=1, lines=("no such file",)),)
    failed = Failed(code="unhealthy", reason="web did not become healthy", hint="mcp logs web", logs=logs)

    async def fail(request: Request) -> None:
        await request.failed(failed)

    await commanded(bus, fail)
    kyle = await bus.operator("kyle")
    with pytest.raises(CallFailed, match="web did not become healthy") as caught:
        await kyle.call(StopService(service="web"), timeout_s=LONG_S, idle_s=LONG_S)
    assert (caught.value.code, caught.value.hint, caught.value.failed) == ("unhealthy", "mcp logs web", failed)


async def test_a_command_in_a_sealed_envelope_is_the_same_command(bus: TestBus) -> None:
    async def end(request: Request) -> None:
        await request.final(OperationList())

    await commanded(bus, end)
    kyle = await bus.operator("kyle")
    assert await kyle.call(ListOperations(), timeout_s=LONG_S, idle_s=LONG_S, is_sealed=True) == OperationList()


async def test_two_commands_of_one_operator_hear_their_own_answers(bus: TestBus) -> None:
    async def echo(request: Request) -> None:
        await request.final(OperationEnded(op="x", service=request.message.service, kind="stop", outcome="done"))

    await commanded(bus, echo)
    callers = [await bus.operator("kyle"), await bus.operator("kyle"), await bus.operator("alice")]
    asked = [
        (caller, name, asyncio.ensure_future(caller.call(StopService(service=name), timeout_s=LONG_S, idle_s=LONG_S)))
        for i, caller in enumerate(callers)
        for name in (f"a{i}", f"b{i}", f"c{i}")
    ]
    for caller, name, call in asked:
        assert (await call).service == name
        assert not caller._calls.strays


async def test_the_first_end_of_an_order_counts(bus: TestBus) -> None:
    async def end_twice(order: Order) -> None:
        await order.final(ALIVE)
        await order.failed(Failed(code="x", reason="too late"))
        await order.progress(Working())

    master, _ = await ordered(bus, end_twice)
    assert await master.order("orion", Probe(), op="p1", timeout_s=LONG_S, idle_s=LONG_S) == ALIVE
    await master.hearing.flush()
    assert not master.strays


async def test_an_answer_too_large_for_the_bus_becomes_an_error_that_says_so(bus: TestBus) -> None:
    async def boast(order: Order) -> None:
        await order.final(ImagesPulled(pulled=("x" * MAX_BODY_BYTES,)))

    master, _ = await ordered(bus, boast)
    with pytest.raises(CallFailed, match="the limit is 131072") as caught:
        await master.order("orion", PullImages(service="web", images=()), op="p", timeout_s=LONG_S, idle_s=LONG_S)
    assert caught.value.code == "too_large"


async def test_an_answer_that_is_none_leaves_the_outcome_unknown(bus: TestBus) -> None:
    async def confuse(order: Order) -> None:
        await order.final(Done())

    master, _ = await ordered(bus, confuse)
    with pytest.raises(NoAnswer, match="answered with a done, which is no answer: it may have been done"):
        await master.order("orion", Probe(), op="p", timeout_s=LONG_S, idle_s=LONG_S)


# ------------------------------------------------------------------------ limits


async def test_a_node_where_nobody_listens_is_known_at_once(bus: TestBus) -> None:
    master = await bus.master()
    await master.watch("orion", lambda report: None)
    began = time.perf_counter()
    with pytest.raises(NobodyListens, match=r"nobody listens on mcp\.work\.orion\.probe: nothing was done"):
        await master.order("orion", Probe(), op="p", timeout_s=LONG_S, idle_s=LONG_S)
    assert time.perf_counter() - began < 1.0


async def test_silence_between_two_frames_ends_a_call(bus: TestBus) -> None:
    async def fall_silent(order: Order) -> None:
        await order.progress(Working())

    master, _ = await ordered(bus, fall_silent)
    with pytest.raises(NoAnswer, match=r"after 0\.2 s of silence: it may have been done"):
        await master.order("orion", Probe(), op="p", timeout_s=LONG_S, idle_s=0.2)


async def test_progress_keeps_a_call_alive_beyond_its_idle_time(bus: TestBus) -> None:
    idle_s = 0.4

    async def take_long(order: Order) -> None:
        for _ in range(6):
            await asyncio.sleep(idle_s / 3)
            await order.progress(Working())
        await order.final(ALIVE)

    master, _ = await ordered(bus, take_long)
    heard: list[Any] = []
    answer = await master.order("orion", Probe(), op="p", timeout_s=LONG_S, idle_s=idle_s, on_progress=heard.append)
    assert answer == ALIVE
    assert heard == [Working()] * 6


async def test_the_deadline_ends_a_call_that_only_makes_progress(bus: TestBus) -> None:
    async def never_end(order: Order) -> None:
        while not order.is_expired:
            await order.progress(Working())
            await asyncio.sleep(0.01)

    master, _ = await ordered(bus, never_end)
    began = time.perf_counter()
    with pytest.raises(NoAnswer, match=r"after 0\.3 s: it may have been done"):
        await master.order("orion", Probe(), op="p", timeout_s=0.3, idle_s=LONG_S)
    assert time.perf_counter() - began < 2.0


async def test_a_call_that_is_cancelled_is_over_and_its_late_answer_is_counted(bus: TestBus) -> None:
    orders: asyncio.Queue[Order] = asyncio.Queue()
    master, orion = await bus.master(), await bus.agent("orion")
    await master.watch("orion", lambda report: None)
    await orion.start(orders.put_nowait)
    await orion.transport.flush()
    call = asyncio.ensure_future(master.order("orion", Probe(), op="p", timeout_s=LONG_S, idle_s=LONG_S))
    order = await orders.get()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await order.progress(Working())
    await order.final(ALIVE)
    await soon("both are counted", lambda: master.strays == {"late or foreign": 2})


async def test_a_busy_caller_loses_progress_but_never_the_end(bus: TestBus) -> None:
    async def chatter(order: Order) -> None:
        for _ in range(1500):
            await order.progress(Working())
        await order.final(ALIVE)

    master, orion = await bus.master(flood_limit=1_000_000), await bus.agent("orion")
    await master.watch("orion", lambda report: None)
    await orion.start(answering(chatter))
    await orion.transport.flush()
    assert await master.order("orion", Probe(), op="p", timeout_s=LONG_S, idle_s=LONG_S) == ALIVE


# -------------------------------------------------------------------- what is lost


async def test_every_open_call_fails_at_once_when_the_bus_is_lost(bus: TestBus) -> None:
    async def hang(order: Order) -> None:
        await order.progress(Working())

    master, orion = await ordered(bus, hang)
    started: list[Any] = []
    calls = [
        asyncio.ensure_future(
            master.order("orion", Probe(), op=f"p{i}", timeout_s=LONG_S, idle_s=LONG_S, on_progress=started.append)
        )
        for i in range(3)
    ]
    await soon("all are under way", lambda: len(started) == 3)
    began = time.perf_counter()
    await bus.stop()
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(result, NoAnswer)
        assert "the bus was lost while waiting" in str(result)
        assert "may have been done" in str(result)
    assert time.perf_counter() - began < 2.0
    with pytest.raises(BusUnreachable):
        await master.order("orion", Probe(), op="p", timeout_s=LONG_S, idle_s=LONG_S)
    await bus.start()
    await soon("both are back", lambda: master.hearing.is_connected and orion.transport.is_connected)


async def test_an_agent_that_loses_the_bus_in_the_middle_goes_on_without_an_error(bus: TestBus) -> None:
    orders: asyncio.Queue[Order] = asyncio.Queue()
    back = asyncio.Event()
    master, orion = await bus.master(), await bus.agent("orion")
    await master.watch("orion", lambda report: None)
    await orion.start(orders.put_nowait)
    orion.on_back = back.set
    await orion.transport.flush()
    call = asyncio.ensure_future(master.order("orion", Probe(), op="p", timeout_s=LONG_S, idle_s=LONG_S))
    order = await orders.get()
    await bus.cut(orion.transport)
    await order.progress(Working())
    await bus.heal(orion.transport)
    await asyncio.wait_for(back.wait(), LONG_S)
    await order.final(ALIVE)
    assert await call == ALIVE


async def test_a_call_that_the_bus_does_not_permit_fails_and_names_the_subject(bus: TestBus) -> None:
    link, calls = await bus.connect("operator", "kyle"), Calls()
    link.on_denied = lambda verb, subject: calls.denied(subject)
    await link.subscribe("_INBOX.cli.kyle.>", calls.deliver)
    frame = seal("mcp.cmd.Alice.stop_service", StopService(service="web"), reply="_INBOX.cli.kyle.1")
    began = time.perf_counter()
    with pytest.raises(
        NotPermitted, match=r"does not permit mcp\.cmd\.Alice\.stop_service: nothing was sent"
    ) as caught:
        await calls.call(link, frame, timeout_s=LONG_S, idle_s=LONG_S)
    assert caught.value.subject == "mcp.cmd.Alice.stop_service"
    assert time.perf_counter() - began < 1.0


async def test_a_request_too_large_for_the_bus_is_refused_before_anything_is_sent(bus: TestBus) -> None:
    master, _ = await ordered(bus, ignore)
    with pytest.raises(MalformedMessage, match="the limit is 131072"):
        await master.order(
            "orion", PullImages(service="web", images=("x" * MAX_BODY_BYTES,)), op="p", timeout_s=LONG_S, idle_s=LONG_S
        )
