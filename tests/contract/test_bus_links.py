"""Who may say what to whom, and who is believed: the links on the bus in memory and on a real nats-server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mcp.bus import links, subjects
from mcp.bus.codec import encode, seal
from mcp.bus.links import AgentLink, JoinLink, MasterLink, Order, Report, Request
from mcp.bus.transport import Frame
from mcp.model.errors import NoAnswer, NotPermitted
from mcp.model.messages import (
    Done,
    EngineChanged,
    Heartbeat,
    ImagesPulled,
    Join,
    Joined,
    LogLines,
    Probe,
    ProbeAnswer,
    PullImages,
    Registered,
    ServiceGone,
)
from mcp.model.operator_messages import GetStatus, OperationStarted, StopService
from tests.builders import heartbeat, register
from tests.contract.bus_fixtures import EPOCH, Ear, TestBus, Watch
from tests.contract.test_bus_calls import LONG_S, answering, ignore
from tests.helpers import soon

NODES = ("orion", "rift", "svc")


class Desk:
    """A master that writes down what it hears, and answers registrations."""

    def __init__(self, link: MasterLink) -> None:
        self.link = link
        self.reports: list[Report] = []
        self.requests: list[Request] = []
        self.could_answer: list[bool] = []
        self.commands: list[Request] = []
        self.joins: list[Request] = []
        self.floods: list[tuple[str, bool]] = []
        self._answer = answering(self._welcome)

    @classmethod
    async def open(cls, bus: TestBus, *nodes: str, **more: Any) -> Desk:
        desk = cls(await bus.master(**more))
        desk.link.on_flood = lambda node, is_flooding: desk.floods.append((node, is_flooding))
        await desk.link.start(desk.commands.append, desk.joins.append)
        for node in nodes:
            await desk.link.watch(node, desk._hear)
        await desk.link.hearing.flush()
        return desk

    def _hear(self, report: Report | Request) -> None:
        if isinstance(report, Request):
            self.requests.append(report)
            self.could_answer.append(report.is_open)
            self._answer(report)
        else:
            self.reports.append(report)

    async def _welcome(self, request: Request) -> None:
        await request.final(Registered(epoch=EPOCH))

    def heard(self, cls: type) -> list[str]:
        return [report.who for report in self.reports if isinstance(report.message, cls)]


async def probed(bus: TestBus, node: str) -> AgentLink:
    """An agent that answers probes with its own name."""

    async def answer(order: Order) -> None:
        await order.final(ProbeAnswer(incarnation=node, engine="up", inventory_version=0))

    link = await bus.agent(node)
    await link.start(answering(answer))
    await link.transport.flush()
    return link


# ----------------------------------------------------------- the usual, both ways


async def test_what_a_node_tells_is_heard_as_its_own(bus: TestBus) -> None:
    desk, orion = await Desk.open(bus, *NODES), await bus.agent("orion")
    await orion.start(answering(ignore))
    assert (await orion.register(register(), timeout_s=LONG_S)).epoch == EPOCH
    await orion.heartbeat(heartbeat())
    await orion.event(EngineChanged(incarnation="first", engine="down"))
    await orion.log(LogLines(stream="s1", sequence=1, node="orion"))
    await soon("all is heard", lambda: len(desk.reports) == 3)
    assert [(report.who, report.kind) for report in desk.reports] == [
        ("orion", "heartbeat"),
        ("orion", "engine_changed"),
        ("orion", "log_lines"),
    ]
    assert [request.who for request in desk.requests] == ["orion"]
    assert not desk.link.dropped


async def test_a_node_that_is_not_watched_is_not_heard(bus: TestBus) -> None:
    desk, orion, svc = await Desk.open(bus, "orion", "svc"), await bus.agent("orion"), await bus.agent("svc")
    await desk.link.unwatch("orion")
    await desk.link.hearing.flush()
    await orion.heartbeat(heartbeat())
    await orion.transport.flush()
    await svc.heartbeat(heartbeat())
    await soon("svc is heard", lambda: desk.heard(Heartbeat) == ["svc"])


async def test_each_node_gets_its_own_orders_in_order_and_its_answers_are_its_own(bus: TestBus) -> None:
    desk = await Desk.open(bus, *NODES)
    for node in NODES:
        await probed(bus, node)
    answers = await asyncio.gather(
        *[
            desk.link.order(node, Probe(), op=f"p{i}", timeout_s=LONG_S, idle_s=LONG_S)
            for i in range(10)
            for node in NODES
        ]
    )
    assert [answer.incarnation for answer in answers] == list(NODES) * 10
    assert not desk.link.strays


async def test_orders_to_one_node_arrive_in_the_order_they_were_given(bus: TestBus) -> None:
    desk, orders = await Desk.open(bus, "orion"), list[Order]()
    orion = await bus.agent("orion")
    await orion.start(orders.append)
    await orion.transport.flush()
    calls = [
        asyncio.ensure_future(desk.link.order("orion", Probe(), op=f"p{i}", timeout_s=LONG_S, idle_s=LONG_S))
        for i in range(50)
    ]
    await soon("all have arrived", lambda: len(orders) == 50)
    assert [order.op for order in orders] == [f"p{i}" for i in range(50)]
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_sealed_order_arrives_and_whoever_watches_the_bus_does_not_see_it(bus: TestBus) -> None:
    desk, ear = await Desk.open(bus, "orion"), Ear()
    watcher = await bus.connect("debug", "watcher")
    await watcher.subscribe("mcp.>", ear)
    await watcher.flush()
    orion = await bus.agent("orion")

    async def pull(order: Order) -> None:
        await order.final(ImagesPulled())

    await orion.start(answering(pull))
    await orion.transport.flush()
    order = PullImages(service="web", images=("secret:1",))
    await desk.link.order("orion", order, op="p1", timeout_s=LONG_S, idle_s=LONG_S, is_sealed=True)
    await ear.hears(1)
    assert [subject.split(".")[:4] for subject in ear.subjects] == [["mcp", "node", "orion", "reply"]]


async def test_operators_hear_what_the_master_tells_everybody(bus: TestBus) -> None:
    desk, ear = await Desk.open(bus), Ear()
    kyle = await bus.connect("operator", "kyle")
    await kyle.subscribe("mcp.event.>", ear)
    await kyle.flush()
    await desk.link.publish(OperationStarted(op="op1", service="web", kind="deploy", operator="alice"))
    (frame,) = await ear.hears(1)
    assert frame.subject == "mcp.event.operation_started"


async def test_a_newcomer_shows_its_key_and_is_known_by_its_invitation_only(bus: TestBus) -> None:
    desk = await Desk.open(bus)
    link = JoinLink(await bus.connect("join", "inv1"), "inv1")
    me = Join(node="rift", public_key="UABC", address="100.64.0.9", arch="amd64", version="0.1")
    joining = asyncio.ensure_future(link.join(me, timeout_s=LONG_S))
    await soon("it is heard", lambda: desk.joins)
    (request,) = desk.joins
    assert (request.who, request.message) == ("inv1", me)
    await request.final(Joined(node="hyperborea", role="worker", ca_pem="", tls_name="mcp-bus", master="rift"))
    assert (await joining).node == "hyperborea"


# ------------------------------------------------------------------------- forgers


async def test_a_node_cannot_answer_an_order_that_was_given_to_another(bus: TestBus) -> None:
    desk, orders = await Desk.open(bus, "orion", "svc"), list[Order]()
    orion, svc = await bus.agent("orion"), await bus.connect("agent", "svc")
    await orion.start(orders.append)
    await orion.transport.flush()
    call = asyncio.ensure_future(desk.link.order("orion", Probe(), op="p1", timeout_s=LONG_S, idle_s=LONG_S))
    await soon("orion has it", lambda: orders)
    watch = Watch(svc)
    forged = ProbeAnswer(incarnation="forged", engine="up", inventory_version=0)
    theirs = orders[0]._reply
    own = theirs.replace("orion", "svc")
    for subject in (theirs, own):
        await svc.publish(seal(subject, forged, op="p1", frame="final"))
    await soon("the bus refused one, nobody waited for the other", lambda: watch.denied and desk.link.strays)
    assert watch.denied == [("publish", theirs)]
    assert not call.done()
    await orders[0].final(ProbeAnswer(incarnation="true", engine="up", inventory_version=0))
    assert (await call).incarnation == "true"


async def test_an_answer_never_goes_where_it_would_be_an_order(bus: TestBus) -> None:
    """The confused deputy: the reply field of a message is not checked by the server (docs/bus.md, traps)."""
    desk, orders = await Desk.open(bus, "orion", "svc"), list[Order]()
    svc = await bus.agent("svc")
    await svc.start(orders.append)
    ears = {"svc": Ear(), "kyle": Ear()}
    await svc.transport.subscribe("_INBOX.agent.svc.>", ears["svc"])
    kyle = await bus.connect("operator", "kyle")
    await kyle.subscribe("_INBOX.cli.kyle.>", ears["kyle"])
    await svc.transport.flush()
    await kyle.flush()
    orion = await bus.connect("agent", "orion")
    aims = (
        "mcp.work.svc.probe",
        "sealed.work.svc.probe",
        "mcp.event.operation_started",
        "mcp.node.svc.reply.p1",
        "_INBOX.agent.svc.1",
        "_INBOX.cli.kyle.1",
        "_INBOX.agent.orionx.1",
    )
    for aim in aims:
        await orion.publish(seal("mcp.node.orion.register", register(), reply=aim))
    await orion.subscribe("_INBOX.agent.orion.>", ear := Ear())
    await orion.publish(seal("mcp.node.orion.register", register(), reply="_INBOX.agent.orion.1"))
    await ear.hears(1)
    assert desk.could_answer == [False] * len(aims) + [True]
    await svc.transport.flush()
    await kyle.flush()
    assert (orders, ears["svc"].frames, ears["kyle"].frames) == ([], [], [])


async def test_the_bus_itself_refuses_an_answer_that_would_be_an_order(bus: TestBus) -> None:
    """Should the check above ever fail, the answering connection still may publish to inboxes only."""
    desk, orders = await Desk.open(bus), list[Order]()
    svc = await bus.agent("svc")
    await svc.start(orders.append)
    await svc.transport.flush()
    watch = Watch(desk.link.answering)
    await desk.link.answer("mcp.work.svc.probe", Done())
    await desk.link.answering.flush()
    await svc.transport.flush()
    assert watch.denied == [("publish", "mcp.work.svc.probe")]
    assert orders == []


async def test_a_name_in_a_body_that_is_not_the_speakers_is_refused(bus: TestBus) -> None:
    desk, orion = await Desk.open(bus, "orion", "svc"), await bus.agent("orion")
    await orion.log(LogLines(stream="s1", sequence=1, node="svc"))
    await orion.log(LogLines(stream="s1", sequence=2, node=""))
    await soon("the honest one is heard", lambda: desk.reports)
    assert [report.message.sequence for report in desk.reports] == [2]
    assert desk.link.dropped == {"out of place from orion": 1}


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("mcp.node.orion.heartbeat", EngineChanged(incarnation="a", engine="up")),
        ("mcp.node.orion.event.engine_changed", ServiceGone(incarnation="a", inventory_version=1, service="web")),
        ("mcp.node.orion.event.engine_changed.more", EngineChanged(incarnation="a", engine="up")),
        ("mcp.node.orion.event", EngineChanged(incarnation="a", engine="up")),
        ("mcp.node.orion.log.s2", LogLines(stream="s1", sequence=1)),
        ("mcp.node.orion.register", heartbeat()),
        ("mcp.node.orion.register", StopService(service="web")),
        ("mcp.node.orion.elsewhere", heartbeat()),
        ("mcp.node.orion.event.operation_started", OperationStarted(op="x", service="y", kind="z", operator="kyle")),
    ],
)
async def test_a_message_that_is_not_what_its_subject_says_is_dropped(
    bus: TestBus, subject: str, message: object
) -> None:
    desk, orion = await Desk.open(bus, "orion"), await bus.connect("agent", "orion")
    await orion.publish(seal(subject, message))
    await orion.publish(Frame("mcp.node.orion.heartbeat", b"rubbish"))
    await soon("both are dropped", lambda: desk.link.dropped["malformed from orion"])
    assert desk.link.dropped == {"out of place from orion": 1, "malformed from orion": 1}
    assert (desk.reports, desk.requests) == ([], [])


async def test_a_command_is_obeyed_only_where_its_subject_says_so(bus: TestBus) -> None:
    """A viewer may publish on mcp.cmd.<viewer>.get_status; what it puts into the body must be that."""
    desk, kyle, ear = await Desk.open(bus), await bus.connect("operator", "kyle"), Ear()
    await kyle.subscribe("_INBOX.cli.kyle.>", ear)
    disguised = seal("mcp.cmd.kyle.get_status", StopService(service="web"), reply="_INBOX.cli.kyle.1")
    await kyle.publish(disguised)
    (answer,) = await ear.hears(1)
    assert answer.headers["Mcp-Frame"] == "error"
    assert desk.commands == []
    await kyle.publish(seal("mcp.cmd.kyle.get_status", GetStatus(), reply="_INBOX.cli.kyle.2"))
    await soon("the honest one is heard", lambda: desk.commands)


async def test_rubbish_from_an_operator_is_answered_for_a_person_waits(bus: TestBus) -> None:
    desk, kyle, ear = await Desk.open(bus), await bus.connect("operator", "kyle"), Ear()
    await kyle.subscribe("_INBOX.cli.kyle.>", ear)
    await kyle.publish(Frame("mcp.cmd.kyle.get_status", b"\xc1", {"Mcp-Kind": "get_status/1"}, "_INBOX.cli.kyle.1"))
    (answer,) = await ear.hears(1)
    assert b"the master cannot read this command" in answer.body
    assert desk.link.dropped == {"malformed from kyle": 1}


@pytest.mark.parametrize(
    "frame",
    [
        Frame("mcp.work.orion.probe", b"\xc1", {"Mcp-Kind": "probe/1"}, "mcp.node.orion.reply.x"),
        seal("mcp.work.orion.probe", heartbeat(), reply="mcp.node.orion.reply.x"),
        seal("mcp.work.orion.pull_images", Probe(), reply="mcp.node.orion.reply.x"),
        seal("mcp.work.orion.probe", Probe()),
        seal("mcp.work.orion.probe", Probe(), reply="mcp.node.svc.reply.x"),
        seal("mcp.work.orion.probe", Probe(), reply="mcp.node.orion.heartbeat"),
        seal("mcp.work.orion.probe", Probe(), reply="_INBOX.cli.kyle.1"),
    ],
    ids=range(7),
)
async def test_an_order_that_is_none_is_dropped_and_counted(bus: TestBus, frame: Frame) -> None:
    master, orders = await bus.connect("master"), list[Order]()
    orion = await bus.agent("orion")
    await orion.start(orders.append)
    await orion.transport.flush()
    await master.publish(frame)
    await soon("it is counted", lambda: orion.dropped.total() == 1)
    assert orders == []


async def test_a_node_that_may_not_speak_there_learns_it_and_its_call_fails(bus: TestBus) -> None:
    stranger = AgentLink(await bus.connect("agent", "orion"), "svc", bus.clock)
    await stranger.start(answering(ignore))
    with pytest.raises(NotPermitted, match=r"mcp\.node\.svc\.register"):
        await stranger.register(register(), timeout_s=LONG_S)


# -------------------------------------------------------------------------- floods


async def test_a_node_that_floods_is_muted_for_a_while_and_nobody_else_suffers(
    bus: TestBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "FLOOD_REST_S", 0.3)
    desk, orion, svc = await Desk.open(bus, "orion", "svc"), await bus.agent("orion"), await probed(bus, "svc")
    await soon("both are heard", lambda: _both_heard(desk, orion, svc))
    for _ in range(5000):
        await orion.heartbeat(heartbeat())
    await soon("it is muted", lambda: ("orion", True) in desk.floods)
    assert desk.heard(Heartbeat).count("orion") < links.FLOOD_BURST + 10
    answer = await desk.link.order("svc", Probe(), op="p1", timeout_s=5.0, idle_s=5.0)
    assert answer.incarnation == "svc"
    await soon("it may speak again", lambda: desk.floods == [("orion", True), ("orion", False)])
    await orion.transport.flush()
    before = desk.heard(Heartbeat).count("orion")
    await desk.link.hearing.flush()
    await orion.heartbeat(heartbeat())
    await soon("it is heard again", lambda: desk.heard(Heartbeat).count("orion") > before)


async def test_an_operator_who_floods_keeps_no_other_from_being_heard(bus: TestBus) -> None:
    """A script that runs away is nobody else's trouble; it is heard again when it has calmed down."""
    desk, kyle, alice = await Desk.open(bus, flood_limit=1000), await bus.operator("kyle"), await bus.operator("alice")
    for _ in range(3000):
        await kyle.tell(GetStatus())
    await kyle.transport.flush()
    await alice.tell(GetStatus())
    await soon("the other is heard", lambda: "alice" in [request.who for request in desk.commands])
    assert [request.who for request in desk.commands].count("kyle") < 3000
    assert desk.link.dropped["too many from kyle"] > 0
    before = len(desk.commands)

    async def is_heard_again() -> bool:
        await kyle.tell(GetStatus())
        return len(desk.commands) > before

    await soon("it is heard again", is_heard_again)


