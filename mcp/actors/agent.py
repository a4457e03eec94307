"""The agent actor: it registers, beats, answers probes itself, and gives each service's orders to that service's workload."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from contextlib import suppress
from typing import Any

import attrs

from mcp.actors.actor import LATER, Actor, Later, Slot, handles
from mcp.actors.agent_logs import LogSender
from mcp.actors.node_state import NodeState
from mcp.actors.workload import Converge, WorkloadActor
from mcp.bus.calls import CallFailed
from mcp.bus.codec import from_plain, size_of
from mcp.bus.links import AgentLink, Order
from mcp.model.container import SPEC_LABEL
from mcp.model.errors import AdapterError, BusError, McpError
from mcp.model.messages import (
    AbandonWork,
    CommitWorkload,
    DescribeImages,
    Done,
    DropWorkload,
    EngineChanged,
    EngineState,
    Failed,
    GrantLogCredit,
    Heartbeat,
    ImagesDescribed,
    Inventory,
    NodeFacts,
    NodeLeaving,
    Probe,
    ProbeAnswer,
    PullImages,
    Register,
    RemoveWorkload,
    RestartWorkload,
    Role,
    RunWorkload,
    ServiceChanged,
    ServiceGone,
    ServiceRecord,
    StartWorkload,
    StopWorkload,
    StreamLogs,
    TakeInventory,
)
from mcp.model.names import is_service_name
from mcp.model.ports import EngineEvent, Intent
from mcp.model.saga import failed_from
from mcp.model.spec import ServiceSpec
from mcp.model.workload import Found, from_labels

log = logging.getLogger(__name__)

ENGINE_LOOK_S = 5.0
"""How often the engine is asked whether it answers: a frozen one ends no stream."""

REGISTER_TIMEOUT_S = 5.0
FIRST_RETRY_S, LONGEST_RETRY_S = 0.3, 15.0
PART_BYTES = 64 * 1024
"""An inventory larger than this is told in parts."""

SETTLE_S = 0.05
"""Events of a container come in bunches (die, stop, destroy): looked at once, this long after the first."""


@attrs.frozen(kw_only=True)
class AgentFacts:
    """What an agent says of itself at registration."""

    incarnation: str
    role: Role
    address: str
    version: str
    started_at: str
    heartbeat_s: float = 30.0


@attrs.frozen
class _Beat:
    """Time for a heartbeat."""


@attrs.frozen
class _EngineSeen:
    """The engine was looked at, or spoke."""

    state: EngineState
    reason: str = ""
    version: str = ""


@attrs.frozen
class _Look:
    """Something happened to a container of this service."""

    service: str


_WORK = (
    PullImages, RunWorkload, CommitWorkload, DropWorkload, RemoveWorkload, StopWorkload, StartWorkload, RestartWorkload,
)  # fmt: skip


class AgentActor(Actor):
    """One node's agent; `run` it until it is cancelled, then `leave`."""

    def __init__(self, facts: AgentFacts, node: NodeState, link: AgentLink) -> None:
        super().__init__(facts.incarnation and node.name)
        self.facts = facts
        self.node = node
        self.link = link
        self.is_registered = asyncio.Event()
        self.problems: tuple[str, ...] = ()
        self._workloads: dict[str, WorkloadActor] = {}
        self._sequence = 0
        self._heartbeat_s = facts.heartbeat_s
        self._engine_version = ""
        self._looking: set[str] = set()
        self._beat_now = asyncio.Event()
        self._logs = LogSender(node, link)
        self._jitter = random.Random(facts.incarnation)  # noqa: S311 - spreads retries, no secret

    # -------------------------------------------------------------------- life

    async def on_start(self) -> None:
        """Bring the node up: records, engine, services, then the master."""
        self.link.epoch = await self.node.records.highest_epoch()
        self.link.on_back = self._on_bus_back
        self.node.on_change = self._on_change
        await self._remember_or_rebuild()
        await self.link.start(self._on_order)
        self.spawn(self._beats(), name="heartbeats")
        self.spawn(self._register(), name="registration")
        if self.node.engine_state != "none":
            self.spawn(self._hear_engine(), name="engine events")
            self.spawn(self._look_at_engine(), name="engine looks")
        log.info("agent started", extra={"node": self.node.name, "incarnation": self.facts.incarnation})

    async def leave(self) -> None:
        """Say goodbye; services go on."""
        with suppress(BusError):  # whoever hears no goodbye hears the connection end
            await self.link.event(NodeLeaving(incarnation=self.facts.incarnation, reason="its agent was stopped"))
            await self.link.transport.flush(1.0)

    async def _remember_or_rebuild(self) -> None:
        await self.node.load()
        if self.node.engine_state == "none":
            return
        try:
            facts = await self.node.containers().facts()
            self._engine_version = facts.version
            self.node.engine_state = "up"
            if not self.node.intents:
                await self._rebuild()
            await self.node.refresh_all()
        except AdapterError as error:
            log.warning("the engine does not answer yet: %s", error.reason)
        for service in list(self.node.intents):
            self._workload(service).tell(Converge())

    async def _rebuild(self) -> None:
        """Without records, the labels of the containers tell what was accepted."""
        containers = await self.node.containers().list()
        found = {
            (c.service, c.generation): Found(
                service=c.service, generation=c.generation, op="", spec_hash=c.spec_hash,
                is_running=any(o.state == "running" for o in containers if (o.service, o.generation) == (c.service, c.generation)),
            )
            for c in containers
        }  # fmt: skip
        rebuilt = 0
        for each, is_candidate in from_labels(list(found.values())):
            spec = await self._spec_from_labels(each)
            if spec is None:
                continue
            await self.node.accept(
                Intent(
                    service=each.service, op=each.op or "rebuilt", generation=each.generation, spec=spec,
                    spec_hash=each.spec_hash, desired="running" if each.is_running else "stopped", is_candidate=is_candidate,
                ),
                _ports_in(c for c in containers if (c.service, c.generation) == (each.service, each.generation)),
            )  # fmt: skip
            rebuilt += 1
        if rebuilt:
            self.problems = (f"state rebuilt from labels: {len(containers)} containers of {rebuilt} services",)
            log.warning("state rebuilt from labels", extra={"containers": len(containers), "services": rebuilt})

    async def _spec_from_labels(self, found: Found) -> ServiceSpec | None:
        text = await self.node.containers().label(found.service, found.generation, SPEC_LABEL)
        try:
            return from_plain(ServiceSpec, json.loads(text))  # type: ignore[no-any-return]
        except (ValueError, McpError) as error:
            log.warning("labels of %s cannot be read: %s", found.service, error)
            return None

    # ---------------------------------------------------------------- registry

    def inventory(self) -> list[Inventory]:
        """Return everything this agent knows, in parts that fit the bus."""
        whole = Inventory(
            facts=self._node_facts(),
            orphans=self.node.orphans[:100],
            problems=self.problems,
            version=self.node.version,
        )
        groups: list[list[ServiceRecord]] = [[]]
        size = size_of(whole)
        for record in self.node.told.values():
            more = size_of(record_message(self.facts.incarnation, self.node.version, record))
            if groups[-1] and size + more > PART_BYTES:
                groups.append([])
                size = size_of(whole)
            groups[-1].append(record)
            size += more
        return [
            attrs.evolve(whole, services=tuple(group), part=i + 1, parts=len(groups)) for i, group in enumerate(groups)
        ]

    def _node_facts(self) -> NodeFacts:
        return NodeFacts(
            incarnation=self.facts.incarnation,
            role=self.facts.role,
            address=self.facts.address,
            arch=self.node.host.arch,
            version=self.facts.version,
            started_at=self.facts.started_at,
            boot_id=self.node.host.boot_id,
            engine=self.node.engine_state,
            engine_version=self._engine_version,
            resources=self.node.host.resources(),
        )

    async def _register(self) -> None:
        """Register until a master answers; without one, services run on and this goes on trying."""
        attempt = 0
        while True:
            try:
                for part in await self._whole_inventory():
                    answer = await self.link.register(Register(inventory=part), timeout_s=REGISTER_TIMEOUT_S)
                await self.node.records.raise_epoch(answer.epoch)
                self._heartbeat_s = answer.heartbeat_s
                self.is_registered.set()
                self._beat_now.set()
                log.info("registered", extra={"node": self.node.name, "epoch": answer.epoch})
                return
            except (CallFailed, BusError, AdapterError) as error:
                level = logging.WARNING if attempt in (0, 10) or attempt % 100 == 99 else logging.DEBUG
                log.log(level, "not registered yet: %s", error.reason)
                slow = isinstance(error, CallFailed) and error.code == "rate_limited"
            base = LONGEST_RETRY_S if slow else min(LONGEST_RETRY_S, FIRST_RETRY_S * 2**min(attempt, 10))
            await self.node.clock.sleep(base * self._jitter.uniform(0.5, 1.0))
            attempt += 1

    async def _whole_inventory(self) -> list[Inventory]:
        operations = tuple(await self.node.records.operations(20))
        parts = self.inventory()
        return [*parts[:-1], attrs.evolve(parts[-1], operations=operations)]

    async def _beats(self) -> None:
        while True:
            self._beat_now.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._beat_now.wait()
            self.tell(_Beat())

    def _on_bus_back(self) -> None:
        self._beat_now.set()

    @handles
    async def on_beat(self, _: _Beat) -> Later:
        """Beat, from the mailbox: an agent that is stuck beats no more."""
        self._sequence += 1
        beat = Heartbeat(
            incarnation=self.facts.incarnation,
            sequence=self._sequence,
            epoch=self.link.epoch,
            engine=self.node.engine_state,
            resources=self.node.host.resources(),
            containers=sum(len(record.containers) for record in self.node.told.values()),
            inventory_version=self.node.version,
            clock_s=self.node.clock.wall_s(),
            problems=self.problems,
        )
        with suppress(BusError):  # not connected: the next one tells the same
            await self.link.heartbeat(beat)
        return LATER

    # ------------------------------------------------------------------ orders

    def _on_order(self, order: Order) -> None:
        if isinstance(order.message, _WORK):
            self._give(order)
        else:
            self.tell(order.message, order)

    def _give(self, order: Order) -> None:
        service = order.message.service
        if not is_service_name(service):
            self.spawn(order.failed(Failed(code="bad_name", reason=f"{service[:60]!r} is no service name")))
            return
        self.spawn(self._obey_epoch(order.epoch))
        self._workload(service).tell(order.message, order)

    async def _obey_epoch(self, epoch: int) -> None:
        with suppress(AdapterError):  # a full disk; the epoch in memory is what counts while we live
            await self.node.records.raise_epoch(epoch)

    def _workload(self, service: str) -> WorkloadActor:
        if service not in self._workloads:
            actor = self._workloads[service] = WorkloadActor(service, self.node)
            self.spawn(actor.run(), name=f"workload {service}")
        return self._workloads[service]

    @handles
    async def on_probe(self, _: Probe) -> ProbeAnswer:
        """Answer at once, whatever else is going on."""
        busy = tuple(actor.current.op for actor in self._workloads.values() if actor.current and actor.current.op)
        return ProbeAnswer(
            incarnation=self.facts.incarnation,
            engine=self.node.engine_state,
            inventory_version=self.node.version,
            busy=busy,
        )

    @handles
    async def on_take_inventory(self, _: TakeInventory) -> Inventory:
        """Tell everything; parts before the last as progress."""
        parts = await self._whole_inventory()
        slot = self.current.slot if self.current else None
        for part in parts[:-1]:
            if slot:
                await slot.progress(part)
        self.is_registered.set()
        return parts[-1]

    @handles
    async def on_describe_images(self, order: DescribeImages) -> Later:
        """Ask the engine (and it the registry) beside the mailbox."""
        assert self.current is not None
        self.spawn(self._describe(order, self.current.slot))
        return LATER

    async def _describe(self, order: DescribeImages, slot: Slot | None) -> None:
        if slot is None:
            return
        try:
            images = self.node.images()
            found = [await images.describe(image) for image in order.images]
        except McpError as error:
            await slot.failed(failed_from(error))
        else:
            await slot.final(ImagesDescribed(images=tuple(found)))

    @handles
    async def on_abandon_work(self, order: AbandonWork) -> Done:
        """Have whoever works on an operation stop at the next safe point."""
        for actor in self._workloads.values():
            if actor.current and actor.current.op == order.target_op:
                actor.abandon(order.target_op)
                return Done()
        return Done(changed=False)

    @handles
    async def on_stream_logs(self, order: StreamLogs) -> Later:
        """Send a service's output on this node's log lane, beside the mailbox."""
        assert self.current is not None
        if self.current.slot:
            self.spawn(self._logs.send(order, self.current.slot))
        return LATER

    @handles
    async def on_grant_log_credit(self, order: GrantLogCredit) -> Done:
        """Let a log stream go on (or end it)."""
        return Done(changed=self._logs.grant(order.stream, order.credit))

    # ------------------------------------------------------------------ engine

    async def _hear_engine(self) -> None:
        async for event in self.node.output().events():
            self._on_engine_event(event)

    def _on_engine_event(self, event: EngineEvent) -> None:
        if event.action == "engine-up":
            self.tell(_EngineSeen("up"))
        elif event.action == "engine-down":
            self.tell(_EngineSeen("down", event.detail))
        elif event.service not in self._looking:
            self._looking.add(event.service)
            self.spawn(self._look_soon(event.service))

    async def _look_soon(self, service: str) -> None:
        await self.node.clock.sleep(SETTLE_S)
        self._looking.discard(service)
        self.tell(_Look(service))

    async def _look_at_engine(self) -> None:
        while True:
            await self.node.clock.sleep(ENGINE_LOOK_S)
            try:
                facts = await self.node.containers().facts()
                self.tell(_EngineSeen("up", version=facts.version))
            except AdapterError as error:
                self.tell(_EngineSeen("frozen" if error.code == "engine_frozen" else "down", error.reason))

    @handles
    async def on_engine_seen(self, seen: _EngineSeen) -> Later:
        """Tell when the engine came, went or froze; when it is back, bring back what should run."""
        was = self.node.engine_state
        if seen.version:
            self._engine_version = seen.version
        if seen.state == was:
            return LATER
        self.node.engine_state = seen.state
        log.warning("engine changed", extra={"was": was, "now": seen.state, "reason": seen.reason})
        with suppress(BusError):  # a heartbeat tells it too
            changed = EngineChanged(incarnation=self.facts.incarnation, engine=seen.state, reason=seen.reason)
            await self.link.event(changed)
        if seen.state == "up":
            self.spawn(self._engine_is_back())
        return LATER

    async def _engine_is_back(self) -> None:
        if not self.node.intents:
            with suppress(AdapterError):  # gone again: the next time
                await self._rebuild()
        await self.node.refresh_all()
        for service in list(self.node.intents):
            self._workload(service).tell(Converge())

    @handles
    async def on_look(self, look: _Look) -> Later:
        """Look at a service whose containers were heard of; a workload that works on it looks by itself."""
        actor = self._workloads.get(look.service)
        if actor is None or not actor.is_busy:
            self.spawn(self.node.refresh(look.service))
        return LATER

    # ------------------------------------------------------------------ telling

    def _on_change(self, service: str, record: ServiceRecord | None) -> None:
        version = self.node.version
        if record is None:
            message: Any = ServiceGone(incarnation=self.facts.incarnation, inventory_version=version, service=service)
        else:
            message = record_message(self.facts.incarnation, version, record)
        self.spawn(self._tell_master(message))

    async def _tell_master(self, message: Any) -> None:
        with suppress(BusError):  # the heartbeat's inventory version tells that something was missed
            await self.link.event(message)


def record_message(incarnation: str, version: int, record: ServiceRecord) -> ServiceChanged:
    """Return the event that tells of a service."""
    return ServiceChanged(incarnation=incarnation, inventory_version=version, record=record)


def _ports_in(containers: Any) -> dict[tuple[str, str], int]:
    ports = {}
    for container in containers:
        for route, address in container.ports.items():
            tail = address.rpartition(":")[2]
            if tail.isdigit():
                ports[container.component, route] = int(tail)
    return ports



