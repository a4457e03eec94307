"""The master actor on the in-memory bus: real links and frames, agents that answer from a table."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs
import pytest

from mcp.actors import streams
from mcp.actors.master import MasterActor, Welcome, parts_of
from mcp.bus.calls import CallFailed
from mcp.bus.codec import size_of
from mcp.bus.links import AgentLink, JoinLink, MasterLink, OperatorLink, Order
from mcp.bus.memory import MemoryBroker
from mcp.bus.transport import MAX_BODY_BYTES
from mcp.model.commands import Commands
from mcp.model.effects import Tell
from mcp.model.errors import NobodyListens, Refused
from mcp.model.fleet import HealthRules
from mcp.model.master import Master, MasterRules
from mcp.model.messages import (
    CommitWorkload,
    DescribeImages,
    Done,
    Failed,
    GrantLogCredit,
    ImageFacts,
    ImagesDescribed,
    ImagesPulled,
    Inventory,
    Join,
    LogLine,
    LogLines,
    NodeFacts,
    Probe,
    ProbeAnswer,
    PullImages,
    Register,
    Resources,
    RunWorkload,
    ServiceChanged,
    ServiceRecord,
    StreamLogs,
    TakeInventory,
    WorkloadRunning,
)
from mcp.model.operator_messages import (
    DeploymentFinished,
    DeployService,
    FleetStatus,
    FollowLogs,
    FollowOperation,
    GetStatus,
    GrantReaderCredit,
    InviteNode,
    NodeRow,
    OperationAccepted,
    OperationList,
    OperationRow,
    RemoveNode,
    ServiceRow,
)
from mcp.model.ports import Enrolled
from mcp.model.spec import ComponentSpec, ServiceSpec, spec_hash

HAVE = Resources(
    cpu_cores=4.0, memory_bytes=8 << 30, memory_free_bytes=6 << 30, disk_bytes=9 << 30, disk_free_bytes=5 << 30
)
WEB = ServiceSpec(name="web", node="orion", components=(ComponentSpec(name="web", image="web:1"),))


class SystemTime:
    """The loop's own clock."""

    def monotonic_s(self) -> float:
        """Seconds of the loop."""
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        """A fixed start, so that nothing depends on the day."""
        return 1_800_000_000.0 + self.monotonic_s()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


class Numbers:
    """Ids that can be told apart in a failing test."""

    def __init__(self) -> None:
        self._last = 0

    def new_id(self) -> str:
        """op1, op2..."""
        self._last += 1
        return f"op{self._last}"


class MemoryEnrolment:
    """Who may connect, without files."""

    def __init__(self) -> None:
        self.known = {
            "rift": Enrolled(name="rift", role="master", public_key="UR"),
            "orion": Enrolled(name="orion", role="worker", public_key="UO"),
        }
        self.open: dict[str, tuple[str, str]] = {}
        self.settled: list[str] = []

    async def nodes(self) -> list[Enrolled]:
        """All of them."""
        return list(self.known.values())

    async def invite(self, node: str, role: str) -> tuple[str, float]:
        """An invitation with a number for a token."""
        name = f"abcdef{len(self.open):02d}"
        self.open[name] = (node, role)
        return name, 300.0

    async def redeem(self, invitation: str, public_key: str) -> Enrolled:
        """Use it up."""
        if invitation not in self.open:
            raise Refused("invitation_unknown", "this invitation is used, expired or unknown")
        node, role = self.open.pop(invitation)
        self.known[node] = Enrolled(name=node, role=role, public_key=public_key)  # type: ignore[arg-type]
        return self.known[node]

    async def settle(self, node: str) -> None:
        """Remember that it was asked for."""
        self.settled.append(node)

    async def remove(self, node: str) -> None:
        """Forget a node."""
        self.known.pop(node, None)

    async def sweep(self) -> None:
        """Nothing expires here."""


