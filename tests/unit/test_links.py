"""Deadlines, epochs, floods and drops at the ends of the bus, under a clock that the test moves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.adapters.fake import FakeClock, settle
from mcp.bus import links, subjects
from mcp.bus.calls import CallFailed
from mcp.bus.codec import open_frame, seal
from mcp.bus.link_parts import ANSWER_WITHIN_S, DROPS_LOGGED_EVERY_S, Drops, MasterTime, Tasks
from mcp.bus.links import AgentLink, JoinLink, MasterLink, Order, Report, Request
from mcp.bus.memory import MemoryBroker, MemoryTransport
from mcp.bus.transport import Frame
from mcp.model.errors import BusUnreachable, NoAnswer
from mcp.model.messages import Done, Failed, Join, Probe, ProbeAnswer, Registered
from tests.builders import heartbeat, register

ALIVE = ProbeAnswer(incarnation="first", engine="up", inventory_version=1)
EPOCH = 1_790_000_000_000


class Pair:
    """A master and orion on the bus in memory, each with a clock of its own."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.masters_clock, self.orions_clock = FakeClock(), FakeClock()
        self.orders: list[Order] = []
        self.reports: list[Report | Request] = []
        self.floods: list[tuple[str, bool]] = []
        self.obeys = True
        self.calls: list[asyncio.Future[Any]] = []

    async def open(self) -> Pair:
        self.master = self.new_master(EPOCH)
        self.orion = AgentLink(self.broker.connect("agent", "orion"), "orion", self.orions_clock)
        await self.master.start(lambda request: None, lambda request: None)
        await self.master.watch("orion", self._hear)
        await self.orion.start(self._take)
        return self

    def new_master(self, epoch: int) -> MasterLink:
        made = MasterLink(
            self.broker.connect("master"), self.broker.connect("answers"), self.masters_clock, epoch, flood_limit=50
        )
        made.on_flood = lambda node, is_flooding: self.floods.append((node, is_flooding))
        return made

    def _hear(self, report: Report | Request) -> None:
        self.reports.append(report)

    def _take(self, order: Order) -> None:
        self.orders.append(order)
        if self.obeys:
            order._link._tasks.start(order.final(ALIVE))

    async def advance(self, seconds: float) -> None:
        """Let time pass everywhere."""
        await self.masters_clock.advance(seconds)
        await self.orions_clock.advance(seconds)

    async def probe(self, master: MasterLink | None = None, timeout_s: float = 5.0) -> Any:
        return await (master or self.master).order("orion", Probe(), op="p", timeout_s=timeout_s, idle_s=5.0)

    async def hold(self, count: int = 1) -> list[Frame]:
        """Have the master give orders that orion does not read yet."""
        with self.unread() as caught:
            for _ in range(count):
                self.calls.append(asyncio.ensure_future(self.probe()))
            await settle()
        return caught

    @contextmanager
    def unread(self) -> Iterator[list[Frame]]:
        """Keep orders for orion from it: its process is frozen."""
        caught: list[Frame] = []
        original = self.transport.deliver

        def catch(frame: Frame) -> bool:
            if not frame.subject.startswith("mcp.work."):
                return original(frame)
            caught.append(frame)
            return True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.transport, "deliver", catch)
            yield caught

    @property
    def transport(self) -> MemoryTransport:
        assert isinstance(self.orion.transport, MemoryTransport)
        return self.orion.transport

    def reads(self, frame: Frame) -> None:
        """Have orion read what was kept from it."""
        MemoryTransport.deliver(self.transport, frame)


@pytest.fixture
async def pair() -> Any:
    made = await Pair().open()
    yield made
    for call in made.calls:
        call.cancel()
    await asyncio.gather(*made.calls, return_exceptions=True)
    await made.master.close()
    await made.orion.close()


def refusals(pair: Pair) -> list[str]:
    """The codes of the error frames that orion sent."""
    said = [open_frame(f) for f in pair.broker.frames if f.headers.get("Mcp-Frame") == "error"]
    return [letter.message.code for letter in said]


# --------------------------------------------------------------------- deadlines


async def test_an_order_carries_its_deadline_in_the_agents_own_seconds(pair: Pair) -> None:
    await pair.orions_clock.advance(1000.0)
    await pair.probe(timeout_s=7.0)
    assert pair.orders[0].deadline_s == pytest.approx(1007.0)


async def test_a_step_of_the_nodes_wall_clock_changes_nothing(pair: Pair) -> None:
    await pair.probe()
    for step_s in (3600.0, -7200.0, 3 * 86400.0):
        pair.orions_clock.step_wall(step_s)
        pair.masters_clock.step_wall(-step_s)
        assert await pair.probe() == ALIVE
    assert not pair.orion.dropped


