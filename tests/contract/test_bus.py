"""What a bus promises, on the one in memory and on a real nats-server."""

from __future__ import annotations

import asyncio
import time

import pytest

from mcp.bus.subjects import ConnectionRole, grant, matches
from mcp.bus.transport import MAX_BODY_BYTES, MAX_HEADER_BYTES, Frame
from mcp.model.errors import BusUnreachable, MalformedMessage
from tests.contract.bus_fixtures import Ear, TestBus, Watch
from tests.helpers import soon
from tests.real_bus import EVERYBODY

# ------------------------------------------------------------- publish, subscribe


async def test_frames_arrive_in_the_order_they_were_published(bus: TestBus) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()
    await master.subscribe("mcp.node.orion.>", ear)
    await master.flush()
    for i in range(2000):
        await orion.publish(Frame("mcp.node.orion.heartbeat", str(i).encode()))
    await ear.hears(2000)
    assert ear.bodies == [str(i).encode() for i in range(2000)]


async def test_a_frame_arrives_as_it_was_published(bus: TestBus) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()
    await master.subscribe("mcp.node.orion.>", ear)
    await master.flush()
    sent = [
        Frame("mcp.node.orion.register", b"\x00\xff\r\n", {"Mcp-Kind": "register/1"}, reply="_INBOX.agent.orion.1"),
        Frame("mcp.node.orion.heartbeat"),
        Frame("mcp.node.orion.event.x", b"x" * MAX_BODY_BYTES, {"Mcp-Op": "caf\u00e9", "Traceparent": "00-a-b-01"}),
    ]
    for frame in sent:
        await orion.publish(frame)
    assert await ear.hears(3) == sent


async def test_wildcards_are_whole_tokens(bus: TestBus) -> None:
    orion, master = await bus.connect("agent", "orion"), await bus.connect("master")
    ears = {
        pattern: Ear()
        for pattern in ("mcp.node.orion.>", "mcp.node.orion.*", "mcp.node.orion.event.*", "mcp.node.orion.heartbeat")
    }
    for pattern, ear in ears.items():
        await master.subscribe(pattern, ear)
    await master.flush()
    said = ["mcp.node.orion.heartbeat", "mcp.node.orion.event.service_gone", "mcp.node.orion.register"]
    for subject in said:
        await orion.publish(Frame(subject))
    await ears["mcp.node.orion.>"].hears(3)
    await master.flush()
    for pattern, ear in ears.items():
        assert ear.subjects == [subject for subject in said if matches(pattern, subject)], pattern


async def test_everybody_who_subscribed_hears_a_frame(bus: TestBus) -> None:
    master, first, second = await bus.connect("master"), Ear(), Ear()
    for user, ear in (("kyle", first), ("alice", second)):
        operator = await bus.connect("operator", user)
        await operator.subscribe("mcp.event.>", ear)
        await operator.flush()
    await master.publish(Frame("mcp.event.operation_started", b"x"))
    assert (await first.hears(1), await second.hears(1)) == (first.frames, second.frames)


async def test_a_subscription_that_is_closed_hears_no_more(bus: TestBus) -> None:
    orion, master, closed, open_ = await bus.connect("agent", "orion"), await bus.connect("master"), Ear(), Ear()
    subscription = await master.subscribe("mcp.node.orion.>", closed)
    await master.subscribe("mcp.node.orion.>", open_)
    await master.flush()
    await orion.publish(Frame("mcp.node.orion.heartbeat", b"1"))
    await closed.hears(1)
    await subscription.close()
    await subscription.close()
    await master.flush()
    await orion.publish(Frame("mcp.node.orion.heartbeat", b"2"))
    await open_.hears(2)
    assert closed.bodies == [b"1"]


@pytest.mark.parametrize("failure", [RuntimeError("a bug"), asyncio.CancelledError()], ids=["error", "cancelled"])
async def test_a_handler_that_fails_hears_the_next_frame_all_the_same(bus: TestBus, failure: BaseException) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()

    def fail_on_the_first(frame: Frame) -> None:
        ear(frame)
        if len(ear.frames) == 1:
            raise failure

    await master.subscribe("mcp.node.orion.>", fail_on_the_first)
    await master.flush()
    for body in (b"1", b"2"):
        await orion.publish(Frame("mcp.node.orion.heartbeat", body))
    await ear.hears(2)


