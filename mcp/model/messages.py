"""Every message of the control plane, declared once with its lane.

Read top to bottom: the parts that messages share, what agents report, what the master orders, what operators ask,
how nodes join, what the master tells everybody. A new message: docs/adding-a-message.md.
"""

from __future__ import annotations

from typing import Literal

import attrs

from mcp.model.catalogue import Lane, command, message, work
from mcp.model.spec import ServiceSpec

Role = Literal["master", "worker", "edge"]
EngineState = Literal["up", "down", "frozen", "none"]
"""`down`: nothing answers; `frozen`: it accepts and never answers; `none`: this node has no engine by design."""

NodeHealth = Literal["healthy", "unhealthy", "unknown", "engine-down", "unreachable"]
ServiceState = Literal["running", "stopped", "failed", "updating", "unknown", "orphan"]
Outcome = Literal["deployed", "unchanged", "undone", "refused", "unknown", "done", "failed"]
"""How an operation ended. A deploy is deployed, unchanged, undone, refused or unknown; what has no undo is done or failed."""

StepState = Literal["waiting", "running", "done", "unchanged", "failed", "undoing", "undone", "leftover", "unknown"]

PROTOCOL_VERSION = 1
"""Both sides say it at registration; a peer below the minimum is refused by name, never misread."""


# ---------------------------------------------------------------- shared parts


@attrs.frozen(kw_only=True)
class Resources:
    """What a node has and has left, as its own kernel says."""

    cpu_cores: float
    cpu_load: float = 0.0
    """Runnable tasks averaged over a minute (the kernel's load average)."""
    memory_bytes: int
    memory_free_bytes: int
    disk_bytes: int
    disk_free_bytes: int


@attrs.frozen(kw_only=True)
class ContainerState:
    """One container of ours, as the engine sees it; times are RFC 3339 UTC, empty when there is none."""

    service: str
    component: str
    name: str
    container_id: str = ""
    image: str
    state: Literal["created", "running", "restarting", "exited", "paused", "dead", "missing"]
    health: Literal["healthy", "unhealthy", "starting", "none"] = "none"
    exit_code: int = 0
    out_of_memory: bool = False
    restarts: int = 0
    started_at: str = ""
    finished_at: str = ""
    spec_hash: str
    generation: int
    ports: dict[str, str] = attrs.field(factory=dict)
    """Route name ("" for the unnamed one) -> "address:port" on the host."""
    problem: str = ""


@attrs.frozen(kw_only=True)
class Candidate:
    """A generation that was accepted and is not yet the service's own: an unfinished deploy."""

    op: str
    generation: int
    spec: ServiceSpec
    spec_hash: str
    ready: bool = False
    """Every container of it is running and was seen healthy."""


@attrs.frozen(kw_only=True)
class ServiceRecord:
    """What an agent knows of one service: the accepted intent, and what really runs.

    While only a candidate exists, `generation` is 0 and `spec`, `spec_hash` and `op` are the candidate's. `containers`
    has those of every generation.
    """

    service: str
    op: str = ""
    generation: int
    spec: ServiceSpec
    spec_hash: str
    desired: Literal["running", "stopped"]
    candidate: Candidate | None = None
    containers: tuple[ContainerState, ...] = ()
    problems: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class OperationRecord:
    """One line of an agent's journal: the end of an order, kept so that a new master can tell it."""

    op: str
    service: str
    kind: str
    generation: int
    outcome: str
    detail: str = ""
    ended_at: str


@attrs.frozen(kw_only=True)
class ContainerLog:
    """The last lines of a container that failed, for the operator to read."""

    component: str
    container: str
    exit_code: int | None = None
    out_of_memory: bool = False
    lines: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Step:
    """One line of an operation, as the operator sees it."""

    step: str
    node: str
    state: StepState
    seconds: float = 0.0
    detail: str = ""


# -------------------------------------------------------------- frames of calls


@message(Lane.FRAME)
class Failed:
    """The error frame: what could not be done and why; with the failing container's last lines where there is one."""

    code: str
    reason: str
    hint: str = ""
    retryable: bool = False
    logs: tuple[ContainerLog, ...] = ()


@message(Lane.FRAME)
class Done:
    """The final frame of an order or command that has nothing else to say; `detail` may say what was found."""

    changed: bool = True
    detail: str = ""


