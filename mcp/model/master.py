"""The master: events in, effects out. It holds what it believes of the fleet and the operations in hand, and nothing durable."""

from __future__ import annotations

from collections import deque
from typing import Any

import attrs

from mcp.model import hearsay, views
from mcp.model.commands import Commands, NewId, refuse
from mcp.model.effects import (
    BusBack,
    CommandReceived,
    Effect,
    Event,
    FloodChanged,
    NodeDisconnected,
    NodeEnrolled,
    NodeForgotten,
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
from mcp.model.errors import Refused
from mcp.model.fleet import Debt, Fleet, HealthRules, Node, Sign
from mcp.model.messages import (
    DropWorkload,
    EngineChanged,
    Heartbeat,
    Inventory,
    NodeLeaving,
    Probe,
    ProbeAnswer,
    Register,
    Registered,
    RemoveWorkload,
    ServiceChanged,
    ServiceGone,
    TakeInventory,
    Working,
)
from mcp.model.operations import Desk
from mcp.model.operator_messages import NodeHealthChanged
from mcp.model.saga import (
    Job,
    Order,
)

REJOIN_S = 2.0
"""After the bus was away every node is nobody for up to a second (docs/bus.md Liveness): twice that before anyone is judged."""

CLOCK_STEP_S = 0.5
"""The wall clock has stepped when it and the monotonic one drift apart by more than this between two looks."""

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
    registrations_per_minute: int = 12
    operation_timeout_s: float = 3600.0
    return_timeout_s: float = 60.0


@attrs.define(kw_only=True)
class Master:
    """`handle` is the only way in; it never raises for what others send, it answers them."""

    rules: MasterRules
    epoch: int
    fleet: Fleet = attrs.field(init=False)
    desk: Desk = attrs.field(init=False)
    learning: dict[str, float] = attrs.field(factory=dict)
    """Nodes that the census has not heard yet, and since when it asks."""
    _commands: Commands = attrs.field(init=False)
    _calls: dict[str, tuple[str, str]] = attrs.field(factory=dict)
    _debts: dict[str, tuple[str, Debt]] = attrs.field(factory=dict)
    _registrations: dict[str, deque[float]] = attrs.field(factory=dict)
    _wall_offset_s: float = 0.0
    _judge_at_s: float | None = None
    _debts_asked_s: float = 0.0
    _serial: int = 0

    def __attrs_post_init__(self) -> None:
        self.fleet = Fleet(master=self.rules.node, rules=self.rules.health)
        self.desk = Desk(
            fleet=self.fleet,
            send=lambda op, order, call: self.send("op", op, order, call=call, op=op),
            plan_of=lambda operation: self._commands.plan(operation),  # noqa: PLW0108 - it is made below
            timeout_s=self.rules.operation_timeout_s,
            return_timeout_s=self.rules.return_timeout_s,
        )
        self._commands = Commands(self, self.desk)

    @property
    def node(self) -> str:
        """The node the master lives on."""
        return self.rules.node

    @property
    def internal_zone(self) -> str:
        """The zone of internal names."""
        return self.rules.internal_zone

    @property
    def max_nodes(self) -> int:
        """How many nodes may be enrolled."""
        return self.rules.max_nodes

    def _keep_time(self, offset_s: float) -> None:
        """Follow a wall clock that was set, but not its jitter: a time that was shown once stays the same."""
        if abs(offset_s - self._wall_offset_s) > CLOCK_STEP_S:
            self._wall_offset_s = offset_s

    def at(self, monotonic_s: float) -> str:
        """Write one of the master's times for people."""
        return views.rfc3339(monotonic_s + self._wall_offset_s)

    @property
    def is_learning(self) -> bool:
        """Whether the census is not over: some enrolled node has not been heard or given up on."""
        return bool(self.learning)

    def handle(self, event: Event, *, now_s: float, new_id: NewId) -> list[Effect]:
        """Take one event in and return what is to be done, in order."""
        match event:
            case CommandReceived():
                return self._commands.answer(event, now_s, new_id)
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
                return self._forget(event.node, now_s)
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
            self.learning[name] = now_s
        return [effect for name, _ in event.nodes for effect in self._take_inventory(name)]

    def _enrol(self, name: str, role: Any, now_s: float) -> None:
        if name not in self.fleet.nodes:
            self.fleet.nodes[name] = Node(name=name, role=role, health_since_s=now_s)

    def _take_inventory(self, node: str) -> list[Effect]:
        if ("inventory", node) in self._calls.values():
            return []
        return [
            self.send(
                "inventory",
                node,
                Order(
                    node=node,
                    message=TakeInventory(),
                    idle_s=self.rules.census_timeout_s,
                    timeout_s=4 * self.rules.census_timeout_s,
                ),
            )
        ]

    def _learned(self, node: Node, now_s: float, *, is_new: bool = False) -> list[Effect]:
        """A node's inventory is whole: its unfinished operations can be taken up, its debts be paid."""
        self.learning.pop(node.name, None)
        effects = self._pay_debts(node, now_s) + self.desk.returned(node, now_s, is_new=is_new)
        if not self.learning:
            for each in self.fleet.nodes.values():
                effects += self._take_up(each, now_s)
        return effects

    def _take_up(self, node: Node, now_s: float) -> list[Effect]:
        """Go on with what an earlier master began: ask the agent for the same again, then finish or undo."""
        effects: list[Effect] = []
        for record in list(node.services.values()):
            candidate = record.candidate
            owed = any(
                d.service == record.service and candidate and d.generation >= candidate.generation for d in node.debts
            )
            if candidate is None or owed or self.desk.holder(record.service):
                continue
            job = Job(
                op=candidate.op,
                kind="deploy",
                service=record.service,
                operator="",
                fleet=self.fleet,
                spec=candidate.spec,
                node=node.name,
                generation=candidate.generation,
            )
            effects += self.desk.begin(job, now_s, first_step="run")
        return effects

    # ------------------------------------------------------------ agents report

    def _register(self, event: RegisterReceived, now_s: float) -> list[Effect]:
        node, message = self.fleet.nodes.get(event.node), event.message
        if node is None:
            return [
                refuse(
                    event.asker,
                    Refused(
                        "not_enrolled",
                        f"{event.node} is not enrolled",
                        hint=f"`mcp node invite {event.node}`",
                    ),
                )
            ]
        if not isinstance(message, Register):
            return [refuse(event.asker, Refused("unknown_message", "only register is heard here"))]
        inventory = message.inventory
        if inventory.part == 1 and (why := self._too_often(node, inventory, now_s)):
            return [refuse(event.asker, why)]
        if node.facts and node.incarnation != inventory.facts.incarnation:
            # Of one that is gone, the time of its start proves nothing: a clock may have been set back meanwhile.
            if inventory.facts.started_at < node.facts.started_at and node.health in ("healthy", "engine-down"):
                return [
                    refuse(
                        event.asker,
                        Refused(
                            "stale_incarnation",
                            f"a newer agent of {node.name} has registered (started {node.facts.started_at})",
                        ),
                    )
                ]
            node.twin = ""
        node.heard(now_s, "registration")
        was = node.incarnation
        if not node.take_inventory(inventory, now_s):
            return [self._registered(event.asker)]
        effects = [self._registered(event.asker)]
        effects += self._feel(node, node.take_engine(inventory.facts.engine), now_s, "registered")
        return effects + self._learned(node, now_s, is_new=was not in ("", node.incarnation))

    def _registered(self, asker: str) -> Effect:
        return Say(
            asker=asker,
            frame="final",
            message=Registered(epoch=self.epoch, heartbeat_s=self.rules.health.heartbeat_s),
        )

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
                # A lost bus, or a pause of this agent, may have cost an answer without anything else to show for it.
                effects += self.desk.returned(node, now_s)
                return effects + (self._take_inventory(name) if stale else [])
            case ServiceChanged() | ServiceGone():
                node.heard(now_s, "event")
                return self._take_inventory(name) if node.take_change(message) else []
            case EngineChanged():
                node.heard(now_s, "event")
                return self._feel(
                    node,
                    node.take_engine(message.engine, message.reason),
                    now_s,
                    message.reason or message.engine,
                )
            case NodeLeaving():
                return self._feel(node, Sign.LEFT, now_s, message.reason or "its agent was stopped")
            case _:
                return []

    def _from_another(self, node: Node, message: Any, now_s: float) -> list[Effect]:
        """Somebody else speaks with this node's credential: an agent we have no inventory of, or a twin."""
        if node.facts is None or not isinstance(message, Heartbeat):
            return self._take_inventory(node.name) if isinstance(message, Heartbeat) else []
        if (
            node.last_seen_by == "heartbeat"
            and node.last_seen_s is not None
            and now_s - node.last_seen_s < self.rules.health.silence_limit_s
        ):
            node.twin = message.incarnation[: hearsay.WORD_MOST]
        return self._take_inventory(node.name) if node.health != "healthy" else []

    def _disconnected(self, event: NodeDisconnected, now_s: float) -> list[Effect]:
        node = self.fleet.nodes.get(event.node)
        if node is None:
            return []
        node.feel(Sign.QUIET, now_s, event.reason or "the bus lost its connection")
        return self._probe(node)

    def _feel(self, node: Node, sign: Sign, now_s: float, detail: str) -> list[Effect]:
        detail = hearsay.text(detail)
        was = node.feel(sign, now_s, detail)
        effects: list[Effect] = []
        if was is not None:
            effects.append(Tell(message=NodeHealthChanged(node=node.name, health=node.health, was=was, reason=detail)))
            if node.health in ("healthy", "engine-down") and node.is_known:
                effects += self._pay_debts(node, now_s) + self.desk.returned(node, now_s)
        return effects

    def _probe(self, node: Node) -> list[Effect]:
        if node.is_probed:
            return []
        node.is_probed = True
        limit = self.rules.probe_timeout_s
        return [self.send("probe", node.name, Order(node=node.name, message=Probe(), idle_s=limit, timeout_s=limit))]

    # --------------------------------------------------------- the ends of calls

    def send(self, purpose: str, about: str, order: Order, call: str = "", op: str = "") -> Effect:
        """Make the effect for an order, and remember whose it is."""
        self._serial += 1
        call = call or f"{purpose}-{self.epoch % 100000}-{self._serial}"
        self._calls[call] = (purpose, about)
        return SendWork(
            call=call,
            node=order.node,
            message=order.message,
            op=op or call,
            timeout_s=order.timeout_s,
            idle_s=order.idle_s,
        )

    def _progress(self, event: WorkProgressed, now_s: float) -> list[Effect]:
        purpose, about = self._calls.get(event.call, ("", ""))
        if purpose == "inventory" and isinstance(event.message, Inventory):
            if node := self.fleet.nodes.get(about):
                node.take_inventory(event.message, now_s)
        elif purpose == "op" and isinstance(event.message, Working) and event.message.detail:
            return self.desk.progressed(about, event.call, event.message.detail, now_s)
        return []

    def _work_ended(self, event: WorkEnded, now_s: float) -> list[Effect]:
        purpose, about = self._calls.pop(event.call, ("", ""))
        if purpose == "op":
            how = {"reply": event.reply, "failure": event.failure, "certainty": event.certainty}
            return self.desk.answered(about, event.call, now_s, **how)
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
            was = node.incarnation
            if not node.take_inventory(event.reply, now_s):
                return []
            node.heard(now_s, "inventory")
            effects = self._feel(
                node, node.take_engine(event.reply.facts.engine, node.engine_reason), now_s, "inventory"
            )
            return effects + self._learned(node, now_s, is_new=was not in ("", node.incarnation))
        began_s = self.learning.get(node.name)
        if began_s is None:
            return []
        if event.is_nobody and now_s - began_s < self.rules.census_grace_s:
            return []  # it may still be reconnecting: the tick asks again
        sign = Sign.NOBODY if event.is_nobody else Sign.NO_ANSWER
        effects = self._feel(node, sign, now_s, event.failure.reason if event.failure else "")
        self.learning.pop(node.name, None)
        if not self.learning:
            for each in self.fleet.nodes.values():
                effects += self._take_up(each, now_s)
        return effects

    def _probe_ended(self, node: Node, event: WorkEnded, now_s: float) -> list[Effect]:
        node.is_probed = False
        if isinstance(event.reply, ProbeAnswer):
            node.heard(now_s, "probe")
            effects = self._feel(
                node, node.take_engine(event.reply.engine, node.engine_reason), now_s, "answered a probe"
            )
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
        self._keep_time(event.wall_s - now_s)
        effects: list[Effect] = []
        for name in list(self.learning):
            effects += self._take_inventory(name)
        if self._judge_at_s is not None and now_s >= self._judge_at_s:
            since_s, self._judge_at_s = self._judge_at_s - REJOIN_S, None
            for node in self.fleet.nodes.values():
                if node.is_known and (node.last_seen_s or 0.0) <= since_s:
                    effects += self._probe(node)
        for node in self.fleet.overdue(now_s):
            node.feel(Sign.QUIET, now_s, f"no heartbeat for {views.age(now_s - (node.last_seen_s or now_s))}")
            effects += self._probe(node)
        effects += self.desk.tick(now_s)
        if now_s - self._debts_asked_s >= DEBT_RETRY_S:
            for node in self.fleet.nodes.values():
                if node.health == "healthy":
                    effects += self._pay_debts(node, now_s)
        return effects

    def _pay_debts(self, node: Node, now_s: float) -> list[Effect]:
        self._debts_asked_s = now_s
        effects: list[Effect] = []
        for debt in node.debts:
            if (node.name, debt) in self._debts.values():
                continue
            kind = DropWorkload if debt.candidate_only else RemoveWorkload
            order = Order(node=node.name, message=kind(service=debt.service, generation=debt.generation))
            effect = self.send("debt", node.name, order)
            assert isinstance(effect, SendWork)
            self._debts[effect.call] = (node.name, debt)
            effects.append(effect)
        return effects

    def _debt_ended(self, event: WorkEnded, now_s: float) -> None:
        name, debt = self._debts.pop(event.call, ("", None))
        node = self.fleet.nodes.get(name)
        if node and event.failure is None and debt in node.debts:
            node.debts.remove(debt)

    def _forget(self, name: str, now_s: float) -> list[Effect]:
        self.fleet.nodes.pop(name, None)
        self.learning.pop(name, None)
        self._registrations.pop(name, None)
        return self.desk.forgotten(name, now_s)
