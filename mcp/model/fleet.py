"""What the master believes of its nodes, and why: signs in, health out, no I/O.

A node is its name and its incarnation. The newest incarnation wins; what an older one still says is ignored.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

import attrs

from mcp.model import hearsay
from mcp.model.messages import (
    ContainerState,
    EngineState,
    Heartbeat,
    Inventory,
    NodeFacts,
    OperationRecord,
    Resources,
    Role,
    ServiceChanged,
    ServiceGone,
    ServiceRecord,
)
from mcp.model.operator_messages import NodeHealth

EVIDENCE_KEPT = 50
"""Signs remembered for each node: enough for `mcp node why`, bounded for a master that runs for years."""


class Sign(StrEnum):
    """What the master can learn of a node's health; only these move it."""

    ALIVE = "alive"  # registration, heartbeat or probe answer, engine fine or none by design
    ENGINE_DOWN = "engine-down"  # the same, and its container engine does not answer
    QUIET = "quiet"  # heartbeats missed, or the bus lost the connection: ask, judge later
    NOBODY = "nobody"  # probe: nobody listens, the agent is gone
    NO_ANSWER = "no-answer"  # probe: it is connected and does not answer, it is stuck
    LEFT = "left"  # it said goodbye


TRANSITIONS: dict[tuple[NodeHealth, Sign], NodeHealth] = {
    ("unknown", Sign.ALIVE): "healthy",
    ("unknown", Sign.ENGINE_DOWN): "engine-down",
    ("unknown", Sign.QUIET): "unknown",
    ("unknown", Sign.NOBODY): "unreachable",
    ("unknown", Sign.NO_ANSWER): "unhealthy",
    ("unknown", Sign.LEFT): "unreachable",
    ("healthy", Sign.ALIVE): "healthy",
    ("healthy", Sign.ENGINE_DOWN): "engine-down",
    ("healthy", Sign.QUIET): "healthy",
    ("healthy", Sign.NOBODY): "unreachable",
    ("healthy", Sign.NO_ANSWER): "unhealthy",
    ("healthy", Sign.LEFT): "unreachable",
    ("engine-down", Sign.ALIVE): "healthy",
    ("engine-down", Sign.ENGINE_DOWN): "engine-down",
    ("engine-down", Sign.QUIET): "engine-down",
    ("engine-down", Sign.NOBODY): "unreachable",
    ("engine-down", Sign.NO_ANSWER): "unhealthy",
    ("engine-down", Sign.LEFT): "unreachable",
    ("unhealthy", Sign.ALIVE): "healthy",
    ("unhealthy", Sign.ENGINE_DOWN): "engine-down",
    ("unhealthy", Sign.QUIET): "unhealthy",
    ("unhealthy", Sign.NOBODY): "unreachable",
    ("unhealthy", Sign.NO_ANSWER): "unhealthy",
    ("unhealthy", Sign.LEFT): "unreachable",
    ("unreachable", Sign.ALIVE): "healthy",
    ("unreachable", Sign.ENGINE_DOWN): "engine-down",
    ("unreachable", Sign.QUIET): "unreachable",
    ("unreachable", Sign.NOBODY): "unreachable",
    ("unreachable", Sign.NO_ANSWER): "unhealthy",
    ("unreachable", Sign.LEFT): "unreachable",
}
"""Health and sign to health; a test lists every pair."""

EXPLANATIONS: dict[NodeHealth, str] = {
    "healthy": "it answers",
    "unhealthy": "it is connected to the bus and does not answer a probe: its agent is stuck or its machine is frozen",
    "unknown": "this master has not heard from it yet",
    "engine-down": "its agent answers, its container engine does not",
    "unreachable": "nobody listens there: its agent is not running or cannot reach the bus",
}


@attrs.frozen(kw_only=True)
class Seen:
    """One piece of evidence, or several alike in a row; times are the master's monotonic ones."""

    at_s: float
    sign: str
    health: NodeHealth
    detail: str = ""
    first_s: float
    times: int = 1