@message(Lane.FRAME)
class Working:
    """A progress frame of an order: what the agent is doing right now. Also sent when nothing moves, as a sign of life."""

    detail: str = ""
    done: int = 0
    total: int = 0


# ------------------------------------------------------------- agents report


@message(Lane.FRAME)
class Registered:
    """The master's answer to a registration: who is master, and what this node is to get rid of."""

    epoch: int
    heartbeat_s: float = 30.0
    """How often the master wants to hear from its nodes."""
    remove: tuple[str, ...] = ()
    """Services that were removed while the node was away, each "name@generation": nothing newer is touched."""


@attrs.frozen(kw_only=True)
class NodeFacts:
    """What does not change while an agent runs; the incarnation is new at each start of an agent."""

    incarnation: str
    role: Role
    address: str
    arch: str
    version: str
    protocol: int = PROTOCOL_VERSION
    started_at: str
    boot_id: str = ""
    engine: EngineState
    engine_version: str = ""
    resources: Resources


@message(Lane.FRAME)
class Inventory:
    """Everything an agent knows, in as many parts as the message limit asks for; the last one has part == parts."""

    facts: NodeFacts
    services: tuple[ServiceRecord, ...] = ()
    operations: tuple[OperationRecord, ...] = ()
    orphans: tuple[ContainerState, ...] = ()
    """Containers that carry our labels and belong to no accepted intent."""
    problems: tuple[str, ...] = ()
    version: int = 0
    """Grows with every change; a heartbeat repeats it, so a lost event is noticed."""
    part: int = 1
    parts: int = 1


@message(Lane.REGISTER, reply=Registered)
class Register:
    """An agent enters (or re-enters) the fleet with its full inventory."""

    inventory: Inventory


@message(Lane.HEARTBEAT)
class Heartbeat:
    """Sent from the agent's own mailbox, so a stuck agent stops beating."""

    incarnation: str
    sequence: int
    epoch: int = 0
    """The newest master epoch this agent has heard: tells a one-way cut from a dead node."""
    engine: EngineState
    resources: Resources
    containers: int
    inventory_version: int
    clock_s: float
    """The node's wall clock, seconds since 1970: for a warning about skew only."""
    problems: tuple[str, ...] = ()


@message(Lane.NODE_EVENT)
class ServiceChanged:
    """A service on this node is not what it was: the whole new record."""

    incarnation: str
    inventory_version: int
    record: ServiceRecord


@message(Lane.NODE_EVENT)
class ServiceGone:
    """Nothing is left of a service on this node."""

    incarnation: str
    inventory_version: int
    service: str


@message(Lane.NODE_EVENT)
class EngineChanged:
    """The container engine of this node came, went or froze."""

    incarnation: str
    engine: EngineState
    reason: str = ""


@message(Lane.NODE_EVENT)
class NodeLeaving:
    """An agent stops in an orderly way; its services go on."""

    incarnation: str
    reason: str = ""


@attrs.frozen(kw_only=True)
class LogLine:
    """One line of a container's output; `at` is RFC 3339 UTC with nanoseconds, as the engine stamped it."""

    at: str
    component: str
    container: str
    stream: Literal["stdout", "stderr"]
    text: str


@message(Lane.LOG)
class LogLines:
    """Some lines of a log stream; the agent sends no more than its credit allows."""

    stream: str
    sequence: int
    node: str = ""
    lines: tuple[LogLine, ...] = ()


# ---------------------------------------------------------------- master orders


@message(Lane.FRAME)
class ProbeAnswer:
    """A sign of life from the agent itself; never waits behind work in progress."""

    incarnation: str
    engine: EngineState
    inventory_version: int
    busy: tuple[str, ...] = ()
    """Operations this agent has in hand."""


@work(reply=ProbeAnswer)
class Probe:
    """Are you there, and is your engine?"""


@work(reply=Inventory)
class TakeInventory:
    """Tell everything you know; parts before the last come as progress frames."""


@attrs.frozen(kw_only=True)
class ImageFacts:
    """What is known of an image without pulling it; `error` says why nothing is.

    `platforms` are architectures in Docker's words ("amd64", "arm64").
    """

    image: str
    platforms: tuple[str, ...] = ()
    is_local: bool = False
    digest: str = ""
    error: str = ""


