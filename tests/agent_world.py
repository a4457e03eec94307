"""A node in a test: an agent on the in-memory bus with every port faked, a master's end to give it orders, and ways to kill it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import attrs

from mcp.actors.agent import AgentActor, AgentFacts
from mcp.actors.node_state import NodeState
from mcp.adapters.fake import Behaviour, FakeClock, FakeEngine, FakeHealthChecks, FakeHost, FakeRecords
from mcp.bus.links import AgentLink, MasterLink, Report, Request
from mcp.bus.memory import MemoryBroker, MemoryTransport
from mcp.model.container import ContainerDefaults
from mcp.model.messages import (
    CommitWorkload,
    ContainerState,
    Failed,
    Register,
    Registered,
    RunWorkload,
    ServiceChanged,
    ServiceGone,
    ServiceRecord,
    WorkloadRunning,
)
from mcp.model.spec import ComponentSpec, HealthSpec, RouteSpec, ServiceSpec, spec_hash
from mcp.wiring import spec_to_text

NODE = "orion"
EPOCH = 7


def component(name: str = "web", image: str = "", **more: Any) -> ComponentSpec:
    """A component with one route, healthy within 5 s, stopped within 4 s."""
    facts: dict[str, Any] = {
        "routes": (RouteSpec(port=8443),), "health": HealthSpec(timeout_s=5.0), "stop_grace_s": 4.0, **more,
    }  # fmt: skip
    return ComponentSpec(name=name, image=image or f"{name}:1", **facts)


def service(*components: ComponentSpec, name: str = "web", **more: Any) -> ServiceSpec:
    """A service of these components, or of one."""
    return ServiceSpec(name=name, components=components or (component(name),), **more)


def run(generation: int, spec: ServiceSpec | None = None) -> RunWorkload:
    """The order to run a generation of a service."""
    made = spec or service()
    return RunWorkload(service=made.name, generation=generation, spec=made, spec_hash=spec_hash(made))


class Death:
    """A process that can be killed before or after any of its calls to the world, as kill -9 does: nothing of it runs on."""

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.points = 0
        self.is_dead = False
        self.happened = asyncio.Event()

    async def point(self) -> None:
        """Pass a point at which the process may die."""
        self.points += 1
        if self.points == self.at:
            self.kill()
        if self.is_dead:
            await asyncio.Event().wait()  # never: the test takes the tasks away

    def kill(self) -> None:
        """Die here."""
        self.is_dead = True
        self.happened.set()


class Mortal:
    """Puts a point of death before and after each coroutine method of a port."""

    def __init__(self, port: Any, death: Death) -> None:
        self._port = port
        self._death = death

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._port, name)
        if not asyncio.iscoroutinefunction(value):
            return value

        async def call(*arguments: Any, **named: Any) -> Any:
            await self._death.point()
            try:
                return await value(*arguments, **named)
            finally:
                await self._death.point()

        return call


@attrs.define(eq=False)
class Life:
    """One life of the agent's process."""

    agent: AgentActor
    death: Death
    transport: MemoryTransport
    task: asyncio.Task[None]

    async def end(self) -> None:
        """Take its tasks away."""
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


