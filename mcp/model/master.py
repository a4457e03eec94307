"""The master: events in, effects out. It holds what it believes of the fleet and the operations in hand, and nothing durable."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import attrs
from mcp.model.definition import differences

from mcp.model import deploy, placement, views
from mcp.model.effects import (
    BusBack,
    CommandReceived,
    Effect,
    Event,
    Expel,
    FeedStream,
    FloodChanged,
    Invite,
    NodeDisconnected,
    NodeEnrolled,
    NodeForgotten,
    OpenStream,
    RegisterReceived,
    ReportReceived,
    Say,
    SendWork,
    Started,
    Tell,
    Tick,
    WorkEnded,
    WorkProgressed,
)
from mcp.model.errors import McpError, NoNodeFits, Refused
from mcp.model.fleet import Debt, Fleet, HealthRules, Node, Sign
from mcp.model.messages import (
    AbandonWork,
    CancelOperation,
    DeploymentFinished,
    DeployService,
    Done,
    DropWorkload,
    EngineChanged,
    ExplainNode,
    Failed,
    FleetStatus,
    FollowLogs,
    FollowOperation,
    GetStatus,
    GrantReaderCredit,
    Heartbeat,
    Inventory,
    InviteNode,
    ListOperations,
    NodeHealthChanged,
    NodeLeaving,
    OperationAccepted,
    OperationEnded,
    OperationList,
    OperationProgress,
    OperationRow,
    OperationStarted,
    Plan,
    PlanService,
    Probe,
    ProbeAnswer,
    Register,
    Registered,
    RemoveNode,
    RemoveWorkload,
    RestartService,
    ServiceChanged,
    ServiceGone,
    StartService,
    Step,
    StopService,
    StreamLogs,
    TakeInventory,
    UndeployService,
    Working,
)
from mcp.model.names import is_node_name
from mcp.model.saga import (
    Answer,
    Ended,
    Job,
    Moved,
    Operation,
    Order,
    Out,
    Send,
    failed_from,
)

NewId = Callable[[], str]

OPERATIONS_KEPT = 200
"""Ended operations a master remembers for `mcp op list`."""

KEEPALIVE_S = 1.0
"""How often followers of an operation hear that it lives, so that a CLI notices the loss of its master."""

REJOIN_S = 2.0
"""After the bus was away every node is nobody for up to a second (BUS.md Liveness): twice that before anyone is judged."""

DEBT_RETRY_S = 30.0
"""How often a node that is there and refused an undo is asked again."""


@attrs.frozen(kw_only=True)
class MasterRules:
    """Everything the master may be told by its configuration file."""

    node: str
    internal_zone: str = "svc.mcp.metacircular.net"
    health: HealthRules = attrs.field(factory=HealthRules)
    probe_timeout_s: float = 5.0
    census_timeout_s: float = 3.0
    census_grace_s: float = 2.0
    max_nodes: int = 16
    registrations_per_minute: int = 3
    operation_timeout_s: float = 3600.0
    return_timeout_s: float = 60.0


@attrs.define(kw_only=True)
class Master:
    """`handle` is the only way in; it never raises for what others send, it answers them."""

    rules: MasterRules
    epoch: int
    fleet: Fleet = attrs.field(init=False)
    running: dict[str, Operation] = attrs.field(factory=dict)
    ended: deque[Operation] = attrs.field(factory=lambda: deque(maxlen=OPERATIONS_KEPT))
    _learning: dict[str, float] = attrs.field(factory=dict)
    _calls: dict[str, tuple[str, str]] = attrs.field(factory=dict)
    _debts: dict[str, Debt] = attrs.field(factory=dict)
    _followers: dict[str, set[str]] = attrs.field(factory=dict)
    _askers: dict[str, str] = attrs.field(factory=dict)
    _registrations: dict[str, deque[float]] = attrs.field(factory=dict)
    _wall_offset_s: float = 0.0
    _judge_at_s: float | None = None
    _alive_said_s: float = 0.0
    _debts_asked_s: float = 0.0
    _serial: int = 0

    def __attrs_post_init__(self) -> None:
        self.fleet = Fleet(master=self.rules.node, rules=self.rules.health)

    @property
    def is_learning(self) -> bool:
        """Whether the census is not over: some enrolled node has not been heard or given up on."""
        return bool(self._learning)

    def handle(self, event: Event, *, now_s: float, new_id: NewId) -> list[Effect]:
        """Take one event in and return what is to be done, in order."""
        match event:
            case CommandReceived():
                return self._command(event, now_s, new_id)
            case ReportReceived():
                return self._report(event.node, event.message, now_s)
            case RegisterReceived():
                return self._register(event, now_s)
            case WorkProgressed():
                return self._progress(event, now_s)
            case WorkEnded():
                return self._work_ended(event, now_s)
            case Tick():
                return self._tick(event, now_s)
            case NodeDisconnected():
                return self._disconnected(event, now_s)
            case BusBack():
                self._judge_at_s = now_s + REJOIN_S
                return []
            case NodeEnrolled():
                self._enrol(event.node, event.role, now_s)
                return []
            case NodeForgotten():
                return self._forget(event.node)
            case FloodChanged():
                if node := self.fleet.nodes.get(event.node):
                    node.is_flooding = event.is_flooding
                return []
            case Started():
                return self._start(event, now_s)

    # ------------------------------------------------------------------ census

    def _start(self, event: Started, now_s: float) -> list[Effect]:
        self._wall_offset_s = event.wall_s - now_s
        for name, role in event.nodes:
            self._enrol(name, role, now_s)
            self._learning[name] = now_s
        return [effect for name, _ in event.nodes for effect in self._take_inventory(name)]

    def _enrol(self, name: str, role: Any, now_s: float) -> None:
        if name not in self.fleet.nodes:
            self.fleet.nodes[name] = Node(name=name, role=role, health_since_s=now_s)

    def _take_inventory(self, node: str) -> list[Effect]:
        if ("inventory", node) in self._calls.values():
            return []
        return [self._send("inventory", node, Order(
            node=node,
            message=TakeInventory(),
            idle_s=self.rules.census_timeout_s,
            timeout_s=4 * self.rules.census_timeout_s,
        ))]

    def _learned(self, node: Node, now_s: float) -> list[Effect]:
        """A node's inventory is whole: its unfinished operations can be taken up, its debts be paid."""
        self._learning.pop(node.name, None)
        effects = self._pay_debts(node, now_s)
        for operation in list(self.running.values()):
            effects += self._outs(operation, operation.returned(node.name, now_s), now_s)
        if not self._learning:
            for each in self.fleet.nodes.values():
                effects += self._take_up(each, now_s)
        return effects

    def _take_up(self, node: Node, now_s: float) -> list[Effect]:
        """Go on with what an earlier master began: ask the agent for the same again, then finish or undo."""
        effects: list[Effect] = []
        for record in list(node.services.values()):
            candidate = record.candidate
            owed = any(d.service == record.service and candidate and d.generation >= candidate.generation for d in node.debts)
            if candidate is None or owed or self._holder(record.service):
                continue
            job = Job(
                op=candidate.op, kind="deploy", service=record.service, operator="", fleet=self.fleet,
                spec=candidate.spec, node=node.name, generation=candidate.generation,
            )
            operation = self._operation(job, now_s)
            operation.position = next(i for i, step in enumerate(deploy.DEPLOY) if step.name == "run")
            effects += self._outs(operation, operation.start(now_s), now_s)
        return effects

    # ------------------------------------------------------------ agents report

    def _register(self, event: RegisterReceived, now_s: float) -> list[Effect]:
        node, message = self.fleet.nodes.get(event.node), event.message
        if node is None:
            return [refuse(event.asker, Refused("not_enrolled", f"{event.node} is not enrolled", hint=f"`mcp node invite {event.node}`"))]
        if not isinstance(message, Register):
            return [refuse(event.asker, Refused("unknown_message", "only register is heard here"))]
        inventory = message.inventory
        if inventory.part == 1 and (why := self._too_often(node, inventory, now_s)):
            return [refuse(event.asker, why)]
        if node.facts and node.incarnation != inventory.facts.incarnation:
            if inventory.facts.started_at < node.facts.started_at:
                return [refuse(event.asker, Refused(
                    "stale_incarnation", f"a newer agent of {node.name} has registered (started {node.facts.started_at})"))]
            node.twin = ""
        node.heard(now_s, "registration")
        if not node.take_inventory(inventory, now_s):
            return [self._registered(event.asker)]
        effects = [self._registered(event.asker)]
        effects += self._feel(node, node.take_engine(inventory.facts.engine), now_s, "registered")
        return effects + self._learned(node, now_s)

    def _registered(self, asker: str) -> Effect:
        return Say(asker=asker, frame="final", message=Registered(epoch=self.epoch, heartbeat_s=self.rules.health.heartbeat_s))

    def _too_often(self, node: Node, inventory: Inventory, now_s: float) -> Refused | None:
        limit = self.rules.registrations_per_minute
        recent = self._registrations.setdefault(node.name, deque(maxlen=limit))
        if len(recent) == limit and now_s - recent[0] < 60.0:
            return Refused(
                "rate_limited",
                f"{node.name} registers too often: at most {limit} times a minute",
                hint=f"its agent restarts again and again: `journalctl -u mcp-agent` on {node.name}",
            )
        recent.append(now_s)
        return None

    def _report(self, name: str, message: Any, now_s: float) -> list[Effect]:
        node = self.fleet.nodes.get(name)
        if node is None:
            return []
        if node.facts is None or message.incarnation != node.incarnation:
            return self._from_another(node, message, now_s)
        match message:
            case Heartbeat():
                stale = node.take_heartbeat(message, now_s, now_s + self._wall_offset_s)
                effects = self._feel(node, node.take_engine(message.engine, node.engine_reason), now_s, "heartbeat")
                return effects + (self._take_inventory(name) if stale else [])
            case ServiceChanged() | ServiceGone():
                node.heard(now_s, "event")
                return self._take_inventory(name) if node.take_change(message) else []
            case EngineChanged():
                node.heard(now_s, "event")
                return self._feel(node, node.take_engine(message.engine, message.reason), now_s, message.reason or message.engine)
            case NodeLeaving():
                return self._feel(node, Sign.LEFT, now_s, message.reason or "its agent was stopped")
            case _:
                return []

    def _from_another(self, node: Node, message: Any, now_s: float) -> list[Effect]:
        """Somebody else speaks with this node's credential: an agent we have no inventory of, or a twin."""
        if node.facts is None or not isinstance(message, Heartbeat):
            return self._take_inventory(node.name) if isinstance(message, Heartbeat) else []
        if node.last_seen_by == "heartbeat" and node.last_seen_s is not None and now_s - node.last_seen_s < self.rules.health.silence_limit_s:
            node.twin = message.incarnation
        return self._take_inventory(node.name) if node.health != "healthy" else []

    def _disconnected(self, event: NodeDisconnected, now_s: float) -> list[Effect]:
        node = self.fleet.nodes.get(event.node)
        if node is None:
            return []
        node.feel(Sign.QUIET, now_s, event.reason or "the bus lost its connection")
        return self._probe(node)

    def _feel(self, node: Node, sign: Sign, now_s: float, detail: str) -> list[Effect]:
        was = node.feel(sign, now_s, detail)
        effects: list[Effect] = []
        if was is not None:
            effects.append(Tell(message=NodeHealthChanged(node=node.name, health=node.health, was=was, reason=detail)))
            if node.health in ("healthy", "engine-down") and node.is_known:
                effects += self._pay_debts(node, now_s)
                for operation in list(self.running.values()):
                    effects += self._outs(operation, operation.returned(node.name, now_s), now_s)
        return effects

    def _probe(self, node: Node) -> list[Effect]:
        if node.is_probed:
            return []
        node.is_probed = True
        limit = self.rules.probe_timeout_s
        return [self._send("probe", node.name, Order(node=node.name, message=Probe(), idle_s=limit, timeout_s=limit))]

    # --------------------------------------------------------- the ends of calls

    def _send(self, purpose: str, about: str, order: Order, call: str = "", op: str = "") -> Effect:
        self._serial += 1
        call = call or f"{purpose}-{self.epoch % 100000}-{self._serial}"
        self._calls[call] = (purpose, about)
        return SendWork(
            call=call, node=order.node, message=order.message, op=op or call, timeout_s=order.timeout_s, idle_s=order.idle_s
        )

    def _progress(self, event: WorkProgressed, now_s: float) -> list[Effect]:
        purpose, about = self._calls.get(event.call, ("", ""))
        if purpose == "inventory" and isinstance(event.message, Inventory):
            self.fleet.nodes[about].take_inventory(event.message, now_s)
        elif purpose == "op" and isinstance(event.message, Working) and event.message.detail:
            operation = self.running.get(about)
            if operation:
                return self._outs(operation, operation.progressed(event.call, event.message.detail, now_s), now_s)
        return []

    def _work_ended(self, event: WorkEnded, now_s: float) -> list[Effect]:
        purpose, about = self._calls.pop(event.call, ("", ""))
        if purpose == "op":
            operation = self.running.get(about)
            order = operation.order_of(event.call) if operation else None
            if operation is None or order is None:
                return []
            answer = Answer(order=order, reply=event.reply, failure=event.failure, certainty=event.certainty)
            return self._outs(operation, operation.answered(event.call, answer, now_s), now_s)
        if purpose == "debt":
            self._debt_ended(event, now_s)
            return []
        node = self.fleet.nodes.get(about)
        if node is None:
            return []
        if purpose == "inventory":
            return self._inventory_ended(node, event, now_s)
        return self._probe_ended(node, event, now_s) if purpose == "probe" else []

    def _inventory_ended(self, node: Node, event: WorkEnded, now_s: float) -> list[Effect]:
        if isinstance(event.reply, Inventory):
            if not node.take_inventory(event.reply, now_s):
                return []
            node.heard(now_s, "inventory")
            effects = self._feel(node, node.take_engine(event.reply.facts.engine, node.engine_reason), now_s, "inventory")
            return effects + self._learned(node, now_s)
        began_s = self._learning.get(node.name)
        if began_s is None:
            return []
        if event.is_nobody and now_s - began_s < self.rules.census_grace_s:
            return []  # it may still be reconnecting: the tick asks again
        sign = Sign.NOBODY if event.is_nobody else Sign.NO_ANSWER
        effects = self._feel(node, sign, now_s, event.failure.reason if event.failure else "")
        self._learning.pop(node.name, None)
        if not self._learning:
            for each in self.fleet.nodes.values():
                effects += self._take_up(each, now_s)
        return effects

    def _probe_ended(self, node: Node, event: WorkEnded, now_s: float) -> list[Effect]:
        node.is_probed = False
        if isinstance(event.reply, ProbeAnswer):
            node.heard(now_s, "probe")
            effects = self._feel(node, node.take_engine(event.reply.engine, node.engine_reason), now_s, "answered a probe")
            is_other = event.reply.incarnation != node.incarnation
            if is_other or event.reply.inventory_version > node.inventory_version:
                effects += self._take_inventory(node.name)
            return effects
        if self._judge_at_s is not None:
            return []  # the bus has just come back: the tick asks again when everybody had time to return
        reason = event.failure.reason if event.failure else ""
        return self._feel(node, Sign.NOBODY if event.is_nobody else Sign.NO_ANSWER, now_s, reason)

    # -------------------------------------------------------------------- time

    def _tick(self, event: Tick, now_s: float) -> list[Effect]:
        self._wall_offset_s = event.wall_s - now_s
        effects: list[Effect] = []
        for name in list(self._learning):
            effects += self._take_inventory(name)
        if self._judge_at_s is not None and now_s >= self._judge_at_s:
            since_s, self._judge_at_s = self._judge_at_s - REJOIN_S, None
            for node in self.fleet.nodes.values():
                if node.is_known and (node.last_seen_s or 0.0) <= since_s:
                    effects += self._probe(node)
        for node in self.fleet.overdue(now_s):
            node.feel(Sign.QUIET, now_s, f"no heartbeat for {views.age(now_s - (node.last_seen_s or now_s))}")
            effects += self._probe(node)
        for operation in list(self.running.values()):
            effects += self._outs(operation, operation.tick(now_s), now_s)
        if now_s - self._alive_said_s >= KEEPALIVE_S:
            self._alive_said_s = now_s
            effects += [
                Say(asker=asker, frame="progress", message=OperationProgress(op=op))
                for op in self.running
                for asker in sorted(self._followers.get(op, ()))
            ]
        if now_s - self._debts_asked_s >= DEBT_RETRY_S:
            for node in self.fleet.nodes.values():
                if node.health == "healthy":
                    effects += self._pay_debts(node, now_s)
        return effects

    def _pay_debts(self, node: Node, now_s: float) -> list[Effect]:
        self._debts_asked_s = now_s
        effects: list[Effect] = []
        for debt in node.debts:
            if debt in self._debts.values():
                continue
            kind = DropWorkload if debt.candidate_only else RemoveWorkload
            order = Order(node=node.name, message=kind(service=debt.service, generation=debt.generation))
            effect = self._send("debt", node.name, order)
            assert isinstance(effect, SendWork)
            self._debts[effect.call] = debt
            effects.append(effect)
        return effects

    def _debt_ended(self, event: WorkEnded, now_s: float) -> None:
        debt = self._debts.pop(event.call, None)
        for node in self.fleet.nodes.values():
            if event.failure is None and debt in node.debts:
                node.debts.remove(debt)

    # --------------------------------------------------------------- operations

    def _holder(self, service: str) -> Operation | None:
        """Return the operation that holds a service; plans hold nothing."""
        for operation in self.running.values():
            if operation.job.service == service and operation.job.kind != "plan":
                return operation
        return None

    def _operation(self, job: Job, now_s: float) -> Operation:
        operation = Operation(
            job=job,
            table=deploy.TABLES[job.kind],
            started_s=now_s,
            deadline_s=now_s + self.rules.operation_timeout_s,
            return_timeout_s=self.rules.return_timeout_s,
        )
        self.running[job.op] = operation
        return operation

    def _outs(self, operation: Operation, outs: list[Out], now_s: float) -> list[Effect]:
        """Turn what an operation says into effects: orders, news for its followers, its end."""
        op, effects = operation.job.op, list[Effect]()
        for out in outs:
            match out:
                case Send(call=call, order=order):
                    effects.append(self._send("op", op, order, call=call, op=op))
                case Moved(step=step):
                    effects += self._say_all(op, "progress", OperationProgress(op=op, step=step))
                case Ended():
                    effects += self._end(operation, now_s)
        return effects

    def _say_all(self, op: str, frame: Any, message: Any) -> list[Effect]:
        return [Say(asker=asker, frame=frame, message=message) for asker in sorted(self._followers.get(op, ()))]

    def _end(self, operation: Operation, now_s: float) -> list[Effect]:
        job = operation.job
        del self.running[job.op]
        for name, debt in operation.debts:
            if (node := self.fleet.nodes.get(name)) and debt not in node.debts:
                node.debts.append(debt)
        if job.kind == "plan":
            effects = self._say_all(job.op, "final", self._plan(operation))
            self._followers.pop(job.op, None)
            return effects
        self.ended.append(operation)
        effects = self._say_all(job.op, "final", ended_message(operation))
        self._followers.pop(job.op, None)
        effects.append(Tell(message=DeploymentFinished(
            op=job.op, service=job.service, kind=job.kind, node=job.node, outcome=operation.outcome,
            reason=operation.failure.reason if operation.failure else "",
        )))
        return effects

    # ---------------------------------------------------------------- operators

    def _command(self, event: CommandReceived, now_s: float, new_id: NewId) -> list[Effect]:
        try:
            match event.message:
                case DeployService() | UndeployService() | StopService() | StartService() | RestartService() | PlanService():
                    return self._begin(event, now_s, new_id)
                case GetStatus():
                    return [Say(asker=event.asker, frame="final", message=self._status(event.message, now_s))]
                case ExplainNode():
                    node = self._node(event.message.node)
                    message = views.node_evidence(node, self.fleet, now_s, self._at)
                    return [Say(asker=event.asker, frame="final", message=message)]
                case ListOperations():
                    return [Say(asker=event.asker, frame="final", message=OperationList(operations=self._operations()))]
                case FollowOperation():
                    return self._follow(event.asker, event.message)
                case CancelOperation():
                    return self._cancel(event.asker, event.message.op, now_s)
                case FollowLogs():
                    return self._logs(event)
                case GrantReaderCredit():
                    return [FeedStream(asker=event.asker, operator=event.operator, stream=event.message.stream, credit=event.message.credit)]
                case InviteNode():
                    return self._invite(event.asker, event.message)
                case RemoveNode():
                    return self._remove_node(event.asker, event.message)
                case _:
                    raise Refused("unknown_message", f"this master does not know {type(event.message).__name__}")
        except McpError as error:
            return [refuse(event.asker, error)]

    def _begin(self, event: CommandReceived, now_s: float, new_id: NewId) -> list[Effect]:
        message = event.message
        kind = {
            DeployService: "deploy", UndeployService: "undeploy", StopService: "stop",
            StartService: "start", RestartService: "restart", PlanService: "plan",
        }[type(message)]
        service = message.spec.name if isinstance(message, DeployService | PlanService) else message.service
        if self._learning:
            raise Refused(
                "still_learning",
                f"cannot {kind} {service}: this master has just started and is still asking {', '.join(sorted(self._learning))}",
                hint="Try again in a few seconds.",
            )
        if kind != "plan" and (holder := self._holder(service)):
            by = f" by {holder.job.operator}" if holder.job.operator else ""
            raise Refused(
                "busy",
                f"cannot {kind} {service}: operation {holder.job.op} ({holder.job.kind}{by}) holds it since {self._at(holder.started_s)}",
                hint=f"`mcp op show {holder.job.op}` follows it, `mcp op cancel {holder.job.op}` stops it.",
            )
        job = Job(
            op=new_id(), kind=kind, service=service, operator=event.operator, fleet=self.fleet,
            spec=getattr(message, "spec", None), wanted_node=getattr(message, "node", ""), world=getattr(message, "world", ""),
        )
        operation = self._operation(job, now_s)
        self._followers[job.op] = {event.asker}
        effects: list[Effect] = []
        if kind != "plan":
            effects.append(Say(asker=event.asker, frame="accepted", message=OperationAccepted(op=job.op, service=service, kind=kind)))
            effects.append(Tell(message=OperationStarted(op=job.op, service=service, kind=kind, operator=event.operator)))
        return effects + self._outs(operation, operation.start(now_s), now_s)

    def _plan(self, operation: Operation) -> Plan:
        """Say what a deploy would do, from a plan that has found its node (or has not)."""
        job, spec = operation.job, operation.job.spec
        assert spec is not None
        home = self.fleet.home(job.service)
        record = home[1] if home else None
        unchanged = operation.failure is None and deploy.is_unchanged(job)
        moves = home is not None and home[0].name != job.node and not operation.failure
        changed = differences(record.spec, spec) if record else ()
        steps = () if unchanged or operation.failure else plan_steps(job, home[0].name if home and moves else "")
        failure = operation.failure
        return Plan(
            service=job.service,
            changes=not unchanged and failure is None,
            world=deploy.world_of(job),
            node=job.node,
            can_place=failure is None,
            reason=failure.reason if failure else "",
            hint=failure.hint if failure else "",
            downtime="" if unchanged or failure else deploy.downtime(spec, record),
            steps=steps,
            placement=placement.rows(deploy.wish_of(job), job.images),
            differences=(*changed, *((f"node: {home[0].name} -> {job.node}",) if moves and home else ())),
            warnings=tuple(job.warnings),
        )

    def _follow(self, asker: str, message: FollowOperation) -> list[Effect]:
        if operation := self.running.get(message.op):
            effects: list[Effect] = [
                Say(asker=asker, frame="progress", message=OperationProgress(op=message.op, step=step))
                for step in operation.shown.values()
            ]
            if message.wait:
                self._followers.setdefault(message.op, set()).add(asker)
                return effects
            return [Say(asker=asker, frame="final", message=ended_message(operation))]
        for operation in self.ended:
            if operation.job.op == message.op:
                return [Say(asker=asker, frame="final", message=ended_message(operation))]
        for node in self.fleet.nodes.values():
            for record in node.services.values():
                if record.op == message.op and record.generation > 0:
                    return [Say(asker=asker, frame="final", message=OperationEnded(
                        op=message.op, service=record.service, kind="deploy", node=node.name, outcome="deployed",
                        reason="told by its agent: this master started after the operation",
                    ))]
            if journal := node.operations.get(message.op):
                return [Say(asker=asker, frame="final", message=OperationEnded(
                    op=message.op, service=journal.service, kind=journal.kind, node=node.name, outcome="unknown",
                    reason=f"told by {node.name}: {journal.kind} ended {journal.outcome}: {journal.detail}",
                ))]
        if self._learning:
            raise Refused("still_learning", f"operation {message.op} is not known yet: this master is still asking the agents")
        raise Refused("no_such_operation", f"there is no operation {message.op}", hint="`mcp op list` shows them.")

    def _cancel(self, asker: str, op: str, now_s: float) -> list[Effect]:
        operation = self.running.get(op)
        if operation is None:
            raise Refused("no_such_operation", f"operation {op} is not running", hint="`mcp op list` shows what is.")
        nodes = operation.busy_nodes
        outs = operation.cancel(now_s)
        effects: list[Effect] = [
            self._send("abandon", node, Order(node=node, message=AbandonWork(target_op=op), idle_s=5.0, timeout_s=5.0))
            for node in sorted(nodes)
        ]
        effects.append(Say(asker=asker, frame="final", message=Done(detail=f"{op} is being undone")))
        return effects + self._outs(operation, outs, now_s)

    def _logs(self, event: CommandReceived) -> list[Effect]:
        message = event.message
        copies = self.fleet.where(message.service)
        if not copies:
            if self._learning:
                raise Refused("still_learning", f"cannot read logs of {message.service}: this master is still asking the agents")
            known = ", ".join(self.fleet.service_names()) or "none"
            raise Refused("not_deployed", f"cannot read logs of {message.service}: it is not deployed (deployed: {known})")
        legs = tuple(
            (node.name, StreamLogs(
                stream="", service=message.service, follow=message.follow, tail=message.tail, since_s=message.since_s))
            for node, _ in copies
        )
        return [OpenStream(asker=event.asker, operator=event.operator, legs=legs)]

    def _invite(self, asker: str, message: InviteNode) -> list[Effect]:
        if not is_node_name(message.node):
            raise Refused(
                "bad_name", f"cannot invite {message.node!r}: a node's name is lower-case letters, digits and dashes, at most 32")
        if message.node in self.fleet.nodes:
            raise Refused(
                "name_taken", f"cannot invite {message.node}: a node of that name is enrolled",
                hint=f"`mcp node remove {message.node}` first, if it shall be replaced.")
        if message.role == "master":
            raise Refused("bad_role", "cannot invite a second master: the master's node is made by `mcp init`")
        if len(self.fleet.nodes) >= self.rules.max_nodes:
            raise Refused(
                "limit", f"cannot invite {message.node}: the fleet has {len(self.fleet.nodes)} nodes, the limit is {self.rules.max_nodes}",
                hint="Raise [limits] max_nodes in mcp-master.toml.")
        return [Invite(asker=asker, node=message.node, role=message.role)]

    def _remove_node(self, asker: str, message: RemoveNode) -> list[Effect]:
        node = self._node(message.node)
        if node.name == self.rules.node:
            raise Refused("is_master", f"cannot remove {node.name}: the master lives there")
        if node.services and not message.force:
            raise Refused(
                "has_services",
                f"cannot remove {node.name}: it has {', '.join(sorted(node.services))}",
                hint=f"Move or undeploy them, or `mcp node remove {node.name} --force` to leave them running there unmanaged.",
            )
        if not node.is_known and not message.force and node.health != "unreachable":
            raise Refused("unknown_services", f"cannot remove {node.name}: what it runs is not known yet", hint="Add --force.")
        return [Expel(asker=asker, node=node.name)]

    def _forget(self, name: str) -> list[Effect]:
        self.fleet.nodes.pop(name, None)
        self._learning.pop(name, None)
        self._registrations.pop(name, None)
        return []

    # --------------------------------------------------------------------- views

    def _node(self, name: str) -> Node:
        if name not in self.fleet.nodes:
            known = ", ".join(sorted(self.fleet.nodes)) or "none"
            raise Refused("no_such_node", f"there is no node {name} (enrolled: {known})")
        return self.fleet.nodes[name]

    def _at(self, monotonic_s: float) -> str:
        return views.rfc3339(monotonic_s + self._wall_offset_s)

    def _status(self, question: GetStatus, now_s: float) -> FleetStatus:
        names = [question.service] if question.service else self.fleet.service_names()
        rows = []
        for name in names:
            holder = self._holder(name)
            row = views.service_row(
                name, self.fleet, now_s, zone=self.rules.internal_zone, updating=holder.job.node or "-" if holder else "")
            if row:
                rows.append(row)
        rows += [row for row in views.orphan_rows(self.fleet) if question.service in ("", row.name)]
        if question.service and not rows and not self._learning:
            known = ", ".join(self.fleet.service_names()) or "none"
            raise Refused("not_deployed", f"{question.service} is not deployed (deployed: {known})", hint=f"`mcp deploy {question.service}`")
        nodes = [self._node(question.node)] if question.node else sorted(self.fleet.nodes.values(), key=lambda n: n.name)
        node_rows = tuple(views.node_row(node, self.fleet, now_s, self._at) for node in nodes)
        return FleetStatus(
            master=self.rules.node,
            epoch=self.epoch,
            is_learning=self.is_learning,
            services=tuple(rows),
            nodes=() if question.service else node_rows,
            problems=(*self._own_problems(), *views.problems_of(rows), *(p for row in node_rows for p in row.problems)),
            operations=tuple(views.operation_row(o, self._at) for o in self.running.values() if o.job.kind != "plan"),
        )

    def _own_problems(self) -> list[str]:
        found = []
        if self._learning:
            found.append(f"the master has just started and is still asking {', '.join(sorted(self._learning))}")
        if self.fleet.suspects_itself():
            found.append("most nodes went away at once: the fault is probably here (the bus or the master's network); nothing is moved")
        return found

    def _operations(self) -> tuple[OperationRow, ...]:
        mine = [o for o in self.running.values() if o.job.kind != "plan"] + list(reversed(self.ended))
        rows = [views.operation_row(operation, self._at) for operation in mine]
        known = {row.op for row in rows}
        told = [(node, record) for node in self.fleet.nodes.values() for record in node.operations.values() if record.op not in known]
        told.sort(key=lambda pair: pair[1].ended_at, reverse=True)
        rows += [
            OperationRow(
                op=record.op, service=record.service, kind=record.kind, node=node.name, state="ended",
                outcome=record.outcome, reason=record.detail, ended_at=record.ended_at,
            )
            for node, record in told[:OPERATIONS_KEPT]
        ]
        return tuple(rows[:OPERATIONS_KEPT])