class Agent:
    """An agent that answers from a table, over a real link."""

    def __init__(self, broker: MemoryBroker, name: str) -> None:
        self.name = name
        self.link = AgentLink(broker.connect("agent", name), name, SystemTime())
        self.orders: list[Any] = []
        self.special: dict[type, Callable[[Order], Any]] = {}
        self.services: dict[str, ServiceRecord] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Agent:
        """Hear orders."""
        await self.link.start(self._on_order)
        return self

    def _on_order(self, order: Order) -> None:
        task = asyncio.ensure_future(self._answer(order))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, order: Order) -> None:
        self.orders.append(order.message)
        special = self.special.get(type(order.message))
        reply = await special(order) if special else self._obey(order.message)
        if isinstance(order.message, CommitWorkload):
            changed = ServiceChanged(incarnation="first", inventory_version=1, record=self.services["web"])
            await self.link.event(changed)
        if isinstance(reply, Failed):
            await order.failed(reply)
        elif reply is not None:
            await order.final(reply)

    def _obey(self, message: Any) -> Any:
        match message:
            case TakeInventory():
                return self.inventory()
            case Probe():
                return ProbeAnswer(incarnation="first", engine="up", inventory_version=0)
            case DescribeImages():
                return ImagesDescribed(images=tuple(ImageFacts(image=i, platforms=("amd64",)) for i in message.images))
            case PullImages():
                return ImagesPulled()
            case RunWorkload():
                return WorkloadRunning(record=record(message.spec, message.generation))
            case CommitWorkload():
                self.services["web"] = record(WEB, message.generation)
                return Done()
            case _:
                return Done()

    def inventory(self) -> Inventory:
        """Everything it knows."""
        facts = NodeFacts(
            incarnation="first", role="worker", address="100.64.0.2", arch="amd64", version="0",
            started_at="2026-01-01T00:00:00Z", engine="up", resources=HAVE,
        )  # fmt: skip
        return Inventory(facts=facts, services=tuple(self.services.values()))


def record(spec: ServiceSpec, generation: int) -> ServiceRecord:
    """A service as its node tells of it."""
    return ServiceRecord(
        service=spec.name, generation=generation, spec=spec, spec_hash=spec_hash(spec), desired="running"
    )


@attrs.define
class Fleet:
    """A master, two agents and an operator on one broker."""

    broker: MemoryBroker
    actor: MasterActor
    enrolment: MemoryEnrolment
    rift: Agent
    orion: Agent
    kyle: OperatorLink

    async def ask(self, message: Any, **more: Any) -> Any:
        """Ask as kyle."""
        return await self.kyle.call(message, timeout_s=5.0, idle_s=5.0, **more)

    async def health(self, node: str) -> str:
        """What the master says of a node."""
        status = await self.ask(GetStatus(node=node))
        return str(status.nodes[0].health)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """A running fleet whose census is done."""
    broker, enrolment, clock = MemoryBroker(), MemoryEnrolment(), SystemTime()
    rules = MasterRules(
        node="rift", health=HealthRules(heartbeat_s=10.0), probe_timeout_s=0.5, census_timeout_s=0.5, census_grace_s=0.3
    )
    rift, orion = await Agent(broker, "rift").start(), await Agent(broker, "orion").start()
    actor = MasterActor(
        master=Master(rules=rules, epoch=7),
        link=MasterLink(broker.connect("master"), broker.connect("answers"), clock, 7),
        enrolment=enrolment,
        disconnects=None,
        clock=clock,
        ids=Numbers(),
        welcome=Welcome(ca_pem="PEM", tls_name="mcp-bus"),
    )
    running = asyncio.ensure_future(actor.run())
    await actor.ready.wait()
    kyle = OperatorLink(broker.connect("operator", "kyle"), "kyle")
    await kyle.start()
    made = Fleet(broker, actor, enrolment, rift, orion, kyle)
    async with asyncio.timeout(3.0):
        while (await made.ask(GetStatus())).is_learning:
            await asyncio.sleep(0.01)
    yield made
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_a_deploy_travels_from_the_operator_to_the_agent_and_back(fleet: Fleet) -> None:
    """Accepted at once, progress on the way, the end at the end."""
    frames: list[Any] = []
    end = await fleet.ask(DeployService(spec=WEB), on_frame=frames.append)
    assert end.outcome == "deployed"
    assert isinstance(frames[0].message, OperationAccepted)
    assert frames[0].frame == "accepted"
    assert [type(o).__name__ for o in fleet.orion.orders[-4:]] == [
        "DescribeImages", "PullImages", "RunWorkload", "CommitWorkload",
    ]  # fmt: skip


async def test_the_mailbox_does_not_wait_for_an_agent(fleet: Fleet) -> None:
    """While one pulls for minutes, everybody else is answered."""
    gate = asyncio.Event()

    async def slow(order: Order) -> Any:
        await gate.wait()
        return ImagesPulled()

    fleet.orion.special[PullImages] = slow
    deploy = asyncio.ensure_future(fleet.ask(DeployService(spec=WEB)))
    async with asyncio.timeout(1.0):
        while not (await fleet.ask(GetStatus())).operations:
            await asyncio.sleep(0.01)
    gate.set()
    assert (await deploy).outcome == "deployed"