class World:
    """One node, its agent's lives, and the master's end of the bus."""

    def __init__(self, *, engine: bool = True, role: str = "worker") -> None:
        self.clock = FakeClock()
        self.broker = MemoryBroker()
        self.engine = FakeEngine(self.clock)
        self.engine.images = {f"{name}:1": Behaviour(is_local=True) for name in ("web", "db", "api")}
        self.host = FakeHost()
        self.records = FakeRecords(self.clock)
        self.records.rebuilt_reason = ""
        self.checks = FakeHealthChecks(self.clock, self.engine)
        self.reports: list[Any] = []
        self.registrations: list[Register] = []
        self.answer: Registered | Failed | None = Registered(epoch=EPOCH)
        """What the master says to a registration; None: nothing."""
        self.lives: list[Life] = []
        self._has_engine = engine
        self._role = role
        self._serial = itertools.count(1)
        self.master: MasterLink

    # ---------------------------------------------------------------------- master

    async def open(self, epoch: int = EPOCH) -> None:
        """Start a master's end."""
        hearing, answering = self.broker.connect("master", "rift"), self.broker.connect("answers", "rift")
        self.master = MasterLink(hearing, answering, self.clock, epoch, flood_limit=10_000)
        await self.master.start(lambda _: None, lambda _: None)
        await self.master.watch(NODE, self._hear)

    def _hear(self, report: Report | Request) -> None:
        if not isinstance(report, Request):
            self.reports.append(report.message)
            return
        self.registrations.append(report.message)
        answer = self.answer
        if answer is not None:
            say = report.failed(answer) if isinstance(answer, Failed) else report.final(answer)
            asyncio.ensure_future(say)  # noqa: RUF006 - done at once on the in-memory bus

    def order(self, message: Any, op: str = "", on_progress: Callable[[Any], None] | None = None) -> asyncio.Task[Any]:
        """Give an order; the task ends with its answer."""
        call = self.master.order(
            NODE, message, op=op or f"op{next(self._serial)}", timeout_s=3600.0, idle_s=3600.0, on_progress=on_progress
        )
        return asyncio.ensure_future(call)

    async def asked(self, message: Any, op: str = "", limit_s: float = 600.0) -> Any:
        """Give an order and return its answer, letting time pass.

        Raises:
            CallFailed: the agent said no.
        """
        return await self.ended(self.order(message, op), limit_s)

    async def ended(self, task: asyncio.Task[Any], limit_s: float = 600.0) -> Any:
        """Let time pass until an order is answered."""
        await self.clock.advance_until(task.done, limit_s)
        return task.result()

    async def deployed(self, generation: int, spec: ServiceSpec | None = None) -> ServiceRecord:
        """Run and commit a generation."""
        order = run(generation, spec)
        answer = await self.asked(order, op=f"deploy{generation}")
        assert isinstance(answer, WorkloadRunning)
        await self.asked(CommitWorkload(service=order.service, generation=generation), op=f"deploy{generation}")
        return answer.record

    def told(self, name: str = "web") -> ServiceRecord | None:
        """Return what the master was told last of a service, by its events."""
        for report in reversed(self.reports):
            if isinstance(report, ServiceChanged) and report.record.service == name:
                return report.record
            if isinstance(report, ServiceGone) and report.service == name:
                return None
        return None

    def heard(self, kind: type) -> list[Any]:
        """Return all reports of a kind."""
        return [report for report in self.reports if isinstance(report, kind)]

    # ----------------------------------------------------------------------- agent

    @property
    def agent(self) -> AgentActor:
        """The agent that lives now."""
        return self.lives[-1].agent

    async def boot(self, die_at: int = 0, *, wait: bool = True) -> Life:
        """Start the agent's process; it dies at the given point, if any."""
        death = Death(die_at)
        transport = self.broker.connect("agent", NODE)
        mortal = Mortal(self.engine, death)
        node = NodeState(
            records=Mortal(self.records, death),
            host=self.host,
            clock=self.clock,
            checks=Mortal(self.checks, death),
            defaults=ContainerDefaults(node=NODE),
            spec_to_text=spec_to_text,
            engine=(mortal, mortal, mortal) if self._has_engine else None,
            port_range=(20_000, 20_999),
            own_paths=("/srv/mcp",),
        )
        facts = AgentFacts(
            incarnation=f"life{len(self.lives) + 1}",
            role=self._role,  # type: ignore[arg-type]
            address="100.64.0.2",
            version="0.1",
            started_at=node.now(),
        )
        agent = AgentActor(facts, node, AgentLink(transport, NODE, self.clock))
        life = Life(agent, death, transport, asyncio.create_task(agent.run()))
        self.lives.append(life)
        if wait:
            await self.clock.advance_until(lambda: agent.is_registered.is_set() or life.death.is_dead)
        return life

    async def kill(self) -> None:
        """Do what kill -9 does to the agent that lives."""
        life = self.lives[-1]
        life.death.kill()
        self.broker.expel(life.transport)
        await life.end()

    # ---------------------------------------------------------------------- engine

    def containers(self) -> dict[str, ContainerState]:
        """Return what really is there."""
        return {state.name: state for state in self.engine._list("")}

    def states(self) -> dict[str, str]:
        """Return the containers that are there, and their states."""
        return {name: state.state for name, state in self.containers().items()}


@asynccontextmanager
async def a_world(**facts: Any) -> AsyncIterator[World]:
    """Give a node with a master and a living agent, and end them."""
    world = World(**facts)
    await world.open()
    await world.boot()
    try:
        yield world
    finally:
        for life in world.lives:
            await life.end()
