"""What operators ask of the master, what it answers, and what it tells everybody. An agent knows none of it.

With this module imported, the catalogue is complete: it needs `messages`, which has the rest.
"""

from __future__ import annotations

from typing import Literal

from mcp.model.catalogue import Lane, command, message
from mcp.model.messages import ContainerLog, ContainerState, Done, Role
from mcp.model.spec import ServiceSpec
from mcp.model.values import frozen

NodeHealth = Literal["healthy", "unhealthy", "unknown", "engine-down", "unreachable"]
ServiceState = Literal["running", "stopped", "failed", "updating", "unknown", "orphan"]
Outcome = Literal["deployed", "unchanged", "undone", "refused", "unknown", "done", "failed"]
"""How an operation ended. A deploy is deployed, unchanged, undone, refused or unknown; what has no undo is done or failed."""

StepState = Literal["waiting", "running", "done", "unchanged", "failed", "undoing", "undone", "leftover", "unknown"]


# ------------------------------------------------------------------ operations


@frozen(kw_only=True)
class Step:
    """One line of an operation, as the operator sees it."""

    step: str
    node: str
    state: StepState
    seconds: float = 0.0
    detail: str = ""


@message(Lane.FRAME)
class OperationAccepted:
    """The master has taken an operation on; it goes on even if the operator's terminal does not."""

    op: str
    service: str
    kind: str
    node: str = ""


@message(Lane.FRAME)
class OperationProgress:
    """One step of an operation moved, or (with no step) the operation is alive."""

    op: str
    step: Step | None = None


@message(Lane.FRAME)
class OperationEnded:
    """How an operation ended; `leftovers` are what could not be undone, each with the command that finishes it."""

    op: str
    service: str
    kind: str
    node: str = ""
    outcome: Outcome
    reason: str = ""
    code: str = ""
    hint: str = ""
    steps: tuple[Step, ...] = ()
    logs: tuple[ContainerLog, ...] = ()
    leftovers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


@command(reply=OperationEnded)
class DeployService:
    """Put a service on the right node, healthy; `node` overrides the definition's pin and tier.

    `world` is the value a plan printed: when the fleet has changed since, the deploy is refused.
    """

    spec: ServiceSpec
    node: str = ""
    world: str = ""


@command(reply=OperationEnded)
class UndeployService:
    """Remove a service and everything of it."""

    service: str


@command(reply=OperationEnded)
class StopService:
    """Stop a service's containers; it stays deployed."""

    service: str


@command(reply=OperationEnded)
class StartService:
    """Start a stopped service."""

    service: str


@command(reply=OperationEnded)
class RestartService:
    """Restart a service's containers."""

    service: str


@frozen(kw_only=True)
class PlacementRow:
    """What placement thinks of one node; `score` is its number of containers: fewest wins, ties by name."""

    node: str
    fits: bool
    score: float = 0.0
    reasons: tuple[str, ...] = ()


@message(Lane.FRAME)
class Plan:
    """What a deploy would do; `world` names the state of the fleet it was made for."""

    service: str
    changes: bool
    world: str
    node: str = ""
    can_place: bool = True
    reason: str = ""
    hint: str = ""
    downtime: str = ""
    """Why the service would be away for a moment, empty when it would not."""
    steps: tuple[Step, ...] = ()
    placement: tuple[PlacementRow, ...] = ()
    differences: tuple[str, ...] = ()
    """`components[0].image: web:v1 -> web:v2`, for what runs now."""
    warnings: tuple[str, ...] = ()


@command(reply=Plan)
class PlanService:
    """What would a deploy of this do? Nothing is changed."""

    spec: ServiceSpec
    node: str = ""


@frozen(kw_only=True)
class CertificateRow:
    """A certificate that really serves a route."""

    names: tuple[str, ...] = ()
    not_after: str = ""
    serial: str = ""


@frozen(kw_only=True)
class RouteRow:
    """A route as status shows it."""

    hostname: str
    public: bool
    mode: str
    listener: str
    node: str
    backend: str = ""
    certificate: CertificateRow | None = None


@frozen(kw_only=True)
class ServiceRow:
    """One service on the status screen; `seen_s` is the age of the youngest word about it, `source` whose word it is."""

    name: str
    tier: str
    node: str
    state: ServiceState
    spec_hash: str
    generation: int
    version: str = ""
    components: tuple[ContainerState, ...] = ()
    routes: tuple[RouteRow, ...] = ()
    problems: tuple[str, ...] = ()
    seen_s: float | None = None
    source: str = ""