async def test_an_operation_outlives_whoever_asked_for_it(fleet: Fleet) -> None:
    """A closed laptop ends nothing."""
    gate = asyncio.Event()

    async def slow(order: Order) -> Any:
        await gate.wait()
        return ImagesPulled()

    fleet.orion.special[PullImages] = slow
    accepted: asyncio.Queue[Any] = asyncio.Queue()
    alice = OperatorLink(fleet.broker.connect("operator", "alice"), "alice")
    await alice.start()
    asked = asyncio.ensure_future(
        alice.call(
            DeployService(spec=WEB),
            timeout_s=5.0,
            idle_s=5.0,
            on_frame=lambda letter: accepted.put_nowait(letter.message),
        )
    )
    op = (await accepted.get()).op
    asked.cancel()
    await alice.close()
    gate.set()
    assert (await fleet.ask(FollowOperation(op=op))).outcome == "deployed"


async def test_a_failure_brings_the_agents_own_words(fleet: Fleet) -> None:
    """Not the master's guess at them."""

    async def no(order: Order) -> Any:
        return Failed(code="image_missing", reason="cannot pull web:1 on orion: manifest unknown", hint="Push it.")

    fleet.orion.special[PullImages] = no
    end = await fleet.ask(DeployService(spec=WEB))
    assert (end.outcome, end.code, end.reason) == (
        "undone",
        "image_missing",
        "cannot pull web:1 on orion: manifest unknown",
    )


async def test_an_agent_that_leaves_the_bus_is_unreachable_when_it_is_asked(fleet: Fleet) -> None:
    """Nobody listens: known at once, not after a timeout."""
    await fleet.orion.link.transport.close()
    fleet.actor._on_gone("UO", "Client Closed")  # what the system account would report
    async with asyncio.timeout(1.0):
        while await fleet.health("orion") != "unreachable":
            await asyncio.sleep(0.01)


async def test_a_registration_is_answered_in_the_nodes_own_inbox(fleet: Fleet) -> None:
    """With the master's epoch, which the agent obeys from then on."""
    answer = await fleet.orion.link.register(Register(inventory=fleet.orion.inventory()), timeout_s=2.0)
    assert answer.epoch == 7
    assert "orion" in fleet.enrolment.settled


async def test_a_newcomer_with_an_invitation_is_enrolled_and_heard(fleet: Fleet) -> None:
    """Once."""
    invited = await fleet.ask(InviteNode(node="hyperborea"))
    newcomer = JoinLink(fleet.broker.connect("join", invited.token), invited.token)
    shown = Join(node="", public_key="UH", address="100.64.0.3", arch="arm64", version="0")
    joined = await newcomer.join(shown, timeout_s=2.0)
    assert (joined.node, joined.role, joined.ca_pem) == ("hyperborea", "worker", "PEM")
    agent = await Agent(fleet.broker, "hyperborea").start()
    await agent.link.register(Register(inventory=agent.inventory()), timeout_s=2.0)
    assert await fleet.health("hyperborea") == "healthy"
    with pytest.raises(CallFailed, match="used, expired or unknown"):
        await JoinLink(fleet.broker.connect("join", invited.token), invited.token).join(shown, timeout_s=2.0)


async def test_a_removed_node_leaves_no_ghost(fleet: Fleet) -> None:
    """Neither in the list nor on the bus."""
    await fleet.ask(RemoveNode(node="orion"))
    status = await fleet.ask(GetStatus())
    assert [row.name for row in status.nodes] == ["rift"]
    with pytest.raises(NobodyListens):
        await fleet.orion.link.register(Register(inventory=fleet.orion.inventory()), timeout_s=1.0)


async def test_log_lines_reach_the_reader_and_its_credit_the_agent(fleet: Fleet) -> None:
    """Through the master, who reads none of them."""
    await fleet.ask(DeployService(spec=WEB))
    credits: asyncio.Queue[int] = asyncio.Queue()

    async def stream(order: Order) -> Any:
        line = LogLine(
            at="2026-01-01T00:00:00Z", component="web", container="mcp.web.g1", stream="stdout", text="hello"
        )
        await fleet.orion.link.log(LogLines(stream=order.message.stream, sequence=0, lines=(line,)))
        await credits.get()
        return Done(detail="mcp.web.g1 exited with exit code 0")

    async def credit(order: Order) -> Any:
        credits.put_nowait(order.message.credit)
        return Done()

    fleet.orion.special[StreamLogs] = stream
    fleet.orion.special[GrantLogCredit] = credit
    lines: asyncio.Queue[Any] = asyncio.Queue()
    reading = asyncio.ensure_future(
        fleet.ask(FollowLogs(service="web", follow=True), on_frame=lambda letter: lines.put_nowait(letter.message))
    )
    got = await lines.get()
    assert (got.node, got.lines[0].text) == ("orion", "hello")
    await fleet.ask(GrantReaderCredit(stream=got.stream, credit=8))
    assert (await reading).notes == ("mcp.web.g1 exited with exit code 0",)