async def test_an_order_that_a_frozen_agent_reads_late_is_refused_and_not_carried_out(pair: Pair) -> None:
    await pair.probe()
    frozen = await pair.hold(3)
    await pair.advance(6.0)
    for frame in frozen:
        pair.reads(frame)
    await settle()
    assert len(pair.orders) == 1
    assert pair.orion.dropped == {"expired": 3}
    assert refusals(pair)[:3] == ["expired"] * 3


async def test_an_order_read_late_but_in_time_is_carried_out(pair: Pair) -> None:
    await pair.probe()
    (frame,) = await pair.hold()
    await pair.advance(4.0)
    pair.reads(frame)
    await settle()
    assert len(pair.orders) == 2
    assert pair.orders[1].deadline_s == pytest.approx(pair.orions_clock.monotonic_s() + 1.0)


async def test_an_order_expires_in_the_agents_hands_too(pair: Pair) -> None:
    pair.obeys = False
    pair.calls.append(asyncio.ensure_future(pair.probe()))
    await settle()
    (order,) = pair.orders
    assert not order.is_expired
    await pair.orions_clock.advance(5.1)
    assert order.is_expired


async def test_a_master_whose_machine_was_suspended_is_obeyed_again_at_once(pair: Pair) -> None:
    """Its clock stood still while the agent's went on: everything it sends seems late, until one answer proves otherwise."""
    await pair.probe()
    await pair.orions_clock.advance(600.0)
    assert await pair.probe() == ALIVE
    assert pair.orion.dropped == {"expired": 1}
    assert await pair.probe() == ALIVE
    assert pair.orion.dropped == {"expired": 1}


async def test_clocks_that_drift_apart_for_months_do_no_harm(pair: Pair) -> None:
    for _ in range(100):
        await pair.masters_clock.advance(86_400.0)
        await pair.orions_clock.advance(86_400.0 * 1.00005)
        assert await pair.probe() == ALIVE
    assert pair.orion.dropped["expired"] < 110


async def test_an_order_that_is_late_indeed_is_not_sent_again(pair: Pair) -> None:
    await pair.probe()
    (frame,) = await pair.hold()
    await pair.advance(6.0)
    sent = len(pair.broker.frames)
    pair.reads(frame)
    await settle()
    with pytest.raises(CallFailed) as caught:
        await pair.calls[0]
    assert caught.value.code == "expired"
    assert len(pair.broker.frames) == sent + 1


async def test_the_second_copy_of_an_order_read_late_is_refused_again(pair: Pair) -> None:
    """The proof that corrects an agent's idea of the time must not let it carry out what it reads long afterwards."""
    await pair.probe()
    await pair.orions_clock.advance(600.0)  # the master's clock stood still
    (first,) = await pair.hold()
    with pair.unread() as held:
        pair.reads(first)
        await settle()
    assert len(held) == 1
    assert held[0].headers["Mcp-Answers"]
    await pair.advance(6.0 + ANSWER_WITHIN_S)
    pair.reads(held[0])
    await settle()
    assert len(pair.orders) == 1
    assert pair.orion.dropped == {"expired": 2}


async def test_a_registration_corrects_the_agents_idea_of_the_masters_time(pair: Pair) -> None:
    await pair.probe()
    await pair.orions_clock.advance(600.0)
    registering = asyncio.ensure_future(pair.orion.register(register(), timeout_s=5.0))
    await settle()
    (request,) = pair.reports
    assert isinstance(request, Request)
    await request.final(Registered(epoch=EPOCH))
    await registering
    await pair.probe()
    assert not pair.orion.dropped


@given(
    offset_s=st.floats(-1e6, 1e6),
    ways_s=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=20),
    late_s=st.floats(10.0, 1000.0),
)
def test_the_offset_is_never_taken_from_what_came_late(offset_s: float, ways_s: list[float], late_s: float) -> None:
    time, now_s = MasterTime(), 0.0
    for way_s in [*ways_s, late_s]:
        now_s += 5.0
        time.learn(now_s - way_s - offset_s, 1, now_s)
    here = time.here(now_s - late_s - offset_s)
    assert here is not None
    assert here == pytest.approx(now_s - late_s + min(ways_s), abs=1e-3)


def test_the_time_of_a_master_never_heard_is_unknown() -> None:
    assert MasterTime().here(1.0) is None
    time = MasterTime()
    time.learn(100.0, 1, 7.0)
    assert time.here(None) is None
    assert time.here(101.0) == pytest.approx(8.0)


