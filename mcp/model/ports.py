"""The ports: what the actors ask of the world, in the model's terms; one adapter class each, one contract suite each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Literal, Protocol

import attrs

from mcp.model.messages import (
    ContainerState,
    ImageFacts,
    LogLine,
    OperationRecord,
    Resources,
)
from mcp.model.spec import HealthSpec, ServiceSpec
from mcp.model.values import frozen

Progress = Callable[[str, int, int], None]
"""Called with what is happening, how much of it is done and how much there is (bytes or steps; 0, 0 when unknown)."""


# ------------------------------------------------------------------ containers


@frozen(kw_only=True)
class PortBinding:
    """A host address and port that forwards to a port in the container."""

    address: str
    host_port: int
    container_port: int
    protocol: Literal["tcp", "udp"] = "tcp"


@frozen(kw_only=True)
class ContainerRequest:
    """Everything the engine needs for one container; made by model/container.py, never by an adapter."""

    name: str
    image: str
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = attrs.field(factory=dict)
    labels: dict[str, str] = attrs.field(factory=dict)
    binds: tuple[str, ...] = ()
    """ "host:container[:ro]" """
    network: str = ""
    user: str = ""
    restart: str = "unless-stopped"
    ports: tuple[PortBinding, ...] = ()
    memory_bytes: int = 0
    cpu_cores: float = 0.0
    stop_grace_s: float = 10.0


@frozen(kw_only=True)
class EngineFacts:
    """What an engine says of itself."""

    version: str
    api_version: str
    arch: str
    """In Docker's words: amd64, arm64."""
    name: str = "docker"


@frozen(kw_only=True)
class EngineEvent:
    """Something happened to a container of ours, or to the engine itself (then `name` is empty)."""

    action: Literal["create", "start", "die", "stop", "destroy", "oom", "health", "engine-up", "engine-down"]
    name: str = ""
    service: str = ""
    detail: str = ""


class Images(Protocol):
    """What an engine knows of images. All calls raise AdapterError and end by their own deadline."""

    async def describe(self, image: str) -> ImageFacts:
        """Say for which platforms an image exists, without pulling; trouble is in `ImageFacts.error`, not raised."""

    async def pull(self, image: str, on_progress: Progress) -> bool:
        """Fetch an image unless it is there; return whether anything was fetched.

        Raises:
            AdapterError: with the registry's own words; never with a credential in them. There is no overall deadline,
                only one on silence.
        """


class Containers(Protocol):
    """The containers of ours on one node. Every call ends by its own deadline and raises AdapterError.

    After an error that leaves the outcome open the caller looks (`list`) before it acts again.
    """

    async def facts(self) -> EngineFacts:
        """Return what the engine says of itself; the cheapest way to see whether it answers (code engine_down, engine_frozen)."""

    async def list(self, service: str = "") -> list[ContainerState]:
        """Return our containers (those with our labels), running or not, of one service or of all."""

    async def label(self, service: str, generation: int, name: str) -> str:
        """Return a label of a generation's containers, "" when none has it: lost records are made anew from labels."""

    async def create(self, request: ContainerRequest) -> ContainerState:
        """Create and do not start. A container of that name and spec hash is adopted, whatever state it is in.

        Raises:
            AdapterError: code name_taken when somebody else's container has the name, image_missing, engine_down...
        """

    async def start(self, name: str) -> ContainerState:
        """Start; running already is fine. On failure the container is left as it was created, for the caller to remove.

        Raises:
            AdapterError: code port_in_use, bad_command, bad_mount, address_missing, container_missing...
        """

    async def stop(self, name: str, grace_s: float) -> ContainerState | None:
        """Stop within the grace time, then kill; stopped or absent already is fine."""

    async def remove(self, name: str) -> bool:
        """Remove, running or not, its anonymous volumes too; absent is not an error. Return whether it was there."""


class ContainerOutput(Protocol):
    """What containers say and do."""

    def logs(self, name: str, *, follow: bool = False, tail: int = -1, since_s: float = 0.0) -> AsyncIterator[LogLine]:
        """Yield whole lines with the engine's time stamps, stdout and stderr told apart.

        Ends when the container ends; raises AdapterError when the engine goes away in the middle.
        """

    def events(self) -> AsyncIterator[EngineEvent]:
        """Yield events of our containers for ever.

        The first says whether the engine is there: `engine-up`, from when on nothing is missed, or `engine-down`. When it
        goes, one `engine-down` is yielded, and one `engine-up` when it is back; what happened in between is not
        replayed: list again. A frozen engine is neither: what it has to tell comes when it goes on.
        """

    async def execute(self, name: str, cmd: Sequence[str], timeout_s: float) -> tuple[int, str]:
        """Run a command in a container and return its exit code and the first 4 KiB of its output."""


# ------------------------------------------------------------- the node itself