@attrs.frozen(kw_only=True)
class HealthRules:
    """The intervals of the heartbeat rule; every one of them is configuration (mcp-master.toml, [health])."""

    heartbeat_s: float = 30.0
    missed: int = 3
    clock_skew_s: float = 30.0

    @property
    def silence_limit_s(self) -> float:
        """How long a node may be quiet before it is probed."""
        return self.heartbeat_s * self.missed


@attrs.frozen(kw_only=True)
class Debt:
    """Something that must still be undone on a node that was away: done when it returns."""

    service: str
    generation: int
    candidate_only: bool
    why: str

    @property
    def command(self) -> str:
        """What an operator can type to have it done."""
        return f"mcp undeploy {self.service}" if not self.candidate_only else f"mcp deploy {self.service}"


@attrs.define(kw_only=True)
class Node:
    """One enrolled node as the master sees it."""

    name: str
    role: Role
    health: NodeHealth = "unknown"
    health_since_s: float = 0.0
    facts: NodeFacts | None = None
    resources: Resources | None = None
    engine: EngineState = "none"
    engine_reason: str = ""
    last_seen_s: float | None = None
    last_seen_by: str = ""
    inventory_at_s: float | None = None
    inventory_version: int = -1
    services: dict[str, ServiceRecord] = attrs.field(factory=dict)
    operations: dict[str, OperationRecord] = attrs.field(factory=dict)
    orphans: tuple[ContainerState, ...] = ()
    problems: tuple[str, ...] = ()
    containers: int = 0
    clock_skew_s: float = 0.0
    heard_epoch: int = 0
    is_draining: bool = False
    is_probed: bool = False
    is_flooding: bool = False
    twin: str = ""
    """Another live incarnation that uses this node's credential, if one was heard."""
    debts: list[Debt] = attrs.field(factory=list)
    evidence: deque[Seen] = attrs.field(factory=lambda: deque(maxlen=EVIDENCE_KEPT))
    parts: list[Inventory] = attrs.field(factory=list)

    @property
    def incarnation(self) -> str:
        """The id of the agent process that speaks for this node; "" before the first registration."""
        return self.facts.incarnation if self.facts else ""

    @property
    def is_known(self) -> bool:
        """Whether this master has ever had the node's inventory."""
        return self.inventory_at_s is not None

    def feel(self, sign: Sign, now_s: float, detail: str = "") -> NodeHealth | None:
        """Take a sign in; return the old health when it changed, else None."""
        was = self.health
        self.health = TRANSITIONS[was, sign]
        if self.health != was:
            self.health_since_s = now_s
        self._note(sign, now_s, detail)
        return was if self.health != was else None

    def _note(self, sign: Sign, now_s: float, detail: str) -> None:
        """Keep evidence; an hour of heartbeats is one line, or it would push out what an operator looks for."""
        last = self.evidence[-1] if self.evidence else None
        if last and (last.sign, last.health, last.detail) == (sign.value, self.health, detail):
            self.evidence[-1] = attrs.evolve(last, at_s=now_s, times=last.times + 1)
        else:
            self.evidence.append(Seen(at_s=now_s, sign=sign.value, health=self.health, detail=detail, first_s=now_s))

    def heard(self, now_s: float, by: str) -> None:
        """Note a sign of life."""
        self.last_seen_s = now_s
        self.last_seen_by = by

    def take_engine(self, engine: EngineState, reason: str = "") -> Sign:
        """Note what the node says of its engine and return the sign that is."""
        self.engine = engine
        self.engine_reason = hearsay.text(reason)
        return Sign.ENGINE_DOWN if engine in ("down", "frozen") else Sign.ALIVE

    def is_quiet(self, now_s: float, rules: HealthRules) -> bool:
        """Say whether the node has been silent for longer than it may."""
        return self.last_seen_s is not None and now_s - self.last_seen_s >= rules.silence_limit_s

    def take_inventory(self, inventory: Inventory, now_s: float) -> bool:
        """Take (a part of) an inventory in; return whether it is whole now."""
        if inventory.part == 1:
            self.parts = []
        if (
            inventory.part != len(self.parts) + 1
            or inventory.part > hearsay.PARTS_MOST
            or (self.parts and self.parts[0].facts.incarnation != inventory.facts.incarnation)
        ):
            self.parts = []
            return False
        self.parts.append(inventory)
        if inventory.part < inventory.parts:
            return False
        parts, self.parts = self.parts, []
        heard = hearsay.inventory(parts)
        self.facts = hearsay.facts(inventory.facts)
        self.resources = inventory.facts.resources
        self.services, self.operations = heard.services, heard.operations
        self.orphans, self.problems = heard.orphans, heard.problems
        self.inventory_version = inventory.version
        self.inventory_at_s = now_s
        self.containers = self.count_containers()
        return True

    def take_heartbeat(self, beat: Heartbeat, now_s: float, wall_s: float) -> bool:
        """Take a heartbeat of the current incarnation; return whether the inventory must be fetched again."""
        self.heard(now_s, "heartbeat")
        self.resources = beat.resources
        self.containers = beat.containers
        self.problems = hearsay.texts(beat.problems)
        self.heard_epoch = beat.epoch
        self.clock_skew_s = beat.clock_s - wall_s
        return beat.inventory_version > self.inventory_version

    def take_change(self, change: ServiceChanged | ServiceGone) -> bool:
        """Take a changed service; return whether something before it was missed."""
        missed = change.inventory_version > self.inventory_version + 1
        if change.inventory_version <= self.inventory_version:
            return False
        if isinstance(change, ServiceChanged):
            record = hearsay.record(change.record)
            if record is None or len(self.services) >= hearsay.SERVICES_MOST:
                return True  # the inventory tells what is not to be believed
            self.services[record.service] = record
        else:
            self.services.pop(change.service, None)
        if not missed:
            self.inventory_version = change.inventory_version
        self.containers = self.count_containers()
        return missed

    def count_containers(self) -> int:
        """Return how many of our containers are on the node, as its records say."""
        return sum(len(record.containers) for record in self.services.values())

    def reserved(self, *, without: str = "") -> tuple[int, float]:
        """Return the memory (bytes) and CPU (cores) that running services have reserved here."""
        specs = [r.spec for r in self.services.values() if r.service != without and r.desired == "running"]
        return sum(spec.memory_bytes for spec in specs), sum(spec.cpu_cores for spec in specs)