async def test_whoever_does_not_take_its_frames_in_does_not_hold_up_the_others(bus: TestBus) -> None:
    orion, svc, master, ear = (
        await bus.connect("agent", "orion"),
        await bus.connect("agent", "svc"),
        await bus.connect("master"),
        Ear(),
    )
    idle: asyncio.Queue[Frame] = asyncio.Queue()  # filled, and never emptied
    await master.subscribe("mcp.node.orion.>", idle.put_nowait)
    await master.subscribe("mcp.node.svc.>", ear)
    await master.flush()
    for _ in range(500):
        await orion.publish(Frame("mcp.node.orion.heartbeat", b"x" * 1000))
    await svc.publish(Frame("mcp.node.svc.heartbeat"))
    await ear.hears(1)


# -------------------------------------------------------------- nobody listens


async def test_a_request_that_nobody_hears_is_answered_503_at_once(bus: TestBus) -> None:
    master, ear = await bus.connect("master"), Ear()
    await master.subscribe("mcp.node.orion.>", ear)
    await master.flush()
    began = time.perf_counter()
    await master.publish(Frame("mcp.work.orion.probe", b"x", reply="mcp.node.orion.reply.1"))
    (answer,) = await ear.hears(1)
    assert (answer.subject, answer.status, answer.body) == ("mcp.node.orion.reply.1", "503", b"")
    assert time.perf_counter() - began < 1.0  # 0.4 ms on an idle machine (docs/bus.md, Calls)


async def test_what_somebody_hears_or_what_wants_no_answer_is_never_answered_503(bus: TestBus) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()
    await master.subscribe("mcp.node.orion.>", ear)
    await master.flush()
    await master.publish(Frame("mcp.work.orion.probe"))
    await orion.subscribe("mcp.work.orion.>", Ear())
    await orion.flush()
    await master.publish(Frame("mcp.work.orion.probe", reply="mcp.node.orion.reply.1"))
    await master.flush()
    await orion.publish(Frame("mcp.node.orion.heartbeat", b"last"))
    await ear.hears(1)
    assert ear.bodies == [b"last"]


async def test_a_status_that_a_client_writes_among_its_headers_is_not_the_servers(bus: TestBus) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()
    await master.subscribe("mcp.node.orion.>", ear)
    await master.flush()
    await orion.publish(Frame("mcp.node.orion.reply.1", headers={"Status": "503"}))
    (heard,) = await ear.hears(1)
    assert (heard.status, heard.headers) == ("", {"Status": "503"})


# ------------------------------------------------------------------- permissions

SAMPLES = (
    "mcp.cmd.kyle.get_status",
    "sealed.cmd.kyle.deploy_service",
    "mcp.cmd.alice.get_status",
    "mcp.join.inv1",
    "mcp.join.inv2",
    "mcp.node.orion.register",
    "mcp.node.orion.heartbeat",
    "mcp.node.orion.event.service_gone",
    "mcp.node.orion.log.s1",
    "mcp.node.orion.reply.op-1",
    "mcp.node.svc.heartbeat",
    "mcp.node.svc.reply.op-1",
    "mcp.work.orion.probe",
    "sealed.work.orion.run_workload",
    "mcp.work.svc.probe",
    "mcp.event.operation_started",
    "_INBOX.cli.kyle.1",
    "_INBOX.cli.alice.1",
    "_INBOX.agent.orion.1",
    "_INBOX.agent.svc.1",
    "_INBOX.join.inv1.1",
    "_INBOX.system.1",
    "_INBOX.abc",
    "$JS.API.INFO",
    "elsewhere",
)
ROLES = tuple(who for who in EVERYBODY if who[0] != "system" and who[1] not in ("rift", "svc", "alice"))


@pytest.mark.parametrize(("role", "name"), ROLES)
async def test_nobody_publishes_where_its_role_may_not(bus: TestBus, role: ConnectionRole, name: str) -> None:
    link = await bus.connect(role, name)
    watch = Watch(link)
    for subject in SAMPLES:
        await link.publish(Frame(subject))
    await link.flush()
    allowed = grant(role, name).publish
    refused = [s for s in SAMPLES if not any(matches(pattern, s) for pattern in allowed)]
    await soon("every refusal is told", lambda: len(watch.denied) == len(refused))
    assert watch.denied == [("publish", subject.lower()) for subject in refused]