async def test_a_reader_hears_at_once_that_the_node_of_its_lines_is_gone(fleet: Fleet) -> None:
    """Even when another agent is there a moment later, and no probe ever found nobody."""
    await fleet.ask(DeployService(spec=WEB))
    asked = asyncio.Event()

    async def stream(_: Order) -> Any:
        asked.set()

    fleet.orion.special[StreamLogs] = stream
    reading = asyncio.ensure_future(fleet.ask(FollowLogs(service="web", follow=True)))
    async with asyncio.timeout(5.0):
        await asked.wait()
    fleet.actor._on_gone("UO", "Client Closed")
    assert (await reading).notes == ("lost orion",)
    assert await fleet.health("orion") == "healthy"


async def test_a_reader_of_silent_containers_hears_that_its_stream_lives(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the loss of its master is seen in seconds, not in a day."""
    monkeypatch.setattr(streams, "ALIVE_S", 0.02)
    await fleet.ask(DeployService(spec=WEB))
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async def stream(_: Order) -> Any:
        for _turn in range(3):
            await heard.get()
        return Done(detail="web ended")

    fleet.orion.special[StreamLogs] = stream
    ended = await fleet.ask(
        FollowLogs(service="web", follow=True), on_frame=lambda letter: heard.put_nowait(letter.message)
    )
    assert ended.notes == ("web ended",)


async def test_a_bug_in_the_master_is_answered_and_the_next_command_is_served(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The control plane outlives one bad event."""

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Commands, "_status", broken)
        with pytest.raises(CallFailed, match="a bug"):
            await fleet.ask(GetStatus())
    assert "could not handle CommandReceived" in caplog.text
    assert await fleet.health("orion") == "healthy"


async def test_an_event_too_large_for_the_bus_ends_nothing(fleet: Fleet) -> None:
    """Its reason is an agent's own words, of any length."""
    fleet.actor._do(
        Tell(
            message=DeploymentFinished(
                op="op1", service="web", kind="deploy", node="orion", outcome="undone", reason="x" * 200_000
            )
        )
    )
    assert await fleet.health("orion") == "healthy"


async def test_a_bug_in_one_effect_ends_nothing_else(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """The control plane outlives it, and says so."""
    fleet.actor._do(Tell(message=object()))
    assert await fleet.health("orion") == "healthy"
    async with asyncio.timeout(3.0):
        while "an effect failed: a bug" not in caplog.text:
            await asyncio.sleep(0.01)
    assert await fleet.health("orion") == "healthy"


def test_a_status_of_any_size_travels_whole_in_parts_that_fit() -> None:
    """Services, nodes, operations and problems alike; thousands of rows in well under a second."""
    services = tuple(
        ServiceRow(
            name=f"s{i}",
            tier="worker",
            node="orion",
            state="failed",
            spec_hash="x",
            generation=1,
            problems=("p" * 200,),
        )
        for i in range(2000)
    )
    nodes = tuple(NodeRow(name=f"n{i}", role="worker", health="healthy", problems=("p" * 300,) * 10) for i in range(64))
    whole = FleetStatus(master="rift", epoch=7, services=services, nodes=nodes, problems=("p" * 200,) * 2000)
    began_s = time.monotonic()
    parts = list(parts_of(whole))
    assert time.monotonic() - began_s < 2.0
    assert [is_last for _, is_last in parts] == [False] * (len(parts) - 1) + [True]
    assert all(size_of(part) < MAX_BODY_BYTES for part, _ in parts)
    for field in ("services", "nodes", "problems"):
        assert tuple(row for part, _ in parts for row in getattr(part, field)) == getattr(whole, field)


def test_a_long_list_of_operations_is_cut_to_what_fits() -> None:
    """The youngest are the first, and nothing is better than all."""
    row = OperationRow(op="a", service="web", kind="deploy", state="ended", reason="r" * 2000)
    ((answer, is_last),) = parts_of(OperationList(operations=(row,) * 200))
    assert is_last
    assert 20 < len(answer.operations) < 200
    assert size_of(answer) < MAX_BODY_BYTES