def test_a_new_master_has_a_time_of_its_own() -> None:
    time = MasterTime()
    time.learn(100.0, 1, 7.0)
    time.learn(5000.0, 2, 8.0)
    assert time.here(5001.0) == pytest.approx(9.0)


# ------------------------------------------------------------------------ epochs


async def test_a_deposed_master_is_refused_and_told_why(pair: Pair) -> None:
    newer = pair.new_master(EPOCH + 1)
    await newer.watch("orion", lambda report: None)
    assert await pair.probe(newer) == ALIVE
    with pytest.raises(CallFailed, match="orion obeys a newer master") as caught:
        await pair.probe()
    assert caught.value.code == "stale_epoch"
    assert pair.orion.dropped == {"stale epoch": 1}
    assert pair.orion.epoch == EPOCH + 1


async def test_a_deposed_master_does_not_spoil_the_idea_of_the_newer_ones_time(pair: Pair) -> None:
    newer = pair.new_master(EPOCH + 1)
    await newer.watch("orion", lambda report: None)
    await pair.probe(newer)
    with pytest.raises(CallFailed):
        await pair.probe()
    pair.master = newer
    (frame,) = await pair.hold()
    await pair.advance(6.0)
    pair.reads(frame)
    await settle()
    assert pair.orion.dropped == {"stale epoch": 1, "expired": 1}


async def test_the_epoch_that_the_records_remember_counts_from_the_first_order_on() -> None:
    pair = await Pair().open()
    pair.orion.epoch = EPOCH + 5
    with pytest.raises(CallFailed) as caught:
        await pair.probe()
    assert caught.value.code == "stale_epoch"
    await pair.orion.close()


async def test_a_registration_tells_the_epoch(pair: Pair) -> None:
    registering = asyncio.ensure_future(pair.orion.register(register(), timeout_s=5.0))
    await settle()
    assert isinstance(pair.reports[0], Request)
    await pair.reports[0].final(Registered(epoch=EPOCH + 3))
    await registering
    assert pair.orion.epoch == EPOCH + 3


# ------------------------------------------------------------------------ floods


async def test_a_node_within_the_limit_is_never_muted(pair: Pair) -> None:
    for _ in range(100):
        for _ in range(49):
            await pair.orion.heartbeat(heartbeat())
        await pair.masters_clock.advance(1.0)
    assert pair.floods == []
    assert len(pair.reports) == 4900


async def test_a_burst_is_fine_and_more_is_a_flood(pair: Pair) -> None:
    for _ in range(links.FLOOD_BURST - 1):
        await pair.orion.heartbeat(heartbeat())
    await settle()
    assert pair.floods == []
    await pair.orion.heartbeat(heartbeat())
    await settle()
    assert pair.floods == [("orion", True)]


async def test_a_node_that_is_muted_is_heard_again_after_its_rest(pair: Pair) -> None:
    for _ in range(links.FLOOD_BURST * 3):
        await pair.orion.heartbeat(heartbeat())
    await settle()
    heard = len(pair.reports)
    assert heard < links.FLOOD_BURST
    await pair.orion.heartbeat(heartbeat())
    await settle()
    assert len(pair.reports) == heard
    await pair.masters_clock.advance(links.FLOOD_REST_S)
    assert pair.floods == [("orion", True), ("orion", False)]
    await pair.orion.heartbeat(heartbeat())
    await settle()
    assert len(pair.reports) == heard + 1


async def test_a_node_muted_while_the_bus_is_lost_is_heard_again_when_both_are_over(pair: Pair) -> None:
    for _ in range(links.FLOOD_BURST):
        await pair.orion.heartbeat(heartbeat())
    await settle()
    pair.broker.stop()
    await pair.masters_clock.advance(links.FLOOD_REST_S * 2)
    assert pair.floods == [("orion", True)]
    pair.broker.start()
    await pair.masters_clock.advance(links.FLOOD_REST_S * 2)
    assert pair.floods == [("orion", True), ("orion", False)]


async def test_a_node_whose_watch_failed_can_be_watched_later(pair: Pair) -> None:
    pair.broker.stop()
    with pytest.raises(BusUnreachable):
        await pair.master.watch("svc", pair._hear)
    pair.broker.start()
    await pair.master.watch("svc", pair._hear)
    svc = AgentLink(pair.broker.connect("agent", "svc"), "svc", pair.orions_clock)
    await svc.heartbeat(heartbeat())
    await settle()
    assert [report.who for report in pair.reports] == ["svc"]


# ------------------------------------------------------------- drops, tasks, ends