@attrs.define(kw_only=True)
class Fleet:
    """All enrolled nodes, and the one that the master itself lives on."""

    master: str
    rules: HealthRules = attrs.field(factory=HealthRules)
    nodes: dict[str, Node] = attrs.field(factory=dict)

    def where(self, service: str) -> list[tuple[Node, ServiceRecord]]:
        """Return every node that has the service, the newest generation first."""
        found = [(node, node.services[service]) for node in self.nodes.values() if service in node.services]
        return sorted(found, key=lambda pair: (-pair[1].generation, pair[0].name))

    def home(self, service: str) -> tuple[Node, ServiceRecord] | None:
        """Return the node whose generation of the service is the newest committed one."""
        found = [pair for pair in self.where(service) if pair[1].generation > 0]
        return found[0] if found else None

    def service_names(self) -> list[str]:
        """Return the names of all services anywhere."""
        return sorted({name for node in self.nodes.values() for name in node.services})

    def highest_generation(self, service: str) -> int:
        """Return the highest generation any node has told of, candidates included; 0 when none did."""
        highest = 0
        for _, record in self.where(service):
            highest = max(highest, record.generation, record.candidate.generation if record.candidate else 0)
        return highest

    def overdue(self, now_s: float) -> list[Node]:
        """Return the nodes that fell silent and are not being probed."""
        return [
            node
            for node in self.nodes.values()
            if node.health in ("healthy", "engine-down") and not node.is_probed and node.is_quiet(now_s, self.rules)
        ]

    def suspects_itself(self) -> bool:
        """Say whether so many nodes are gone at once that the fault is probably on the master's side.

        55 % is a judgement, no measurement; one or two nodes prove nothing.
        """
        others = [node for node in self.nodes.values() if node.name != self.master and node.is_known]
        gone = [node for node in others if node.health in ("unhealthy", "unreachable")]
        return len(others) >= 3 and len(gone) / len(others) >= 0.55