async def _both_heard(desk: Desk, orion: AgentLink, svc: AgentLink) -> bool:
    await orion.heartbeat(heartbeat())
    await svc.heartbeat(heartbeat())
    await orion.transport.flush()
    await svc.transport.flush()
    return {"orion", "svc"} <= set(desk.heard(Heartbeat))


async def test_a_node_that_is_removed_while_it_is_muted_is_not_heard_again(
    bus: TestBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "FLOOD_REST_S", 0.1)
    desk, orion = await Desk.open(bus, "orion"), await bus.agent("orion")
    for _ in range(links.FLOOD_BURST + 1):
        await orion.heartbeat(heartbeat())
    await soon("it is muted", lambda: desk.floods)
    await desk.link.unwatch("orion")
    await soon("nothing is under way any more", lambda: not desk.link._tasks._running)
    heard = len(desk.reports)
    await desk.link.hearing.flush()
    await orion.heartbeat(heartbeat())
    await orion.transport.flush()
    await desk.link.hearing.flush()
    assert len(desk.reports) == heard
    assert desk.floods == [("orion", True)]


async def test_the_mute_of_a_node_whose_answer_is_awaited_ends_the_call_by_its_own_limit(
    bus: TestBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "FLOOD_REST_S", 0.2)
    desk, orders = await Desk.open(bus, "orion"), list[Order]()
    orion = await bus.agent("orion")
    await orion.start(orders.append)
    await orion.transport.flush()
    call = asyncio.ensure_future(desk.link.order("orion", Probe(), op="p1", timeout_s=0.5, idle_s=0.5))
    await soon("orion has it", lambda: orders)
    for _ in range(links.FLOOD_BURST + 1):
        await orion.heartbeat(heartbeat())
    await soon("it is muted", lambda: desk.floods)
    with pytest.raises(NoAnswer, match="it may have been done"):
        await call
    await soon("it may speak again", lambda: ("orion", False) in desk.floods)


def test_what_is_sealed_is_the_same_message_in_another_tree() -> None:
    assert subjects.work("orion", "probe", is_sealed=True) == "sealed.work.orion.probe"
    assert encode(Probe()) == b"\x80"