def refuse(asker: str, error: McpError) -> Effect:
    """Answer with an error frame."""
    return Say(asker=asker, frame="error", message=failed_from(error))


def plan_steps(job: Job, moves_from: str) -> tuple[Step, ...]:
    """Return the steps a deploy would take, for a plan."""
    assert job.spec is not None
    local = [facts.image for facts in job.images.get(job.node, {}).values() if facts.is_local]
    details = {
        "pull": "already there" if len(local) == len(job.spec.images) else ", ".join(i for i in job.spec.images if i not in local),
        "run": f"generation {job.generation}: {', '.join(c.name for c in job.spec.components)}",
        "retire": f"the copy on {moves_from}" if moves_from else "the older generation, if there is one",
    }
    return tuple(
        Step(step=name, node=job.node, state="waiting", detail=detail) for name, detail in details.items()
    )


def ended_message(operation: Operation) -> OperationEnded:
    """Return the final frame of an operation (or how it stands, while it runs)."""
    job, failure = operation.job, operation.failure
    return OperationEnded(
        op=job.op,
        service=job.service,
        kind=job.kind,
        node=job.node,
        outcome=operation.outcome,
        reason=failure.reason if failure else job.reason,
        code=failure.code if failure else "",
        hint=failure.hint if failure else "",
        steps=tuple(operation.shown.values()),
        logs=operation.logs,
        leftovers=tuple(operation.leftovers),
        warnings=tuple(job.warnings),
        seconds=round((operation.ended_s or operation.started_s) - operation.started_s, 3),
    )


__all__ = ["Failed", "Master", "MasterRules", "NoNodeFits", "ended_message"]