@message(Lane.FRAME)
class ImagesDescribed:
    """One entry for each image that was asked about, in order."""

    images: tuple[ImageFacts, ...]


@work(reply=ImagesDescribed)
class DescribeImages:
    """Which platforms do these images exist for? Nothing is pulled."""

    images: tuple[str, ...]


@message(Lane.FRAME)
class ImagesPulled:
    """Every image is on the node; `pulled` names those that were not before."""

    pulled: tuple[str, ...] = ()
    highest_generation: int = 0
    """The highest generation this node has ever accepted for the service, removed ones included (0: none)."""


@work(reply=ImagesPulled)
class PullImages:
    """Have these images on the node; one that is there already is not fetched again (tags are pinned)."""

    service: str
    images: tuple[str, ...]


@message(Lane.FRAME)
class WorkloadRunning:
    """All containers of the generation run and were seen healthy."""

    record: ServiceRecord


@work(reply=WorkloadRunning)
class RunWorkload:
    """Start a generation of a service beside the one that runs, and wait until it is healthy.

    Accepted only when `generation` is newer than all the agent has accepted. With `spec.stops_first` the old
    containers are stopped before, and started again if the new ones fail. Asked twice, it gives the same reply.
    """

    service: str
    generation: int
    spec: ServiceSpec
    spec_hash: str


@work(reply=Done)
class CommitWorkload:
    """Make the generation the service's own, then stop and remove all older containers of it. No way back."""

    service: str
    generation: int


@work(reply=Done)
class DropWorkload:
    """Undo RunWorkload: remove the generation's containers and its intent; start the older ones if they were stopped."""

    service: str
    generation: int


@work(reply=Done)
class RemoveWorkload:
    """Remove every container and record of a service up to and including `generation`."""

    service: str
    generation: int


@work(reply=WorkloadRunning)
class StopWorkload:
    """Stop the service's containers and remember that they shall stay so."""

    service: str
    generation: int


@work(reply=WorkloadRunning)
class StartWorkload:
    """Start the service's containers (made anew where they are missing) and wait until they are healthy."""

    service: str
    generation: int


@work(reply=WorkloadRunning)
class RestartWorkload:
    """Restart the service's containers one component after the other, waiting for health."""

    service: str
    generation: int


@work(reply=Done)
class AbandonWork:
    """Stop working on an operation at the next safe point (an operator cancelled it)."""

    target_op: str


@work(reply=Done)
class StreamLogs:
    """Send the output of a service's containers on this node's log lane as `LogLines` of the given stream.

    Ends when the containers end (or at once without `follow`), when cancelled, or when no credit came for 60 s.
    """

    stream: str
    service: str
    follow: bool = False
    tail: int = -1
    """Lines of each container to begin with; -1 means all."""
    since_s: float = 0.0
    """Only lines younger than this many seconds; 0 means no limit."""
    credit: int = 16


@work(reply=Done)
class GrantLogCredit:
    """Allow so many more `LogLines` messages of a stream; 0 ends it."""

    stream: str
    credit: int


# -------------------------------------------------------------- operators ask


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


@attrs.frozen(kw_only=True)
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


@attrs.frozen(kw_only=True)
class CertificateRow:
    """A certificate that really serves a route."""

    names: tuple[str, ...] = ()
    not_after: str = ""
    serial: str = ""


@attrs.frozen(kw_only=True)
class RouteRow:
    """A route as status shows it."""

    hostname: str
    public: bool
    mode: str
    listener: str
    node: str
    backend: str = ""
    certificate: CertificateRow | None = None


@attrs.frozen(kw_only=True)
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


@attrs.frozen(kw_only=True)
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


@attrs.frozen(kw_only=True)
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


@attrs.frozen(kw_only=True)
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


# ----------------------------------------------------------------- nodes join


@message(Lane.FRAME)
class Joined:
    """Welcome: everything the node needs to connect as itself."""

    node: str
    role: Role
    ca_pem: str
    tls_name: str
    master: str
    settings: dict[str, str] = attrs.field(factory=dict)
    """Fleet-wide settings a node's first configuration file is written from, e.g. the internal zone."""


@message(Lane.JOIN, reply=Joined)
class Join:
    """A new node shows its public key; the private one never leaves it."""

    node: str
    public_key: str
    address: str
    arch: str
    version: str


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