class HealthChecks(Protocol):
    """Is something answering where the container should?"""

    async def check(self, health: HealthSpec, address: str, port: int, *, speaks_http: bool) -> str:
        """Return "" when healthy, else what was seen ("connection refused", "HTTP 503"). Never raises; ends in 5 s.

        Without a path a connection must be accepted and held: the engine's own port forwarder accepts at once and hangs
        up when nothing listens behind it. `speaks_http` lets the check ask for "/" to see that sooner.
        """


class Host(Protocol):
    """The machine an agent runs on."""

    def resources(self) -> Resources:
        """Return what the kernel says now."""

    def is_port_free(self, address: str, port: int) -> bool:
        """Say whether a listener could be opened there now."""

    def real_path(self, path: str) -> str:
        """Resolve symlinks, as the mount would."""

    boot_id: str
    arch: str


@frozen(kw_only=True)
class Intent:
    """What an agent has accepted for a service, as it lies in its records."""

    service: str
    op: str
    generation: int
    spec: ServiceSpec
    spec_hash: str
    desired: Literal["running", "stopped"]
    is_candidate: bool = False
    """Accepted and not committed: an older generation may still be the service's own."""
    ready: bool = False


class Records(Protocol):
    """An agent's durable memory. Every call is on disk when it returns (SQLite, synchronous=FULL).

    Raises:
        AdapterError: code disk_full or records_failed; then the order is refused and nothing was accepted.
    """

    rebuilt_reason: str
    """Why the records had to be begun anew when they were opened; "" when they were not."""

    async def intents(self) -> list[Intent]:
        """Return all intents: at most one committed and one candidate for each service."""

    async def accept(self, intent: Intent, ports: Mapping[tuple[str, str], int] | None = None) -> None:
        """Write an intent, in place of the one of the same service and kind (candidate or committed).

        With `ports`, (component, route) -> host port of that generation, in the same transaction.
        """

    async def commit(self, service: str, generation: int) -> None:
        """Make the candidate of that generation the service's committed intent; done already is fine."""

    async def forget(self, service: str, generation: int, *, candidate_only: bool = False) -> None:
        """Drop a service's intents up to and including a generation (and its ports)."""

    async def ports_of(self, service: str, generation: int) -> dict[tuple[str, str], int]:
        """Return the host ports of a generation: (component, route) -> port."""

    async def ports(self) -> set[int]:
        """Return every host port that any generation has."""

    async def finish(self, record: OperationRecord, reply: bytes) -> None:
        """Remember the end of an order with its encoded reply, so that the same order again gets the same answer."""

    async def finished(self, key: str) -> bytes | None:
        """Return the reply of an order that was answered before (op and kind), within the last 24 h."""

    async def operations(self, limit: int = 50) -> list[OperationRecord]:
        """Return the youngest ends of orders."""

    async def highest_generation(self, service: str) -> int:
        """Return the highest generation ever accepted for a service (0: none), removed ones included."""

    async def highest_epoch(self) -> int:
        """Return the highest master epoch ever obeyed."""

    async def raise_epoch(self, epoch: int) -> None:
        """Remember an epoch; lower ones are ignored."""

    async def close(self) -> None:
        """Close the file."""


# --------------------------------------------------------- time, ids, the fleet


class Clock(Protocol):
    """Time, injected everywhere."""

    def monotonic_s(self) -> float:
        """Return seconds that only grow; for durations and deadlines."""

    def wall_s(self) -> float:
        """Return seconds since 1970; for people and certificates only."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""


class IdSource(Protocol):
    """Names for operations and incarnations."""

    def new_id(self) -> str:
        """Return a fresh short id, e.g. "4f2c9a1b": 8 hex digits, unique within a fleet's memory."""


@frozen(kw_only=True)
class Enrolled:
    """A node that may connect, as the bus's enrolment files say."""

    name: str
    role: Literal["master", "worker", "edge"]
    public_key: str


class Enrolment(Protocol):
    """Who may connect to the bus (mcp/bus/enrolment.py); used by the master actor.

    Raises:
        AdapterError: the change was not made: the bus's configuration is as it was.
    """

    async def nodes(self) -> list[Enrolled]:
        """Return every enrolled node."""

    async def invite(self, node: str, role: str) -> tuple[str, float]:
        """Return a token for one join and how many seconds it is valid.

        Raises:
            Refused: the name is taken, illegal or reserved.
        """

    async def redeem(self, invitation: str, public_key: str) -> Enrolled:
        """Turn an open invitation into an enrolled node; the invitation is used up.

        Raises:
            Refused: used, expired or unknown.
        """

    async def settle(self, node: str) -> None:
        """The node has registered: its join credential may go."""

    async def remove(self, node: str) -> None:
        """Forget a node; its live connections are cut."""

    async def sweep(self) -> None:
        """Remove invitations that expired."""