@frozen(kw_only=True)
class NodeRow:
    """One node on the status screen; `last_seen_s` is None for a node never seen by this master."""

    name: str
    role: Role
    address: str = ""
    arch: str = ""
    version: str = ""
    incarnation: str = ""
    health: NodeHealth
    health_since: str = ""
    last_seen_s: float | None = None
    last_seen_by: str = ""
    """Where the last sign of life came from: heartbeat, probe, registration."""
    is_draining: bool = False
    engine: str = ""
    engine_version: str = ""
    containers: int | None = None
    cpu_cores: float | None = None
    cpu_load: float | None = None
    memory_bytes: int | None = None
    memory_free_bytes: int | None = None
    disk_free_bytes: int | None = None
    problems: tuple[str, ...] = ()


@frozen(kw_only=True)
class OperationRow:
    """One operation as `mcp op list` shows it."""

    op: str
    service: str
    kind: str
    node: str = ""
    operator: str = ""
    state: Literal["running", "waiting", "ended"]
    outcome: str = ""
    reason: str = ""
    started_at: str = ""
    ended_at: str = ""
    steps: tuple[Step, ...] = ()


@message(Lane.FRAME)
class FleetStatus:
    """The fleet (or the part that was asked for), problems first."""

    master: str = ""
    epoch: int = 0
    is_learning: bool = False
    services: tuple[ServiceRow, ...] = ()
    nodes: tuple[NodeRow, ...] = ()
    problems: tuple[str, ...] = ()
    operations: tuple[OperationRow, ...] = ()
    part: int = 1
    parts: int = 1


@command(reply=FleetStatus)
class GetStatus:
    """The whole fleet, or one service, or one node; parts before the last come as progress frames."""

    service: str = ""
    node: str = ""


@frozen(kw_only=True)
class Evidence:
    """One thing the master saw of a node."""

    at: str
    age_s: float
    sign: str
    health: NodeHealth
    detail: str = ""


@message(Lane.FRAME)
class NodeEvidence:
    """Why the master believes what it believes of a node: newest first."""

    node: NodeRow
    explanation: str
    evidence: tuple[Evidence, ...] = ()


@command(reply=NodeEvidence)
class ExplainNode:
    """Show the evidence for a node's health."""

    node: str


@message(Lane.FRAME)
class LogsEnded:
    """Every stream has ended; `notes` says how each container ended."""

    notes: tuple[str, ...] = ()


@command(reply=LogsEnded)
class FollowLogs:
    """The output of all containers of a service; `LogLines` come as progress frames."""

    service: str
    component: str = ""
    follow: bool = False
    tail: int = -1
    since_s: float = 0.0


@command(reply=Done)
class GrantReaderCredit:
    """The CLI has printed so many `LogLines` of its stream: send more. 0 ends the stream."""

    stream: str
    credit: int


@message(Lane.FRAME)
class OperationList:
    """Running operations first, then the youngest ended ones."""

    operations: tuple[OperationRow, ...] = ()


@command(reply=OperationList)
class ListOperations:
    """Operations this master knows, those from before its start included (told by the agents)."""


@command(reply=OperationEnded)
class FollowOperation:
    """Follow an operation to its end; progress comes as frames. Ended already: the end at once."""

    op: str
    wait: bool = True


@command(reply=Done)
class CancelOperation:
    """Stop an operation at the next safe point and undo what it did."""

    op: str


@message(Lane.FRAME)
class Invited:
    """One line to run on the new node; whoever has it may join once, within `valid_s` seconds."""

    node: str
    role: Role
    token: str
    valid_s: float


@command(reply=Invited)
class InviteNode:
    """Make an invitation for one name and role: single use, short-lived."""

    node: str
    role: Role = "worker"


@command(reply=Done)
class RemoveNode:
    """Cut a node off the bus and forget it; with `force` although services are (or may be) on it."""

    node: str
    force: bool = False


# ------------------------------------------------- the master tells everybody


@message(Lane.EVENT)
class NodeHealthChanged:
    """A node's health is not what it was."""

    node: str
    health: NodeHealth
    was: NodeHealth
    reason: str


@message(Lane.EVENT)
class OperationStarted:
    """An operator's command was accepted."""

    op: str
    service: str
    kind: str
    operator: str


@message(Lane.EVENT)
class DeploymentFinished:
    """An operation on a service ended, whatever its kind."""

    op: str
    service: str
    kind: str
    node: str
    outcome: Outcome
    reason: str = ""
