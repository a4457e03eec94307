"""The composition root: configuration to bus, adapters and actors. The one place that knows which adapter meets which port.

Only the adapters that the configuration names are imported: an agent without an engine never loads an engine client.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import linecache
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mcp import __version__
from mcp.bus.codec import from_plain, to_plain
from mcp.bus.keys import read_key
from mcp.bus.nats_bus import BusAddress, Credential, NatsTransport, connect
from mcp.bus.subjects import ConnectionRole
from mcp.config.reading import BusAccess
from mcp.model.errors import AdapterError, Refused
from mcp.model.spec import ServiceSpec

if TYPE_CHECKING:
    from mcp.config.agent import AgentConfig
    from mcp.config.master import MasterConfig

log = logging.getLogger(__name__)


def bus_address(access: BusAccess) -> BusAddress:
    """Return where the bus is and how to know it.

    Raises:
        AdapterError: the CA's file cannot be read.
    """
    pem = access.ca_pem
    if not pem:
        try:
            pem = Path(access.ca_file).read_text()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise AdapterError(
                f"cannot read the bus's CA certificate {access.ca_file}: {reason}",
                hint="`mcp init` writes it on the master's machine, `mcp-agent join` on any other.",
            ) from error
    return BusAddress(host=access.address, port=access.port, tls_name=access.tls_name, ca_pem=pem)


async def open_bus(
    access: BusAccess, role: ConnectionRole, name: str, key_file: str, *, forever: bool = True
) -> NatsTransport:
    """Connect with a key from a file.

    Raises:
        AdapterError: the key or the CA cannot be read.
        BusError: see nats_bus.connect.
    """
    key = read_key(Path(key_file))
    credential = Credential(role=role, name=name, seed=key.seed)
    return await connect(bus_address(access), credential, forever=forever, name=f"mcp {role} {name}")


# ----------------------------------------------------------------------- master


@contextlib.contextmanager
def only_master(path: str, node: str) -> Any:
    """Hold the master's lock; a second master on this machine is told who holds it.

    Raises:
        Refused: another master holds it.
    """
    lock = Path(path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle: IO[str] = lock.open("a+")
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise Refused(
                "second_master",
                f"cannot start a master on {node}: another master holds this bus ({holder})",
                hint="Stop that one first: two masters would give orders against each other.",
            ) from error
        handle.truncate(0)
        handle.write(f"pid {os.getpid()}, started {_now()}\n")
        handle.flush()
        yield
    finally:
        handle.close()


def _now() -> str:
    from mcp.adapters.clock import SystemClock
    from mcp.model.views import rfc3339

    return rfc3339(SystemClock().wall_s())


async def run_master(config: MasterConfig, *, ready: Callable[[], None] = lambda: None) -> None:
    """Run the master until cancelled.

    Raises:
        McpError: another master runs, a file cannot be read, or the bus does not accept the master's keys.
    """
    from mcp.actors.master import MasterActor, Welcome
    from mcp.adapters.clock import RandomIds, SystemClock
    from mcp.bus.enrolment import FileEnrolment
    from mcp.bus.links import MasterLink
    from mcp.bus.place import ServerPlace
    from mcp.bus.system import System
    from mcp.model.fleet import HealthRules
    from mcp.model.master import Master, MasterRules

    clock = SystemClock()
    with only_master(config.lock, config.node):
        epoch = next_epoch(Path(config.state), clock.wall_s())
        async with contextlib.AsyncExitStack() as stack:
            hearing = await _opened(stack, config.bus, "master", config.node, config.bus.key_file)
            answering = await _opened(stack, config.bus, "answers", config.node, config.answers_key_file)
            system = System(await _opened(stack, config.bus, "system", config.node, config.system_key_file))
            await system.start()
            place = ServerPlace(config.bus.address, config.bus.port, Path(config.enrolment), Path(config.keys))
            enrolment = FileEnrolment(
                place, clock, system, max_nodes=config.max_nodes, invitation_s=config.invitation_s
            )
            await enrolment.reconcile()
            rules = MasterRules(
                node=config.node,
                internal_zone=config.internal_zone,
                health=HealthRules(
                    heartbeat_s=config.heartbeat_s, missed=config.missed, clock_skew_s=config.clock_skew_s
                ),
                probe_timeout_s=config.probe_timeout_s,
                census_timeout_s=config.census_timeout_s,
                census_grace_s=config.census_grace_s,
                max_nodes=config.max_nodes,
                registrations_per_minute=config.registrations_per_minute,
                operation_timeout_s=config.operation_timeout_s,
                return_timeout_s=config.return_timeout_s,
            )
            link = MasterLink(hearing, answering, clock, epoch, flood_limit=config.messages_per_second)
            actor = MasterActor(
                master=Master(rules=rules, epoch=epoch),
                link=link,
                enrolment=enrolment,
                disconnects=_Disconnects(system),
                clock=clock,
                ids=RandomIds(),
                welcome=Welcome(
                    ca_pem=bus_address(config.bus).ca_pem,
                    tls_name=config.bus.tls_name,
                    settings={"internal_zone": config.internal_zone, "heartbeat_s": f"{config.heartbeat_s:g}"},
                ),
            )
            await _serve(actor.run(), hearing, ready)


def next_epoch(state: Path, wall_s: float) -> int:
    """Return a number above every epoch this machine has used: the time in milliseconds, or one more than the last.

    Agents remember the highest they obeyed, so that a deposed or cloned master is not obeyed any more.
    """
    file = state / "epoch"
    try:
        last = int(file.read_text())
    except (OSError, ValueError):
        last = 0
    epoch = max(int(wall_s * 1000), last + 1)
    with contextlib.suppress(OSError):  # a full disk: the clock alone still orders the epochs
        state.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{epoch}\n")
    return epoch


class _Disconnects:
    """Lets the system account's reports reach the master actor."""

    def __init__(self, system: Any) -> None:
        self._system = system

    async def watch(self, on_gone: Callable[[str, str], None]) -> None:
        """Call back with the public key and a reason for each connection that ends."""
        self._system.on_gone = lambda public_key, client_id, reason: on_gone(public_key, reason)