@pytest.mark.parametrize(("role", "name"), ROLES)
async def test_nobody_hears_what_its_role_may_not_not_even_by_a_wildcard(
    bus: TestBus, role: ConnectionRole, name: str
) -> None:
    allowed = grant(role, name).subscribe
    wider = (">", "*", "mcp.>", "*.>", "mcp.*.>", "mcp.node.*.heartbeat", "mcp.*.orion.>", "_INBOX.>", "sealed.>")
    link = await bus.connect(role, name)
    watch = Watch(link)
    ears = {pattern: Ear() for pattern in (*SAMPLES, *wider)}
    for pattern, ear in ears.items():
        await link.subscribe(pattern, ear)
    await link.flush()
    refused = {subject for _, subject in watch.denied}
    for subject in SAMPLES:
        assert (subject.lower() in refused) is not any(matches(pattern, subject) for pattern in allowed), subject
    publishers = [
        await bus.connect(*who) for who in (("master", ""), ("answers", ""), ("agent", "orion"), ("agent", "svc"))
    ]
    publishers += [await bus.connect("operator", user) for user in ("kyle", "alice")]
    for publisher in publishers:
        for subject in SAMPLES:
            await publisher.publish(Frame(subject))
        await publisher.flush()
    await link.flush()
    for pattern, ear in ears.items():
        for subject in ear.subjects:
            assert any(matches(allowed_one, subject) for allowed_one in allowed), f"{role} heard {subject} by {pattern}"


async def test_a_refused_subscription_leaves_the_others_alone(bus: TestBus) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()
    watch = Watch(orion)
    await orion.subscribe("mcp.work.orion.>", ear)
    await orion.subscribe("mcp.work.svc.>", Ear())
    await orion.flush()
    assert watch.denied == [("subscribe", "mcp.work.svc.>")]
    await master.publish(Frame("mcp.work.orion.probe"))
    await ear.hears(1)


# ------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    "frame",
    [
        Frame("mcp.node.orion.heartbeat", b"x" * (MAX_BODY_BYTES + 1)),
        Frame("mcp.node.orion.heartbeat", headers={"Traceparent": "x" * MAX_HEADER_BYTES}),
        Frame(""),
        Frame("mcp.node.orion."),
        Frame("mcp.node..orion"),
        Frame("mcp.node.orion.>"),
        Frame("mcp.node.orion.*"),
        Frame("mcp.node.orion.a b"),
        Frame("mcp.node.orion.a\r\nPUB mcp.event.x 0\r\n\r\n"),
        Frame("mcp.node.orion.a\x0bb"),
        Frame("mcp.node.orion.caf\u00e9"),
        Frame("mcp.node.orion." + "x" * 600),
        Frame("mcp.node.orion.register", reply="_INBOX.agent.orion.a b"),
        Frame("mcp.node.orion.register", reply="_INBOX.agent.orion.>"),
    ],
    ids=lambda frame: repr(frame.subject)[:30],
)
async def test_what_the_bus_cannot_carry_is_refused_before_it_is_sent(bus: TestBus, frame: Frame) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()
    watch = Watch(orion)
    await master.subscribe("mcp.node.orion.>", ear)
    await master.flush()
    with pytest.raises(MalformedMessage):
        await orion.publish(frame)
    await orion.publish(Frame("mcp.node.orion.heartbeat", b"next"))
    await ear.hears(1)
    assert ear.bodies == [b"next"]
    assert watch.states == []


# ----------------------------------------------------------------- lost and back


async def test_a_link_that_is_lost_comes_back_with_its_subscriptions(bus: TestBus) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()
    watch = Watch(orion)
    await orion.subscribe("mcp.work.orion.>", ear)
    await orion.flush()
    await bus.cut(orion)
    assert not orion.is_connected
    await bus.heal(orion)
    assert watch.states == ["lost", "connected"]
    await master.publish(Frame("mcp.work.orion.probe"))
    await ear.hears(1)