async def test_what_is_dropped_is_logged_once_a_minute_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    drops = Drops("message", clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            drops.add("malformed from orion", "not msgpack")
            drops.add("out of place from svc")
        assert len(caplog.records) == 2
        await clock.advance(DROPS_LOGGED_EVERY_S)
        drops.add("malformed from orion", "not msgpack")
    assert len(caplog.records) == 3
    assert caplog.records[-1].getMessage() == "message dropped, malformed from orion: not msgpack (1001 so far)"
    assert drops.counts == {"malformed from orion": 1001, "out of place from svc": 1000}


async def test_rubbish_with_many_faces_does_not_fill_the_memory(pair: Pair) -> None:
    svc = pair.broker.connect("agent", "orion")
    for i in range(150):
        await svc.publish(Frame("mcp.node.orion.heartbeat", b"x", {"Mcp-Kind": f"kind_{'x' * (i % 40)}/1"}))
        await svc.publish(Frame(f"mcp.node.orion.nowhere{i}"))
        await settle()
        await pair.masters_clock.advance(0.1)
    assert set(pair.master.dropped) <= {"malformed from orion", "out of place from orion"}
    assert pair.master.dropped.total() == 300


async def test_a_link_says_what_is_still_to_be_said_before_it_ends() -> None:
    said: list[str] = []

    async def say_later() -> None:
        await asyncio.sleep(0)
        said.append("refused")

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            said.append("cancelled")

    tasks = Tasks()
    tasks.start(say_later())
    await tasks.end(1.0)
    assert said == ["refused"]
    tasks.start(hang())
    await tasks.end(0.01)
    assert said == ["refused", "cancelled"]
    await tasks.end(0.01)


async def test_the_end_of_a_connection_is_told(pair: Pair) -> None:
    ended: list[str] = []
    pair.master.on_closed = lambda: ended.append("master")
    pair.orion.on_closed = lambda: ended.append("orion")
    for transport in (pair.master.hearing, pair.master.answering, pair.orion.transport):
        assert isinstance(transport, MemoryTransport)
        pair.broker.expel(transport)
    assert ended == ["master", "master", "orion"]


async def test_a_lost_bus_and_its_return_are_told_once(pair: Pair) -> None:
    told: list[str] = []
    pair.master.on_bus_back = lambda: told.append("master")
    pair.orion.on_back = lambda: told.append("orion")
    for _ in range(2):
        pair.broker.stop()
        pair.broker.start()
    assert sorted(told) == ["master", "master", "orion", "orion"]


async def test_a_newcomer_that_loses_the_bus_knows_it_at_once() -> None:
    broker = MemoryBroker()
    master = broker.connect("master")
    await master.subscribe("mcp.join.*", lambda frame: None)
    link = JoinLink(broker.connect("join", "inv1"), "inv1")
    me = Join(node="", public_key="UABC", address="", arch="amd64", version="0.1")
    joining = asyncio.ensure_future(link.join(me, timeout_s=60.0))
    await settle()
    broker.stop()
    with pytest.raises(NoAnswer, match="the bus was lost"):
        await joining


async def test_what_an_agent_refuses_at_its_own_desk_is_refused_on_its_reply_lane(pair: Pair) -> None:
    pair.obeys = False
    call = asyncio.ensure_future(pair.probe())
    await settle()
    (order,) = pair.orders
    assert order.call.startswith("p-")
    await order.progress(Done())
    await order.failed(Failed(code="busy", reason="orion is busy"))
    await order.final(ALIVE)
    with pytest.raises(CallFailed, match="orion is busy"):
        await call
    lane = subjects.reply("orion", order.call)
    assert [f.headers["Mcp-Frame"] for f in pair.broker.frames if f.subject == lane] == ["progress", "error"]


async def test_every_event_of_a_node_has_an_id_of_its_own(pair: Pair) -> None:
    from mcp.model.messages import EngineChanged

    for _ in range(3):
        await pair.orion.event(EngineChanged(incarnation="first", engine="up"))
    ids = [f.headers["Nats-Msg-Id"] for f in pair.broker.frames]
    assert len(set(ids)) == 3
    assert all(each.startswith("orion-first-") for each in ids)


async def test_an_order_without_a_deadline_never_expires(pair: Pair) -> None:
    master = pair.broker.connect("master")
    await master.publish(seal("mcp.work.orion.probe", Probe(), reply="mcp.node.orion.reply.x", epoch=EPOCH))
    await settle()
    await pair.orions_clock.advance(1e6)
    assert [order.is_expired for order in pair.orders] == [False]