# ----------------------------------------------------------------------- agents


async def run_agent(config: AgentConfig, *, ready: Callable[[], None] = lambda: None) -> None:
    """Run an agent until cancelled; it says goodbye, its services go on.

    Raises:
        McpError: a file cannot be read, or the bus does not accept the node's key.
    """
    from mcp.actors.agent import AgentActor, AgentFacts
    from mcp.actors.node_state import NodeState
    from mcp.adapters.clock import RandomIds, SystemClock
    from mcp.adapters.health import NetworkChecks
    from mcp.adapters.host import LinuxHost
    from mcp.adapters.records import SqliteRecords
    from mcp.bus.links import AgentLink
    from mcp.model.container import ContainerDefaults

    clock = SystemClock()
    state = Path(config.state)
    records = SqliteRecords(state / "records.db", to_text=spec_to_text, from_text=text_to_spec)
    await records.open()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(records.close)
        engine = await stack.enter_async_context(_engine(config))
        node = NodeState(
            records=records,
            host=LinuxHost(config.state, arch=config.arch),
            clock=clock,
            checks=NetworkChecks(),
            defaults=ContainerDefaults(
                node=config.name, network=config.network, publish_address=config.publish_address
            ),
            spec_to_text=spec_to_text,
            engine=engine,
            port_range=(config.first_port, config.last_port),
            own_paths=(config.state, str(Path(config.bus.key_file or config.state).absolute().parent)),
        )
        facts = AgentFacts(
            incarnation=RandomIds().new_id(),
            role=config.role,  # type: ignore[arg-type]
            address=config.address,
            version=__version__,
            started_at=node.now(),
            heartbeat_s=config.heartbeat_s,
        )
        transport = await _opened(stack, config.bus, "agent", config.name, config.bus.key_file)
        actor = AgentActor(facts, node, AgentLink(transport, config.name, clock))
        give_back()
        try:
            await _serve(actor.run(), transport, ready)
        finally:
            await actor.leave()


def give_back() -> None:
    """Give memory back that only the start needed: an agent lives for months beside somebody else's services.

    The sources of the methods that attrs and cattrs generate, and what Python has left on the heap if it had to compile this
    program: 0.2 and 1.1 MiB (measured).
    """
    linecache.clearcache()
    gc.collect()
    if Path(__spec__.cached or "").is_file():
        return  # there was nothing to compile, and ctypes takes 0.4 MiB itself
    with contextlib.suppress(ImportError, OSError, AttributeError):  # another C library has no such call
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


@asynccontextmanager
async def _engine(config: AgentConfig) -> AsyncIterator[Any]:
    """Give the three engine ports, or None where the configuration names no engine."""
    if config.containers == "none":
        yield None
        return
    from mcp.adapters.docker import DockerEngine
    from mcp.config.agent import read_passwords

    engine = DockerEngine(
        config.docker_url,
        registries=read_passwords(config.registries),
        request_timeout_s=config.request_timeout_s,
        node=config.name if config.is_shared else "",
        arch=config.arch,
    )
    try:
        yield engine, engine, engine
    finally:
        await engine.close()


def spec_to_text(spec: ServiceSpec) -> str:
    """Return a spec as it lies in records and labels."""
    return json.dumps(to_plain(spec), separators=(",", ":"))


def text_to_spec(text: str) -> ServiceSpec:
    """Read it back.

    Raises:
        MalformedMessage: it is no spec of ours.
    """
    from mcp.model.errors import MalformedMessage

    try:
        plain = json.loads(text)
    except ValueError as error:
        raise MalformedMessage("not JSON") from error
    return from_plain(ServiceSpec, plain)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- helpers


async def _opened(
    stack: contextlib.AsyncExitStack, access: BusAccess, role: ConnectionRole, name: str, key_file: str
) -> NatsTransport:
    transport = await open_bus(access, role, name, key_file)
    stack.push_async_callback(transport.close)
    return transport


async def _serve(actor: Any, transport: NatsTransport, ready: Callable[[], None]) -> None:
    """Run an actor until it is cancelled, or until the bus will not have us any more.

    Raises:
        Refused: the bus does not accept the credential any more.
    """
    running = asyncio.ensure_future(actor)
    ready()
    try:
        while not running.done():
            await asyncio.wait([running], timeout=1.0)
            if transport.closed_because:
                raise Refused(
                    "credential_refused", transport.closed_because, hint="It was removed, or belongs to another fleet."
                )
        await running
    finally:
        while not running.done():
            running.cancel()  # again and again: a library that takes a cancellation for nothing must not keep us alive
            await asyncio.wait([running], timeout=1.0)
