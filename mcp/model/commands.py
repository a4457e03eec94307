"""What operators may ask of the master, and what it answers: an explicit table, one `case` for each command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mcp.model import deploy, placement, views
from mcp.model.definition import differences
from mcp.model.effects import (
    CommandReceived,
    Effect,
    Expel,
    FeedStream,
    Invite,
    OpenStream,
    Say,
    Tell,
)
from mcp.model.errors import McpError, Refused
from mcp.model.fleet import Fleet, Node
from mcp.model.messages import AbandonWork, Done, StreamLogs
from mcp.model.names import is_node_name
from mcp.model.operations import OPERATIONS_KEPT, Desk, ended_message
from mcp.model.operator_messages import (
    CancelOperation,
    DeployService,
    ExplainNode,
    FleetStatus,
    FollowLogs,
    FollowOperation,
    GetStatus,
    GrantReaderCredit,
    InviteNode,
    ListOperations,
    OperationAccepted,
    OperationEnded,
    OperationList,
    OperationRow,
    OperationStarted,
    Plan,
    PlanService,
    RemoveNode,
    RestartService,
    StartService,
    Step,
    StopService,
    UndeployService,
)
from mcp.model.saga import Job, Operation, Order, failed_from

NewId = Callable[[], str]


class View(Protocol):
    """What commands see of the master."""

    fleet: Fleet
    epoch: int
    learning: dict[str, float]

    @property
    def node(self) -> str:
        """The node the master lives on."""

    @property
    def internal_zone(self) -> str:
        """The zone of internal names."""

    @property
    def max_nodes(self) -> int:
        """How many nodes may be enrolled."""

    def at(self, monotonic_s: float) -> str:
        """Write a time for people."""

    def send(self, purpose: str, about: str, order: Order) -> Effect:
        """Make the effect for an order that belongs to no operation."""


class Commands:
    """Answers operators from the master's view and its desk of operations."""

    def __init__(self, master: View, desk: Desk) -> None:
        self._master = master
        self._desk = desk

    def answer(self, event: CommandReceived, now_s: float, new_id: NewId) -> list[Effect]:
        """Do what an operator asks, or say why not."""
        try:
            match event.message:
                case (
                    DeployService()
                    | UndeployService()
                    | StopService()
                    | StartService()
                    | RestartService()
                    | PlanService()
                ):
                    return self._begin(event, now_s, new_id)
                case GetStatus():
                    return [Say(asker=event.asker, frame="final", message=self._status(event.message, now_s))]
                case ExplainNode():
                    node = self._node(event.message.node)
                    message = views.node_evidence(node, self._master.fleet, now_s, self._master.at)
                    return [Say(asker=event.asker, frame="final", message=message)]
                case ListOperations():
                    return [
                        Say(
                            asker=event.asker,
                            frame="final",
                            message=OperationList(operations=self._operations()),
                        )
                    ]
                case FollowOperation():
                    return self._follow(event.asker, event.message)
                case CancelOperation():
                    return self._cancel(event.asker, event.message.op, now_s)
                case FollowLogs():
                    return self._logs(event)
                case GrantReaderCredit():
                    return [
                        FeedStream(
                            asker=event.asker,
                            operator=event.operator,
                            stream=event.message.stream,
                            credit=event.message.credit,
                        )
                    ]
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
            DeployService: "deploy",
            UndeployService: "undeploy",
            StopService: "stop",
            StartService: "start",
            RestartService: "restart",
            PlanService: "plan",
        }[type(message)]
        service = message.spec.name if isinstance(message, DeployService | PlanService) else message.service
        if self._master.learning:
            asked = ", ".join(sorted(self._master.learning))
            raise Refused(
                "still_learning",
                f"cannot {kind} {service}: this master has just started and is still asking {asked}",
                hint="Try again in a few seconds.",
            )
        if kind != "plan" and (holder := self._desk.holder(service)):
            by = f" by {holder.job.operator}" if holder.job.operator else ""
            held = (
                f"operation {holder.job.op} ({holder.job.kind}{by}) holds it since {self._master.at(holder.started_s)}"
            )
            raise Refused(
                "busy",
                f"cannot {kind} {service}: {held}",
                hint=f"`mcp op show {holder.job.op} --follow` follows it, `mcp op cancel {holder.job.op}` stops it.",
            )
        job = Job(
            op=new_id(),
            kind=kind,
            service=service,
            operator=event.operator,
            fleet=self._master.fleet,
            spec=getattr(message, "spec", None),
            wanted_node=getattr(message, "node", ""),
            world=getattr(message, "world", ""),
        )
        effects: list[Effect] = []
        if kind != "plan":
            effects.append(
                Say(
                    asker=event.asker,
                    frame="accepted",
                    message=OperationAccepted(op=job.op, service=service, kind=kind),
                )
            )
            effects.append(
                Tell(message=OperationStarted(op=job.op, service=service, kind=kind, operator=event.operator))
            )
        return effects + self._desk.begin(job, now_s, asker=event.asker)

    def plan(self, operation: Operation) -> Plan:
        """Say what a deploy would do, from a plan that has found its node (or has not)."""
        job, spec = operation.job, operation.job.spec
        assert spec is not None
        home = self._master.fleet.home(job.service)
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
        if operation := self._desk.running.get(message.op):
            if message.wait:
                return self._desk.follow(message.op, asker)
            return [Say(asker=asker, frame="final", message=ended_message(operation))]
        for operation in self._desk.ended:
            if operation.job.op == message.op:
                return [Say(asker=asker, frame="final", message=ended_message(operation))]
        for node in self._master.fleet.nodes.values():
            for record in node.services.values():
                if record.op == message.op and record.generation > 0:
                    return [
                        Say(
                            asker=asker,
                            frame="final",
                            message=OperationEnded(
                                op=message.op,
                                service=record.service,
                                kind="deploy",
                                node=node.name,
                                outcome="deployed",
                                reason="told by its agent: this master started after the operation",
                            ),
                        )
                    ]
            if journal := node.operations.get(message.op):
                return [
                    Say(
                        asker=asker,
                        frame="final",
                        message=OperationEnded(
                            op=message.op,
                            service=journal.service,
                            kind=views.told_kind(journal),
                            node=node.name,
                            outcome=views.told_outcome(journal),  # type: ignore[arg-type]
                            reason=journal.detail or f"told by {node.name}: this master started after the operation",
                        ),
                    )
                ]
        if self._master.learning:
            raise Refused(
                "still_learning",
                f"operation {message.op} is not known yet: this master is still asking the agents",
            )
        raise Refused("no_such_operation", f"there is no operation {message.op}", hint="`mcp op list` shows them.")

    def _cancel(self, asker: str, op: str, now_s: float) -> list[Effect]:
        operation = self._desk.running.get(op)
        if operation is None:
            raise Refused("no_such_operation", f"operation {op} is not running", hint="`mcp op list` shows what is.")
        nodes = operation.busy_nodes
        undoing = self._desk.cancel(op, now_s)
        effects: list[Effect] = [
            self._master.send(
                "abandon",
                node,
                Order(node=node, message=AbandonWork(target_op=op), idle_s=5.0, timeout_s=5.0),
            )
            for node in sorted(nodes)
        ]
        effects.append(Say(asker=asker, frame="final", message=Done(detail=f"{op} is being undone")))
        return effects + undoing

    def _logs(self, event: CommandReceived) -> list[Effect]:
        message = event.message
        copies = self._master.fleet.where(message.service)
        if not copies:
            if self._master.learning:
                raise Refused(
                    "still_learning",
                    f"cannot read logs of {message.service}: this master is still asking the agents",
                )
            known = ", ".join(self._master.fleet.service_names()) or "none"
            raise Refused(
                "not_deployed",
                f"cannot read logs of {message.service}: it is not deployed (deployed: {known})",
            )
        legs = tuple(
            (
                node.name,
                StreamLogs(
                    stream="",
                    service=message.service,
                    follow=message.follow,
                    tail=message.tail,
                    since_s=message.since_s,
                ),
            )
            for node, _ in copies
        )
        return [OpenStream(asker=event.asker, operator=event.operator, legs=legs)]

    def _invite(self, asker: str, message: InviteNode) -> list[Effect]:
        if not is_node_name(message.node):
            raise Refused(
                "bad_name",
                f"cannot invite {message.node!r}: a node's name is lower-case letters, digits and dashes, at most 32",
            )
        if message.node in self._master.fleet.nodes:
            raise Refused(
                "name_taken",
                f"cannot invite {message.node}: a node of that name is enrolled",
                hint=f"`mcp node remove {message.node}` first, if it shall be replaced.",
            )
        if message.role == "master":
            raise Refused("bad_role", "cannot invite a second master: the master's node is made by `mcp init`")
        count = len(self._master.fleet.nodes)
        if count >= self._master.max_nodes:
            raise Refused(
                "limit",
                f"cannot invite {message.node}: the fleet has {count} nodes, the limit is {self._master.max_nodes}",
                hint="Raise [limits] max_nodes in mcp-master.toml.",
            )
        return [Invite(asker=asker, node=message.node, role=message.role)]

    def _remove_node(self, asker: str, message: RemoveNode) -> list[Effect]:
        node = self._node(message.node)
        if node.name == self._master.node:
            raise Refused("is_master", f"cannot remove {node.name}: the master lives there")
        if node.services and not message.force:
            raise Refused(
                "has_services",
                f"cannot remove {node.name}: it has {', '.join(sorted(node.services))}",
                hint=f"Move or undeploy them, or `mcp node remove {node.name} --force` to leave them running there unmanaged.",
            )
        if not node.is_known and not message.force and node.health != "unreachable":
            raise Refused(
                "unknown_services",
                f"cannot remove {node.name}: what it runs is not known yet",
                hint="Add --force.",
            )
        return [Expel(asker=asker, node=node.name)]

    def _node(self, name: str) -> Node:
        if name not in self._master.fleet.nodes:
            known = ", ".join(sorted(self._master.fleet.nodes)) or "none"
            raise Refused("no_such_node", f"there is no node {name} (enrolled: {known})")
        return self._master.fleet.nodes[name]

    def _status(self, question: GetStatus, now_s: float) -> FleetStatus:
        names = [question.service] if question.service else self._master.fleet.service_names()
        rows = []
        for name in names:
            holder = self._desk.holder(name)
            row = views.service_row(
                name,
                self._master.fleet,
                now_s,
                zone=self._master.internal_zone,
                updating=holder.job.node or "-" if holder else "",
            )
            if row:
                rows.append(row)
        rows += [row for row in views.orphan_rows(self._master.fleet) if question.service in ("", row.name)]
        if question.service and not rows and not self._master.learning:
            known = ", ".join(self._master.fleet.service_names()) or "none"
            raise Refused(
                "not_deployed",
                f"{question.service} is not deployed (deployed: {known})",
                hint=f"`mcp deploy {question.service}`",
            )
        nodes = (
            [self._node(question.node)]
            if question.node
            else sorted(self._master.fleet.nodes.values(), key=lambda n: n.name)
        )
        node_rows = tuple(views.node_row(node, self._master.fleet, now_s, self._master.at) for node in nodes)
        return FleetStatus(
            master=self._master.node,
            epoch=self._master.epoch,
            is_learning=bool(self._master.learning),
            services=tuple(rows),
            nodes=() if question.service else node_rows,
            problems=(
                *self._own_problems(),
                *views.problems_of(rows),
                *(p for row in node_rows for p in row.problems),
            ),
            operations=tuple(
                views.operation_row(o, self._master.at) for o in self._desk.running.values() if o.job.kind != "plan"
            ),
        )

    def _own_problems(self) -> list[str]:
        found = []
        if self._master.learning:
            found.append(f"the master has just started and is still asking {', '.join(sorted(self._master.learning))}")
        if self._master.fleet.suspects_itself():
            found.append(
                "most nodes went away at once: the fault is probably here (the bus or the master's network); nothing is moved"
            )
        return found

    def _operations(self) -> tuple[OperationRow, ...]:
        mine = [o for o in self._desk.running.values() if o.job.kind != "plan"] + list(reversed(self._desk.ended))
        rows = [views.operation_row(operation, self._master.at) for operation in mine]
        known = {row.op for row in rows}
        told = [
            (node, record)
            for node in self._master.fleet.nodes.values()
            for record in node.operations.values()
            if record.op not in known
        ]
        told.sort(key=lambda pair: pair[1].ended_at, reverse=True)
        rows += [
            OperationRow(
                op=record.op,
                service=record.service,
                kind=views.told_kind(record),
                node=node.name,
                operator="(before this master)",
                state="ended",
                outcome=views.told_outcome(record),
                reason=record.detail,
                ended_at=record.ended_at,
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
        "pull": "already there"
        if len(local) == len(job.spec.images)
        else ", ".join(i for i in job.spec.images if i not in local),
        "run": f"generation {job.generation}: {', '.join(c.name for c in job.spec.components)}",
        "retire": f"the copy on {moves_from}" if moves_from else "the older generation, if there is one",
    }
    return tuple(Step(step=name, node=job.node, state="waiting", detail=detail) for name, detail in details.items())
