"""Log streams at the agent: merged by time, within the credit, ended when containers end or readers go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mcp.adapters.fake import Behaviour
from mcp.bus.calls import CallFailed
from mcp.bus.codec import size_of
from mcp.model.messages import AbandonWork, Done, GrantLogCredit, LogLines, StreamLogs
from tests.agent_world import NODE, World, a_world, component, service
from tests.helpers import soon


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A node with a service of two components that say something at their start."""
    async with a_world() as made:
        made.engine.images["db:1"] = Behaviour(is_local=True, says=("db one", "!db two"), ready_after_s=0.5)
        made.engine.images["api:1"] = Behaviour(is_local=True, says=("api one",))
        await made.deployed(1, service(component("db"), component("api")))
        yield made


def lines(world: World, stream: str = "s1") -> list[str]:
    """Return the texts that came of a stream."""
    return [line.text for message in messages(world, stream) for line in message.lines]


def messages(world: World, stream: str = "s1") -> list[LogLines]:
    """Return the messages of a stream."""
    return [m for m in world.heard(LogLines) if m.stream == stream]


def streams(world: World) -> int:
    """Return how many streams the agent has open."""
    return len(world.agent._logs._streams) if world.agent._logs else 0


def read(world: World, **facts: Any) -> asyncio.Task[Any]:
    """Ask for the lines of the service."""
    return world.order(StreamLogs(**{"stream": "s1", "service": "web", **facts}), op="s1")


async def test_what_was_said_comes_in_the_order_of_its_times_and_ends(world: World) -> None:
    await world.clock.advance(1)
    world.engine.say("mcp.web.db.g1", "db three")
    await world.clock.advance(1)
    world.engine.say("mcp.web.api.g1", "api two")
    done = await soon("the stream ends", lambda: world.ended(read(world)))
    assert done == Done(detail="")
    assert lines(world) == ["db one", "db two", "api one", "db three", "api two"]
    (message,) = messages(world)
    assert (message.node, message.sequence) == (NODE, 0)
    assert [line.stream for line in message.lines[:2]] == ["stdout", "stderr"]


async def test_the_last_lines_of_each_container(world: World) -> None:
    await soon("the stream ends", lambda: world.ended(read(world, tail=1)))
    assert lines(world) == ["db two", "api one"]


async def test_followed_lines_come_within_a_moment(world: World) -> None:
    order = read(world, follow=True)
    await soon("the past comes", lambda: len(lines(world)) == 3)
    loop = asyncio.get_running_loop()
    for number in range(3):
        began_s = loop.time()
        world.engine.say("mcp.web.db.g1", f"now {number}")
        await soon("the line comes", lambda: lines(world)[-1] == f"now {number}")  # noqa: B023 - awaited here
        assert loop.time() - began_s < 0.5
    assert not order.done()
    order.cancel()


async def test_a_followed_stream_ends_with_its_containers_and_says_how(world: World) -> None:
    order = read(world, follow=True)
    await soon("the past comes", lambda: len(lines(world)) == 3)
    world.engine.die_by_hand("mcp.web.db.g1", 3)
    world.engine.remove_by_hand("mcp.web.api.g1")
    done = await world.ended(order)
    assert done.detail == "web.api.g1 was removed; web.db.g1 ended with exit code 3"


async def test_no_more_is_sent_than_there_is_credit_for(world: World) -> None:
    for number in range(1000):
        world.engine.say("mcp.web.db.g1", f"line {number}")
    order = read(world, credit=2)
    await soon("two messages come", lambda: len(messages(world)) == 2)
    await asyncio.sleep(0.05)
    assert len(messages(world)) == 2
    await world.asked(GrantLogCredit(stream="s1", credit=100))
    await world.ended(order)
    assert len(lines(world)) == 1003
    assert [m.sequence for m in messages(world)] == list(range(len(messages(world))))


async def test_messages_stay_small(world: World) -> None:
    for number in range(300):
        world.engine.say("mcp.web.db.g1", f"{number} " + "é" * 1000)
    world.engine.say("mcp.web.db.g1", "x" * 1_000_000)
    await soon("the stream ends", lambda: world.ended(read(world, credit=1000)))
    assert len(lines(world)) == 304
    assert max(size_of(m) for m in messages(world)) < 64 * 1024
    assert max(len(m.lines) for m in messages(world)) <= 200


async def test_a_reader_that_takes_nothing_for_a_minute_is_gone(world: World) -> None:
    for number in range(1000):
        world.engine.say("mcp.web.db.g1", f"line {number}")
    order = read(world, credit=1, follow=True)
    await soon("one message comes", lambda: len(messages(world)) == 1)
    await world.clock.advance(59)
    assert not order.done()
    await world.clock.advance(2)
    assert (await order).detail == "its reader took nothing for 60 s"
    assert (await world.asked(GrantLogCredit(stream="s1", credit=1))).changed is False


async def test_a_quiet_stream_waits_for_days(world: World) -> None:
    order = read(world, credit=16, follow=True)
    await soon("the past comes", lambda: len(lines(world)) == 3)
    await world.clock.advance(1000)
    assert not order.done()
    order.cancel()


@pytest.mark.parametrize("end", [GrantLogCredit(stream="s1", credit=0), AbandonWork(target_op="s1")])
async def test_a_reader_may_end_it(world: World, end: Any) -> None:
    order = read(world, follow=True)
    await soon("the past comes", lambda: len(lines(world)) == 3)
    assert (await world.asked(end)).changed is True
    assert (await order).detail == "ended by its reader"


async def test_an_engine_that_goes_away_ends_it_with_the_reason(world: World) -> None:
    order = read(world, follow=True)
    await soon("the past comes", lambda: len(lines(world)) == 3)
    world.engine.go_down()
    assert "container engine is not running" in (await world.ended(order)).detail


async def test_a_lost_bus_ends_it(world: World) -> None:
    read(world, follow=True)
    await soon("the past comes", lambda: len(lines(world)) == 3)
    world.broker.cut(world.lives[-1].transport)
    world.engine.say("mcp.web.db.g1", "into the void")
    await soon("the stream ends", lambda: not streams(world))


async def test_there_is_nothing_to_read_of_what_is_not_there(world: World) -> None:
    with pytest.raises(CallFailed, match=f"api has no container on {NODE}"):
        await world.ended(read(world, service="api"))


async def test_streams_are_counted(world: World) -> None:
    for number in range(32):
        world.order(StreamLogs(stream=f"t{number}", service="web", follow=True))
    await soon("all are open", lambda: streams(world) == 32)
    with pytest.raises(CallFailed, match="the limit is 32"):
        await world.ended(read(world))


async def test_a_flood_of_one_container_leaves_the_other_its_turn(world: World) -> None:
    order = read(world, follow=True, credit=10_000)
    await soon("the past comes", lambda: len(lines(world)) == 3)
    for number in range(5000):
        world.engine.say("mcp.web.db.g1", f"flood {number}")
    world.engine.say("mcp.web.api.g1", "a word")
    await soon("all lines come", lambda: len(lines(world)) == 5004)
    assert "a word" in lines(world)
    order.cancel()
