"""How the master's view looks to an operator: rows with ages, sources and problems, each problem with its remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from mcp.model.fleet import EXPLANATIONS, Fleet, Node
from mcp.model.messages import ContainerState, OperationRecord, ServiceRecord
from mcp.model.operator_messages import (
    Evidence,
    NodeEvidence,
    NodeRow,
    OperationRow,
    RouteRow,
    ServiceRow,
    ServiceState,
)
from mcp.model.saga import Operation

At = Callable[[float], str]
"""Turns the master's monotonic seconds into RFC 3339 UTC."""


def rfc3339(wall_s: float) -> str:
    """Write seconds since 1970 as RFC 3339 UTC with milliseconds."""
    return datetime.fromtimestamp(wall_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def age(seconds: float) -> str:
    """Write a duration for people: 4 s, 3 min, 2 h, 5 d."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


# ----------------------------------------------------------------------- nodes


def node_problems(node: Node, fleet: Fleet, now_s: float, at: At) -> tuple[str, ...]:
    """Say what is wrong with a node: what, since when, and what to do."""
    found: list[str] = []
    since = at(node.health_since_s)
    last = (
        f", last heard {age(now_s - node.last_seen_s)} ago by {node.last_seen_by}"
        if node.last_seen_s is not None
        else ""
    )
    match node.health:
        case "unreachable" if not node.is_known:
            found.append(
                f"{node.name}: is enrolled and has not been heard by this master; on {node.name}: `systemctl start mcp-agent`"
            )
        case "unreachable":
            found.append(
                f"{node.name}: unreachable since {since}{last}; its containers go on."
                f" On {node.name}: `systemctl status mcp-agent`; evidence: `mcp node why {node.name}`"
            )
        case "unhealthy":
            found.append(
                f"{node.name}: unhealthy since {since}: no answer to a probe{last}; evidence: `mcp node why {node.name}`"
            )
        case "engine-down":
            found.append(
                f"{node.name}: engine down since {since}: {node.engine_reason or 'the container engine does not answer'};"
                f" on {node.name}: `systemctl status docker`"
            )
    if abs(node.clock_skew_s) > fleet.rules.clock_skew_s:
        found.append(f"{node.name}: its clock is off by {node.clock_skew_s:+.0f} s; check its time service")
    if node.twin:
        found.append(
            f"{node.name}: a second agent uses its key (incarnation {node.twin});"
            f" stop it, or `mcp node remove {node.name}` and invite it anew"
        )
    if node.is_flooding:
        found.append(f"{node.name}: floods the bus and is muted for a moment")
    found += [f"{node.name}: still to do when it is back: {debt.why}: `{debt.command}`" for debt in node.debts]
    found += [text if text.startswith(node.name) else f"{node.name}: {text}" for text in node.problems]
    return tuple(found)


def node_row(node: Node, fleet: Fleet, now_s: float, at: At) -> NodeRow:
    """Return a node as the status screen shows it."""
    facts, have = node.facts, node.resources
    return NodeRow(
        name=node.name,
        role=node.role,
        address=facts.address if facts else "",
        arch=facts.arch if facts else "",
        version=facts.version if facts else "",
        incarnation=node.incarnation,
        health=node.health,
        health_since=at(node.health_since_s),
        last_seen_s=round(now_s - node.last_seen_s, 3) if node.last_seen_s is not None else None,
        last_seen_by=node.last_seen_by,
        is_draining=node.is_draining,
        engine=node.engine if facts else "",
        engine_version=facts.engine_version if facts else "",
        containers=node.containers if facts else None,
        cpu_cores=have.cpu_cores if have else None,
        cpu_load=have.cpu_load if have else None,
        memory_bytes=have.memory_bytes if have else None,
        memory_free_bytes=have.memory_free_bytes if have else None,
        disk_free_bytes=have.disk_free_bytes if have else None,
        problems=node_problems(node, fleet, now_s, at),
    )


def node_evidence(node: Node, fleet: Fleet, now_s: float, at: At) -> NodeEvidence:
    """Return why the master believes what it believes of a node."""
    return NodeEvidence(
        node=node_row(node, fleet, now_s, at),
        explanation=f"{node.name} is {node.health}: {EXPLANATIONS[node.health]}",
        evidence=tuple(
            Evidence(
                at=at(seen.at_s),
                age_s=round(now_s - seen.at_s, 3),
                sign=seen.sign,
                health=seen.health,
                detail=seen.detail
                if seen.times == 1
                else f"{seen.detail} ({seen.times} times since {at(seen.first_s)})",
            )
            for seen in reversed(node.evidence)
        ),
    )


# -------------------------------------------------------------------- services


def service_state(record: ServiceRecord, node: Node, *, is_updating: bool) -> ServiceState:
    """Say how a service is, from what its node last said and whether that can be believed now."""
    if is_updating:
        return "updating"
    if node.health != "healthy":
        return "unknown"
    current = [c for c in record.containers if c.generation == record.generation]
    if record.desired == "stopped":
        return "stopped" if not any(c.state == "running" for c in current) else "failed"
    whole = len(current) >= len(record.spec.components)
    well = all(c.state == "running" and c.health != "unhealthy" for c in current)
    return "running" if whole and well else "failed"


def container_problem(container: ContainerState, record: ServiceRecord) -> str:
    """Say what is wrong with one container; "" when nothing is."""
    if container.problem:
        return f"{container.component}: {container.problem}"
    if record.desired == "stopped" or container.generation != record.generation:
        return ""
    if container.out_of_memory and container.state != "running":
        return f"{container.component}: ran out of memory (limit {record_memory(record, container)})"
    if container.state == "missing":
        return f"{container.component}: its container is gone; `mcp start {record.service}` makes it anew"
    if container.state != "running":
        when = f" at {container.finished_at}" if container.finished_at else ""
        return (
            f"{container.component}: {container.state}{when} with exit code {container.exit_code};"
            f" `mcp logs {record.service}`, then `mcp start {record.service}`"
        )
    if container.health == "unhealthy":
        return f"{container.component}: unhealthy; `mcp logs {record.service}`"
    return ""


def record_memory(record: ServiceRecord, container: ContainerState) -> str:
    """Return the memory limit of a container's component for people."""
    for component in record.spec.components:
        if component.name == container.component and component.memory_bytes:
            return f"{component.memory_bytes / 1024**2:.0f} MiB"
    return "none"


def service_row(name: str, fleet: Fleet, now_s: float, *, zone: str, updating: str = "") -> ServiceRow | None:
    """Return a service as the status screen shows it; None when no node has it.

    `updating` is the node that an operation is busy on.
    """
    copies = fleet.where(name)
    if not copies:
        return None
    node, record = next((pair for pair in copies if pair[1].generation > 0), copies[0])
    problems = [text for c in record.containers if (text := container_problem(c, record))]
    problems += [text for text in record.problems if text not in problems]
    others = [(n, r) for n, r in copies if n is not node and not r.candidate]
    problems += [
        f"conflict: also on {n.name} (generation {r.generation}, here {record.generation});"
        f" `mcp deploy {name} --node {node.name}` keeps this one"
        for n, r in others
    ]
    missing = {c.name for c in record.spec.components} - {c.component for c in record.containers}
    if record.desired == "running" and node.health == "healthy" and not updating and record.generation > 0:
        problems += [f"{component}: has no container; `mcp start {name}` makes it" for component in sorted(missing)]
    if node.health != "healthy":
        problems.append(f"last known state: {node.name} is {node.health}")
    return ServiceRow(
        name=name,
        tier=record.spec.tier,
        node=node.name,
        state=service_state(record, node, is_updating=bool(updating)),
        spec_hash=record.spec_hash,
        generation=record.generation,
        version=version_of(record),
        components=tuple(sorted(record.containers, key=lambda c: (c.component, -c.generation))),
        routes=routes_of(record, node, zone),
        problems=tuple(problems),
        seen_s=round(now_s - node.last_seen_s, 3) if node.last_seen_s is not None else None,
        source=node.last_seen_by,
    )


def version_of(record: ServiceRecord) -> str:
    """Return what an operator would call the version: the definition's, else the first image's tag."""
    if record.spec.version:
        return record.spec.version
    image = record.spec.components[0].image
    return image.rpartition("@")[2][:19] if "@" in image else image.rpartition(":")[2]


def routes_of(record: ServiceRecord, node: Node, zone: str) -> tuple[RouteRow, ...]:
    """Return the routes of a service and where each of them ends on its node."""
    rows = []
    for component in record.spec.components:
        container = next(
            (c for c in record.containers if c.component == component.name and c.generation == record.generation),
            None,
        )
        rows += [
            RouteRow(
                hostname=route.hostname or f"{record.service}.{zone}",
                public=route.public,
                mode=route.mode,
                listener=f":{route.port}",
                node=node.name,
                backend=container.ports.get(route.name, "") if container else "",
            )
            for route in component.routes
        ]
    return tuple(rows)


def orphan_rows(fleet: Fleet) -> list[ServiceRow]:
    """Return a row for each service of which only containers without an intent are left."""
    rows = []
    for node in fleet.nodes.values():
        for service in sorted({o.service for o in node.orphans}):
            found = tuple(o for o in node.orphans if o.service == service)
            if service in node.services:
                continue
            rows.append(
                ServiceRow(
                    name=service,
                    tier="worker",
                    node=node.name,
                    state="orphan",
                    spec_hash=found[0].spec_hash,
                    generation=found[0].generation,
                    components=found,
                    problems=(
                        f"no accepted intent on {node.name}: `mcp deploy {service}` or `mcp undeploy {service}`",
                    ),
                )
            )
    return rows


# ------------------------------------------------------------------ operations

_KINDS = {
    "run_workload": "deploy",
    "commit_workload": "deploy",
    "drop_workload": "deploy",
    "remove_workload": "undeploy",
    "stop_workload": "stop",
    "start_workload": "start",
    "restart_workload": "restart",
}
_OUTCOMES = {
    ("commit_workload", "done"): "deployed",
    ("drop_workload", "done"): "undone",
    ("run_workload", "done"): "unknown",
}
"""What the last order of an operation that an agent remembers says of the whole."""


def told_kind(record: OperationRecord) -> str:
    """Return what an operator called the operation that an agent's journal tells of."""
    return _KINDS.get(record.kind, record.kind)


def told_outcome(record: OperationRecord) -> str:
    """Return how that operation ended, as far as its last order tells."""
    return _OUTCOMES.get((record.kind, record.outcome), record.outcome)


def operation_row(operation: Operation, at: At) -> OperationRow:
    """Return an operation as `mcp op list` shows it."""
    job = operation.job
    is_over = operation.phase == "ended"
    return OperationRow(
        op=job.op,
        service=job.service,
        kind=job.kind,
        node=job.node,
        operator=job.operator,
        state="ended" if is_over else "waiting" if operation.is_waiting else "running",
        outcome=operation.outcome if is_over else "",
        reason=operation.failure.reason if operation.failure else "",
        started_at=at(operation.started_s),
        ended_at=at(operation.ended_s) if is_over else "",
        steps=tuple(operation.shown.values()),
    )


def problems_of(rows: Iterable[ServiceRow]) -> list[str]:
    """Return the problems of services, each with the service's name in front."""
    return [f"{row.name}: {problem}" for row in rows for problem in row.problems]
