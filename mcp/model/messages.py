"""What agents and the master say to each other: every message is declared once, with its lane.

Read top to bottom: the parts that messages share, the frames of calls, what agents report, what the master orders, how nodes
join. What operators ask is in operator_messages.py. A new message: docs/adding-a-message.md.
"""

from __future__ import annotations

from typing import Literal

import attrs

from mcp.model.catalogue import Lane, message, work
from mcp.model.spec import ServiceSpec
from mcp.model.values import frozen

Role = Literal["master", "worker", "edge"]
EngineState = Literal["up", "down", "frozen", "none"]
"""`down`: nothing answers; `frozen`: it accepts and never answers; `none`: this node has no engine by design."""

PROTOCOL_VERSION = 1
"""Both sides say it at registration; a peer below the minimum is refused by name, never misread."""


# ---------------------------------------------------------------- shared parts


@frozen(kw_only=True)
class Resources:
    """What a node has and has left, as its own kernel says."""

    cpu_cores: float
    cpu_load: float = 0.0
    """Runnable tasks averaged over a minute (the kernel's load average)."""
    memory_bytes: int
    memory_free_bytes: int
    disk_bytes: int
    disk_free_bytes: int


@frozen(kw_only=True)
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


@frozen(kw_only=True)
class Candidate:
    """A generation that was accepted and is not yet the service's own: an unfinished deploy."""

    op: str
    generation: int
    spec: ServiceSpec
    spec_hash: str
    ready: bool = False
    """Every container of it is running and was seen healthy."""


@frozen(kw_only=True)
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


@frozen(kw_only=True)
class OperationRecord:
    """One line of an agent's journal: the end of an order, kept so that a new master can tell it."""

    op: str
    service: str
    kind: str
    generation: int
    outcome: str
    detail: str = ""
    ended_at: str


@frozen(kw_only=True)
class ContainerLog:
    """The last lines of a container that failed, for the operator to read."""

    component: str
    container: str
    exit_code: int | None = None
    out_of_memory: bool = False
    lines: tuple[str, ...] = ()


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


@frozen(kw_only=True)
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


@frozen(kw_only=True)
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


@frozen(kw_only=True)
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