async def test_what_is_said_while_a_link_is_lost_fails_at_once_and_is_never_said_later(bus: TestBus) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()
    await master.subscribe("mcp.node.orion.>", ear)
    await master.flush()
    await bus.cut(orion)
    began = time.perf_counter()
    with pytest.raises(BusUnreachable):
        await orion.publish(Frame("mcp.node.orion.heartbeat", b"while away"))
    with pytest.raises(BusUnreachable):
        await orion.subscribe("mcp.work.orion.>", Ear())
    with pytest.raises(BusUnreachable):
        await orion.flush()
    assert time.perf_counter() - began < 0.5
    await bus.heal(orion)
    await orion.publish(Frame("mcp.node.orion.heartbeat", b"back"))
    await ear.hears(1)
    assert ear.bodies == [b"back"]


async def test_what_others_said_while_a_link_was_lost_is_not_delivered_later(bus: TestBus) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()
    await orion.subscribe("mcp.work.orion.>", ear)
    await orion.flush()
    await bus.cut(orion)
    answers = Ear()
    await master.subscribe("mcp.node.orion.>", answers)

    async def nobody_listens() -> bool:
        answers.frames.clear()
        await master.publish(Frame("mcp.work.orion.probe", b"while away", reply="mcp.node.orion.reply.1"))
        await master.flush()
        return [frame.status for frame in answers.frames] == ["503"]

    await soon("the server has noticed", nobody_listens)
    ear.frames.clear()
    await bus.heal(orion)
    await master.publish(Frame("mcp.work.orion.probe", b"back"))
    await ear.hears(1)
    assert ear.bodies == [b"back"]


async def test_a_subscription_closed_while_the_link_is_lost_does_not_come_back(bus: TestBus) -> None:
    orion, master, closed, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear(), Ear()
    subscription = await orion.subscribe("mcp.work.orion.>", closed)
    await orion.subscribe("mcp.work.orion.probe", ear)
    await bus.cut(orion)
    await subscription.close()
    await bus.heal(orion)
    await master.publish(Frame("mcp.work.orion.probe"))
    await ear.hears(1)
    assert closed.frames == []


async def test_everybody_is_back_within_two_seconds_after_the_server_was_killed(bus: TestBus) -> None:
    links = [await bus.connect("agent", "orion"), await bus.connect("agent", "svc"), await bus.connect("master")]
    watches, ear = [Watch(link) for link in links], Ear()
    await links[0].subscribe("mcp.work.orion.>", ear)
    await bus.stop()
    await soon("everybody has noticed", lambda: not any(link.is_connected for link in links), 2.0)
    await bus.start()
    took = time.perf_counter()
    await soon("everybody is back", lambda: all(link.is_connected for link in links), 2.0)
    print(f"back after {time.perf_counter() - took:.2f} s")
    assert [watch.states for watch in watches] == [["lost", "connected"]] * 3
    await links[2].publish(Frame("mcp.work.orion.probe"))
    await ear.hears(1)


# ------------------------------------------------------------------------ the end


async def test_a_closed_link_says_so_once_and_takes_nothing_more(bus: TestBus) -> None:
    orion = await bus.connect("agent", "orion")
    watch = Watch(orion)
    await orion.close()
    await orion.close()
    assert watch.states == ["closed"]
    assert not orion.is_connected
    with pytest.raises(BusUnreachable, match="closed"):
        await orion.publish(Frame("mcp.node.orion.heartbeat"))
    with pytest.raises(BusUnreachable, match="closed"):
        await orion.subscribe("mcp.work.orion.>", Ear())


async def test_what_was_said_before_the_close_is_heard(bus: TestBus) -> None:
    orion, master, ear = await bus.connect("agent", "orion"), await bus.connect("master"), Ear()
    await master.subscribe("mcp.node.orion.>", ear)
    await master.flush()
    for i in range(100):
        await orion.publish(Frame("mcp.node.orion.heartbeat", str(i).encode()))
    await orion.close()
    await ear.hears(100)


async def test_a_link_that_is_closed_while_it_is_lost_stays_closed(bus: TestBus) -> None:
    orion = await bus.connect("agent", "orion")
    watch = Watch(orion)
    await bus.cut(orion)
    await orion.close()
    assert watch.states == ["lost", "closed"]
