"""The agent actor: it registers, beats, answers probes itself, and gives each service's orders to that service's workload."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs

from mcp.actors.actor import Actor, Alarm, Envelope, Unheard, failed_from, handles
from mcp.actors.in_hand import InHand
from mcp.actors.node_state import NodeState
from mcp.bus.codec import from_plain, size_of
from mcp.bus.links import AgentLink, Order
from mcp.model.errors import AdapterError, BusError, MalformedMessage, McpError, Refused
from mcp.model.messages import (
    AbandonWork,
    CommitWorkload,
    ContainerState,
    DescribeImages,
    Done,
    DropWorkload,
    EngineChanged,
    EngineState,
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
    Registered,
    RemoveWorkload,
    RestartWorkload,
    Role,
    RunWorkload,
    ServiceChanged,
    ServiceGone,
    StartWorkload,
    StopWorkload,
    StreamLogs,
    TakeInventory,
)
from mcp.model.names import is_service_name
from mcp.model.ports import EngineEvent
from mcp.model.spec import ServiceSpec
from mcp.model.values import frozen

if TYPE_CHECKING:
    from mcp.actors.agent_logs import LogSender
    from mcp.actors.workload import WorkloadActor

log = logging.getLogger(__name__)

FIRST_LOOK_S = 2.0
"""How long a starting agent waits for its engine before it tells the master that it has not seen it."""

REGISTER_TIMEOUT_S = 5.0
RETRY_FIRST_S = 0.2
RETRY_LAST_S = 10.0
RATE_LIMITED_S = 5.0
COMPLAIN_EVERY_S = 60.0

PART_BYTES = 96 * 1024
"""An inventory larger than this is told in parts; the bus takes 128 KiB."""

SIGN_OF_LIFE_S = 2.0
PULSE_S = 0.25
"""How often whoever ordered something is told what is being done (only when it changed), and at least that it lives."""

LOOK_AGAIN_S = 0.2
"""Events come in bunches: the first is looked at at once, those after it together, this much later."""

BEAT_AGAIN_S = 10.0
"""A change that only heartbeats tell is told at once, but heartbeats come no more often than this."""

SHUTDOWN_S = 30.0
"""A container that ended so shortly before its engine went was stopped by the engine, and comes back with it."""

PAST_KEPT = 1000
DISK_LOW_BYTES = 16 * 1024 * 1024
OPERATIONS_TOLD = 20
DETAIL_LIMIT = 200

Work = (
    PullImages
    | RunWorkload
    | CommitWorkload
    | DropWorkload
    | RemoveWorkload
    | StopWorkload
    | StartWorkload
    | RestartWorkload
)


@frozen(kw_only=True)
class AgentFacts:
    """What an agent says of itself at registration; the incarnation is new at each start."""

    incarnation: str
    role: Role
    address: str
    version: str
    started_at: str
    heartbeat_s: float = 30.0


@frozen
class Beat:
    """Time for a heartbeat."""


class AgentActor(Actor):
    """One node's agent: `run` until cancelled; services go on without it."""

    def __init__(self, facts: AgentFacts, node: NodeState, link: AgentLink) -> None:
        super().__init__(f"the agent of {node.name}")
        self.facts = facts
        self.node = node
        self.version = 0
        """Of the inventory: grows with every change that is told."""
        self.is_registered = asyncio.Event()
        self._link = link
        self._logs: LogSender | None = None
        self._workloads: dict[str, WorkloadActor] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._past: dict[str, int] = {}
        """The highest generation of services of which nothing is left: what comes too late is still refused."""
        self._hands: dict[int, InHand] = {}
        self._is_pulsing = False
        self._epoch = 0
        self._sequence = 0
        self._heartbeat_s = facts.heartbeat_s
        self._beat_alarm = Alarm()
        self._beat_s = 0.0
        self._bus_alarm = Alarm()
        self._telling = asyncio.Lock()
        self._stale: set[str] = set()
        self._has_stale = asyncio.Event()
        self._is_time_to_list = asyncio.Event()
        self._must_settle = True
        self._victims: dict[str, frozenset[str]] | None = None
        self._orphans: tuple[ContainerState, ...] = ()
        self._rebuilt = ""
        self._must_adopt = False
        self._has_left = False

    # ------------------------------------------------------------------------ life

    async def started(self) -> None:
        """Remember, look at the engine, then hear orders: the first thing said is already what is."""
        node, records = self.node, self.node.records
        node.tell = self._tell_service
        node.look_again = self._look_again
        self._epoch = self._link.epoch = await records.highest_epoch()
        self._must_adopt = bool(records.rebuilt_reason)
        await node.ports.load()
        for intent in await records.intents():
            self._workload(intent.service).body.believe(intent)
        await self._look_first()
        self._link.on_back = self._on_bus_back
        self.spawn(self._enter(), name="registration")
        self.spawn(self._beats(), name="heartbeats")
        if node.engine.state != "none":
            node.engine.on_change = self._on_engine_change
            node.engine.on_event = self._on_engine_event
            node.engine.on_followed = self._is_time_to_list.set
            self.spawn(node.engine.watch(), name="engine pings")
            self.spawn(node.engine.follow(), name="engine events")
            self.spawn(self._list_in_time(), name="engine lists")
            self.spawn(self._refresh(), name="engine looks")
        log.info(
            "agent started",
            extra={"node": node.name, "incarnation": self.facts.incarnation, "engine": node.engine.state},
        )

    async def stopped(self) -> None:
        """Say goodbye; services go on."""
        await self.leave()

    async def leave(self) -> None:
        """Say goodbye, once."""
        if self._has_left:
            return
        self._has_left = True
        with suppress(BusError):  # whoever hears no goodbye hears the connection end
            await self._link.event(NodeLeaving(incarnation=self.facts.incarnation, reason="its agent was stopped"))
            await self._link.transport.flush(1.0)

    async def _look_first(self) -> None:
        if self.node.engine.state == "none":
            return
        with suppress(TimeoutError, AdapterError):  # an engine that is away is told, and looked for from now on
            async with asyncio.timeout(FIRST_LOOK_S):
                await self.node.engine.ping()
                if self.node.engine.state == "up":
                    await self._list()

    # ---------------------------------------------------------------- registration

    async def _enter(self) -> None:
        """Hear orders, and register until a master answers; without one, services run on and this goes on trying."""
        pause_s, is_hearing = RETRY_FIRST_S, False
        complained_s = -COMPLAIN_EVERY_S
        while True:
            try:
                if not is_hearing:
                    await self._link.start(self._on_order)
                    is_hearing = True
                await self._register()
            except McpError as error:
                now_s = self.node.clock.monotonic_s()
                if now_s - complained_s >= COMPLAIN_EVERY_S:
                    complained_s = now_s
                    log.warning("not registered yet, trying on: %s", error.reason, extra={"node": self.node.name})
                wait_s = self.node.spread(RATE_LIMITED_S) if error.code == "rate_limited" else self.node.spread(pause_s)
                pause_s = min(2 * pause_s, RETRY_LAST_S)
                await self._bus_alarm.unless_rung(self.node.clock.sleep(wait_s))
            else:
                return

    async def _register(self) -> None:
        answer: Registered | None = None
        for part in await self._inventory():
            answer = await self._link.register(Register(inventory=part), timeout_s=REGISTER_TIMEOUT_S)
        assert answer is not None
        await self._heed(answer.epoch)
        self._heartbeat_s = answer.heartbeat_s
        self._beat_alarm.ring()
        self.is_registered.set()
        log.info("registered", extra={"node": self.node.name, "epoch": answer.epoch, "heartbeat_s": answer.heartbeat_s})
        for entry in answer.remove:
            self._remove(entry, answer.epoch)

    def _remove(self, entry: str, epoch: int) -> None:
        """Carry a removal out that was decided while this node was away."""
        service, _, generation = entry.rpartition("@")
        if not (is_service_name(service) and generation.isascii() and generation.isdigit()):
            log.warning("cannot read what is to be removed: %r", entry[:80])
            return
        order = RemoveWorkload(service=service, generation=int(generation))
        self._workload(service).post(Envelope(order, Unheard(f"remove-{entry}-{epoch}")))

    async def _heed(self, epoch: int) -> None:
        """Obey a newer master, and no older one any more.

        Raises:
            Refused: code stale_epoch.
        """
        if epoch < self._epoch:
            raise Refused(
                "stale_epoch", f"{self.node.name} obeys a newer master (epoch {self._epoch}, this one is {epoch})"
            )
        if epoch > self._epoch:
            self._epoch = epoch
            try:
                await self.node.records.raise_epoch(epoch)
            except AdapterError as error:
                # In memory it counts all the same, and a probe must not fail because a disk is full.
                log.warning("cannot record the master's epoch: %s", error.reason)

    async def _inventory(self) -> list[Inventory]:
        """Return everything this agent knows, in parts that fit the bus."""
        operations = await self.node.records.operations(OPERATIONS_TOLD)
        whole = Inventory(facts=self._facts(), problems=self._problems(), version=self.version)
        rows: list[tuple[str, Any]] = [
            ("services", record) for service in sorted(self._workloads) if (record := self._workloads[service].record())
        ]
        rows += [("orphans", orphan) for orphan in self._orphans]
        # The oldest first: of two ends of one operation the later one is what it came to.
        rows += [("operations", attrs.evolve(o, detail=o.detail[:DETAIL_LIMIT])) for o in reversed(operations)]
        return in_parts(whole, rows)

    def _facts(self) -> NodeFacts:
        host, engine = self.node.host, self.node.engine
        return NodeFacts(
            incarnation=self.facts.incarnation,
            role=self.facts.role,
            address=self.facts.address,
            arch=host.arch,
            version=self.facts.version,
            started_at=self.facts.started_at,
            boot_id=host.boot_id,
            engine=engine.state,
            engine_version=engine.version,
            resources=host.resources(),
        )

    def _problems(self) -> tuple[str, ...]:
        found = [self._rebuilt] if self._rebuilt else []
        free = self.node.host.resources().disk_free_bytes
        if free < DISK_LOW_BYTES:
            found.append(f"disk full: {free // 1024} KiB left for the agent's records; deploys may be refused")
        return tuple(found)

    # ------------------------------------------------------------------ heartbeats

    async def _beats(self) -> None:
        while True:
            self.tell(Beat())
            await self._beat_alarm.unless_rung(self.node.clock.sleep(self._heartbeat_s))

    @handles
    async def on_beat(self, _: Beat) -> None:
        """Beat, from the mailbox: an agent that is stuck beats no more."""
        self._sequence += 1
        self._beat_s = self.node.clock.monotonic_s()
        beat = Heartbeat(
            incarnation=self.facts.incarnation,
            sequence=self._sequence,
            epoch=self._epoch,
            engine=self.node.engine.state,
            resources=self.node.host.resources(),
            containers=sum(len(workload.body.known.containers) for workload in self._workloads.values()),
            inventory_version=self.version,
            clock_s=self.node.clock.wall_s(),
            problems=self._problems(),
        )
        if self.is_registered.is_set():
            with suppress(BusError):  # not connected: the next one, at once after the return, tells the same
                await self._link.heartbeat(beat)

    def _on_bus_back(self) -> None:
        self._bus_alarm.ring()
        self._beat_alarm.ring()

    # ---------------------------------------------------------------------- orders

    def _on_order(self, order: Order) -> None:
        try:
            self.post(Envelope(order.message, order))
        except Refused as error:
            if error.code != "stopping":  # then the connection's end says it
                self.spawn(order.failed(failed_from(error)), name="refusal")

    async def handle(self, envelope: Envelope) -> Any:
        """Take a letter in, unless it is from a master that was deposed."""
        if epoch := getattr(envelope.reply, "epoch", 0):
            self.is_registered.set()  # a master that gives orders knows us, or asks next
            await self._heed(epoch)
        return await super().handle(envelope)

    @handles
    async def on_probe(self, _: Probe) -> ProbeAnswer:
        """Answer at once, whatever else is going on."""
        return ProbeAnswer(
            incarnation=self.facts.incarnation,
            engine=self.node.engine.state,
            inventory_version=self.version,
            busy=tuple(sorted({hand.op for hand in self._hands.values() if hand.op})),
        )

    @handles
    async def on_take_inventory(self, _: TakeInventory, envelope: Envelope) -> Inventory:
        """Tell everything; parts before the last come as progress."""
        *before, last = await self._inventory()
        for part in before:
            await envelope.reply.progress(part)
        return last

    @handles
    async def on_work(self, order: Work, envelope: Envelope) -> Any:
        """Give an order to its service's workload, which answers it."""
        _ = self.node.engine.containers  # refused here where there is no engine
        if not is_service_name(order.service):
            raise Refused("bad_name", f"{order.service[:60]!r} is no name of a service: nothing was done")
        if isinstance(order, DropWorkload | RemoveWorkload):
            self._give_up_runs(order.service, order.generation)
        hand = InHand(envelope.reply, order, self._hands, self.node.clock)
        if not self._is_pulsing:
            self._is_pulsing = True
            self.spawn(self._pulse(), name="signs of life")
        try:
            return self.hand_over(envelope, self._workload(order.service), hand)
        except Refused:
            self._hands.pop(id(hand))
            raise

    def _give_up_runs(self, service: str, generation: int) -> None:
        """Have a run stop waiting for health when its undo is here already."""
        for hand in self._hands.values():
            run = hand.message
            if isinstance(run, RunWorkload) and run.service == service and run.generation <= generation:
                hand.abandon()

    async def _pulse(self) -> None:
        """Tell whoever ordered something what is being done, as long as anything is."""
        while self._hands:
            for hand in list(self._hands.values()):
                await hand.pulse(SIGN_OF_LIFE_S)
            await self.node.clock.sleep(PULSE_S)
        self._is_pulsing = False

    @handles
    async def on_abandon(self, order: AbandonWork) -> Done:
        """Have whoever works on an operation stop at the next safe point."""
        hands = [hand for hand in self._hands.values() if hand.op == order.target_op]
        for hand in hands:
            hand.abandon()
        ended = self._logs is not None and self._logs.grant(order.target_op, 0)
        return Done(changed=bool(hands) or ended)

    @handles
    async def on_describe_images(self, order: DescribeImages, envelope: Envelope) -> Any:
        """Ask the engine (and it the registry) beside the mailbox."""
        self.node.engine.check()
        return self.later(envelope, self._describe(order))

    async def _describe(self, order: DescribeImages) -> ImagesDescribed:
        images = await asyncio.gather(*(self.node.engine.images.describe(image) for image in order.images))
        return ImagesDescribed(images=tuple(images))

    @handles
    async def on_stream_logs(self, order: StreamLogs, envelope: Envelope) -> Any:
        """Send a service's output on this node's log lane, beside the mailbox."""
        _ = self.node.engine.containers  # refused here where there is no engine
        if self._logs is None:
            from mcp.actors.agent_logs import LogSender  # not loaded where nobody reads

            self._logs = LogSender(self.node, self._link)
        return self.later(envelope, self._logs.send(order))

    @handles
    async def on_grant_log_credit(self, order: GrantLogCredit) -> Done:
        """Let a log stream go on, or end it."""
        return Done(changed=self._logs is not None and self._logs.grant(order.stream, order.credit))

    # ------------------------------------------------------------------- workloads

    def _workload(self, service: str) -> WorkloadActor:
        if service not in self._workloads:
            from mcp.actors.workload import WorkloadActor  # a node without an engine has none, and is smaller
            from mcp.model.workload import Known

            known = Known(service=service, highest=self._past.pop(service, 0))
            workload = self._workloads[service] = WorkloadActor(known, self.node)
            self._lives[service] = self.spawn(workload.run(), name=service)
        return self._workloads[service]

    def _dismiss_idle(self) -> None:
        """Let go of actors of which nothing is left, so that names that come and go cost nothing."""
        for service, workload in list(self._workloads.items()):
            if workload.is_idle and workload.told is None:
                del self._workloads[service]
                self._lives.pop(service).cancel()
                self._past[service] = workload.body.known.highest
        while len(self._past) > PAST_KEPT:
            del self._past[next(iter(self._past))]

    async def _tell_service(self, workload: WorkloadActor) -> None:
        """Tell the master what a service is now, if that is news; in the order of the inventory's versions."""
        self._count_orphans()
        record = workload.record()
        if record == workload.told:
            return
        workload.told = record
        self.version += 1
        facts = {"incarnation": self.facts.incarnation, "inventory_version": self.version}
        message = (
            ServiceChanged(record=record, **facts)  # type: ignore[arg-type]
            if record
            else ServiceGone(service=workload.service, **facts)  # type: ignore[arg-type]
        )
        async with self._telling:
            try:
                await self._link.event(message)
            except McpError as error:
                # The next heartbeat shows a version that the master has not, and it asks for everything.
                log.debug("could not tell of %s: %s", workload.service, error.reason)

    def _count_orphans(self) -> None:
        orphans = tuple(orphan for service in sorted(self._workloads) for orphan in self._workloads[service].orphans)
        if orphans != self._orphans:
            self._orphans = orphans
            self.version += 1  # the heartbeat shows it, and the master asks for the inventory
            if self.node.clock.monotonic_s() - self._beat_s >= min(BEAT_AGAIN_S, self._heartbeat_s):
                self._beat_alarm.ring()

    # ---------------------------------------------------------------------- engine

    def _on_engine_change(self, was: EngineState, now: EngineState) -> None:
        engine = self.node.engine
        self.spawn(self._tell_engine(now, engine.reason), name="engine news")
        if was == "up":
            before = self._victims or {}
            self._victims = {
                service: before.get(service, frozenset()) | workload.victims(SHUTDOWN_S)
                for service, workload in self._workloads.items()
            }
        if now == "up":
            self._must_settle = True
            self._is_time_to_list.set()

    async def _tell_engine(self, state: EngineState, reason: str) -> None:
        with suppress(BusError):  # the next heartbeat tells it too
            await self._link.event(EngineChanged(incarnation=self.facts.incarnation, engine=state, reason=reason))

    def _on_engine_event(self, event: EngineEvent) -> None:
        if not is_service_name(event.service):
            return
        workload = self._workload(event.service)
        workload.body.hear(event)
        if not workload.body.is_working:
            self._look_again(event.service)

    def _look_again(self, service: str) -> None:
        self._stale.add(service)
        self._has_stale.set()

    async def _refresh(self) -> None:
        """Look at services whose containers were heard of; one that is being worked on looks for itself."""
        while True:
            await self._has_stale.wait()
            self._has_stale.clear()
            services, self._stale = self._stale, set()
            try:
                for service in sorted(services):
                    await self._look_at(self._workload(service))
            except AdapterError as error:
                self.node.engine.doubt(error)  # when it is back, everything is listed
            self._dismiss_idle()
            if self.node.ports.is_stale:
                with suppress(AdapterError):  # then they stay taken a little longer
                    await self.node.ports.load()
            await self.node.clock.sleep(LOOK_AGAIN_S)

    async def _look_at(self, workload: WorkloadActor) -> None:
        if workload.body.is_working:
            return
        found = await self.node.engine.containers.list(workload.service)
        if not workload.body.is_working:
            workload.body.see(found)
            await self._tell_service(workload)

    async def _list_in_time(self) -> None:
        """List everything when the engine is back, or begins to tell its events."""
        while True:
            await self._is_time_to_list.wait()
            self._is_time_to_list.clear()
            try:
                await self._list()
            except AdapterError as error:
                self.node.engine.doubt(error)
                await self.node.clock.sleep(self.node.spread(1.0))
                if self.node.engine.state == "up":
                    self._is_time_to_list.set()

    async def _list(self) -> None:
        found = await self.node.engine.list_all()
        if self._must_adopt:
            await self._adopt(found)
            self._must_adopt = False
        services: dict[str, list[ContainerState]] = {service: [] for service in self._workloads}
        for container in found:
            services.setdefault(container.service, []).append(container)
        for service, containers in services.items():
            workload = self._workload(service)
            if not workload.body.is_working:
                workload.body.see(containers)
        if self._must_settle:
            self._must_settle = False
            self._settle()
        for workload in list(self._workloads.values()):
            await self._tell_service(workload)

    def _settle(self) -> None:
        """Bring back what should run: everything at boot, after that what the engine took down with it."""
        from mcp.actors.workload import Converge

        victims, self._victims = self._victims, {}
        for service, workload in self._workloads.items():
            is_all = victims is None or workload.owed is not None
            only = None if is_all else (victims or {}).get(service, frozenset())
            if workload.body.known.intents:
                workload.tell(Converge(goal="settle", only=only))

    async def _adopt(self, found: list[ContainerState]) -> None:
        """Make lost records anew from the labels of the containers.

        Raises:
            AdapterError: the engine or the records failed: it is tried again.
        """
        from mcp.model import workload as model

        specs: dict[tuple[str, int], tuple[ServiceSpec, str] | None] = {}
        for container in found:
            key = (container.service, container.generation)
            if key not in specs:
                specs[key] = await self._read_labels(*key)
        read = [(c, *labels) for c in found if (labels := specs[c.service, c.generation])]
        for intent in model.adopt(read):
            mine = [c for c in found if (c.service, c.generation) == (intent.service, intent.generation)]
            await self.node.records.accept(intent, model.ports_of(mine))
            self._workload(intent.service).body.believe(intent)
        await self.node.ports.load()
        if read:
            self._rebuilt = f"state rebuilt from labels: {len(read)} containers ({self.node.records.rebuilt_reason})"
            log.warning(self._rebuilt, extra={"node": self.node.name})

    async def _read_labels(self, service: str, generation: int) -> tuple[ServiceSpec, str] | None:
        from mcp.model.container import OP_LABEL, SPEC_LABEL

        containers = self.node.engine.containers
        text = await containers.label(service, generation, SPEC_LABEL)
        try:
            spec = from_plain(ServiceSpec, json.loads(text))
        except (ValueError, MalformedMessage) as error:
            log.warning(
                "the labels of %s, generation %d, cannot be read, it stays an orphan: %s", service, generation, error
            )
            return None
        return spec, await containers.label(service, generation, OP_LABEL)


def in_parts(whole: Inventory, rows: list[tuple[str, Any]]) -> list[Inventory]:
    """Spread rows (field of the inventory, row) over as many inventories as the bus asks for, in order.

    A row that is too large even alone is left out and told as a problem.
    """
    parts: list[dict[str, list[Any]]] = [{}]
    problems = list(whole.problems)
    base = size = size_of(whole)
    for field, row in rows:
        weight = size_of(row)
        if base + weight > PART_BYTES:
            name = getattr(row, "service", field)
            problems.append(
                f"{name}: its record ({weight // 1024} KiB) is too large to be told: shorten its definition"
            )
            continue
        if size + weight > PART_BYTES:
            parts.append({})
            size = base
        parts[-1].setdefault(field, []).append(row)
        size += weight
    return [
        Inventory(
            facts=whole.facts,
            problems=tuple(problems),
            version=whole.version,
            part=number,
            parts=len(parts),
            **{field: tuple(some) for field, some in part.items()},
        )
        for number, part in enumerate(parts, 1)
    ]
