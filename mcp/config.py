"""Configuration: TOML files to frozen classes; a mistake is answered with file, line, key and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import attrs

from mcp.model.definition import DEFAULT_ZONE
from mcp.model.errors import AdapterError, BadDefinition
from mcp.model.names import is_node_name
from mcp.model.tables import Document, Table

HOME = "/srv/mcp"
"""Where everything of a node lies, unless `--home` says otherwise."""


@attrs.frozen(kw_only=True)
class BusConfig:
    """mcp-bus.toml: where nats-server listens, and where its files lie."""

    address: str = "127.0.0.1"
    port: int = 4222
    state: str = f"{HOME}/bus"
    keys: str = f"{HOME}/keys"
    binary: str = ""


@attrs.frozen(kw_only=True)
class BusAccess:
    """[bus] of whoever connects: where it is, how to know it, which key to show."""

    address: str = "127.0.0.1"
    port: int = 4222
    tls_name: str = "mcp-bus"
    ca_file: str = f"{HOME}/keys/bus-ca.pem"
    ca_pem: str = ""
    key_file: str = ""


@attrs.frozen(kw_only=True)
class MasterConfig:
    """mcp-master.toml."""

    node: str
    keys: str = f"{HOME}/keys"
    state: str = f"{HOME}/master"
    lock: str = f"{HOME}/master/lock"
    bus: BusAccess = attrs.field(factory=BusAccess)
    answers_key_file: str = f"{HOME}/keys/answers.nkey"
    system_key_file: str = f"{HOME}/keys/system.nkey"
    enrolment: str = f"{HOME}/bus"
    internal_zone: str = DEFAULT_ZONE
    allowed_domains: tuple[str, ...] = ()
    mesh: tuple[str, ...] = ("100.64.0.0/10",)
    heartbeat_s: float = 30.0
    missed: int = 3
    probe_timeout_s: float = 5.0
    census_timeout_s: float = 3.0
    census_grace_s: float = 2.0
    clock_skew_s: float = 30.0
    max_nodes: int = 16
    registrations_per_minute: int = 3
    messages_per_second: int = 50
    invitation_s: float = 300.0
    operation_timeout_s: float = 3600.0
    return_timeout_s: float = 60.0


@attrs.frozen(kw_only=True)
class AgentConfig:
    """mcp-agent.toml; tables of the proxy, the CAs and the name servers are kept as they are for those adapters."""

    name: str
    role: str = "worker"
    address: str = "127.0.0.1"
    arch: str = ""
    state: str = f"{HOME}/agent"
    bus: BusAccess = attrs.field(factory=BusAccess)
    containers: str = "docker"
    docker_url: str = "unix:///var/run/docker.sock"
    network: str = "mcpnet"
    publish_address: str = "127.0.0.1"
    is_shared: bool = False
    """Other agents use the same engine (the demo): this one looks at the containers of its own node only."""
    request_timeout_s: float = 10.0
    registries: dict[str, tuple[str, str]] = attrs.field(factory=dict)
    """ "host:port" -> user name and the file with the password. """
    first_port: int = 10_000
    last_port: int = 60_000
    heartbeat_s: float = 30.0


@attrs.frozen(kw_only=True)
class CliConfig:
    """~/.config/mcp/mcp.toml, and what `mcp operator add` prints."""

    operator: str
    seed: str = attrs.field(repr=False)
    bus: BusAccess = attrs.field(factory=BusAccess)
    services: str = ""
    timeout_s: float = 0.0


# ---------------------------------------------------------------------- loading


def read_document(path: str | Path) -> Document:
    """Return a TOML file.

    Raises:
        BadDefinition: it is not there, not readable, not UTF-8 or no TOML.
    """
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise BadDefinition("is not UTF-8 text", file=str(path)) from error
    except OSError as error:
        raise BadDefinition(f"cannot be read: {(error.strerror or str(error)).lower()}", file=str(path)) from error
    return Document(text, file=str(path))


def load_bus(path: str | Path) -> BusConfig:
    """Return mcp-bus.toml.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
    """
    root = _root(path)
    bus = root.table("bus")
    config = BusConfig(
        address=bus.get("address", str, BusConfig().address),
        port=_port(bus, "port", 4222),
        state=_path(bus, "state", BusConfig().state),
        keys=_path(bus, "keys", BusConfig().keys),
        binary=bus.get("binary", str, ""),
    )
    _done(root, bus)
    return config


def load_master(path: str | Path) -> MasterConfig:
    """Return mcp-master.toml.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
    """
    root = _root(path)
    master, bus, health = root.table("master"), root.table("bus"), root.table("health")
    names, edge, limits, deploy = root.table("names"), root.table("edge"), root.table("limits"), root.table("deploy")
    base = MasterConfig(node="x")
    config = MasterConfig(
        node=_node_name(master, "node"),
        keys=_path(master, "keys", base.keys),
        state=_path(master, "state", base.state),
        lock=_path(master, "lock", base.lock),
        answers_key_file=_path(bus, "answers_key_file", base.answers_key_file),
        system_key_file=_path(bus, "system_key_file", base.system_key_file),
        enrolment=_path(bus, "enrolment", base.enrolment),
        bus=_access(bus, key_file=f"{HOME}/keys/master.nkey"),
        internal_zone=names.get("internal_zone", str, base.internal_zone),
        allowed_domains=edge.strings("allowed_domains"),
        mesh=edge.strings("mesh") or base.mesh,
        heartbeat_s=_seconds(health, "heartbeat_s", base.heartbeat_s),
        missed=_count(health, "missed", base.missed),
        probe_timeout_s=_seconds(health, "probe_timeout_s", base.probe_timeout_s),
        census_timeout_s=_seconds(health, "census_timeout_s", base.census_timeout_s),
        census_grace_s=_seconds(health, "census_grace_s", base.census_grace_s),
        clock_skew_s=_seconds(health, "clock_skew_s", base.clock_skew_s),
        max_nodes=_count(limits, "max_nodes", base.max_nodes),
        registrations_per_minute=_count(limits, "registrations_per_minute", base.registrations_per_minute),
        messages_per_second=_count(limits, "messages_per_second", base.messages_per_second),
        invitation_s=_seconds(limits, "invitation_s", base.invitation_s),
        operation_timeout_s=_seconds(deploy, "operation_timeout_s", base.operation_timeout_s),
        return_timeout_s=_seconds(deploy, "return_timeout_s", base.return_timeout_s),
    )
    _done(root, master, bus, health, names, edge, limits, deploy)
    return config


LATER_TABLES = ("proxy", "acme", "rfc2136", "mcns", "local-ca")
"""Tables of an agent's file that belong to adapters; each of those reads its own."""


def load_agent(path: str | Path) -> AgentConfig:
    """Return mcp-agent.toml.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
    """
    root = _root(path)
    node, bus, adapters, docker = root.table("node"), root.table("bus"), root.table("adapters"), root.table("docker")
    ports, health = root.table("ports"), root.table("health")
    base = AgentConfig(name="x")
    role = node.choice("role", ("master", "worker", "edge"), "worker")
    config = AgentConfig(
        name=_node_name(node, "name"),
        role=role,
        address=node.get("address", str, base.address),
        arch=node.get("arch", str, ""),
        state=_path(node, "state", base.state),
        bus=_access(bus, key_file=f"{HOME}/keys/agent.nkey"),
        containers=adapters.choice("containers", ("docker", "none"), "none" if role == "edge" else "docker"),
        docker_url=docker.get("url", str, base.docker_url),
        network=docker.get("network", str, base.network),
        publish_address=docker.get("publish_address", str, base.publish_address),
        is_shared=docker.get("is_shared", bool, False),
        request_timeout_s=_seconds(docker, "request_timeout_s", base.request_timeout_s),
        registries=_registries(root.table("registry")),
        first_port=_port(ports, "first", base.first_port),
        last_port=_port(ports, "last", base.last_port),
        heartbeat_s=_seconds(health, "heartbeat_s", base.heartbeat_s),
    )
    for key in ("routes", "internal_certificates", "public_certificates", "names"):
        adapters.get(key, str, "none")
    for name in LATER_TABLES:
        root.raw(name)
    if config.role == "edge" and config.containers != "none":
        raise adapters.error("containers", 'an edge node runs no containers: write "none"')
    if config.first_port > config.last_port:
        raise ports.error("first", f"{config.first_port} is above last ({config.last_port})")
    _done(root, node, bus, adapters, docker, ports, health)
    return config


def load_cli(path: str | Path) -> CliConfig:
    """Return an operator's file.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
    """
    root = _root(path)
    operator, services, defaults = root.table("operator"), root.table("services"), root.table("defaults")
    bus = root.table("bus")
    config = CliConfig(
        operator=_node_name(operator, "name"),
        seed=operator.need("seed", str),
        bus=_access(bus, key_file=""),
        services=services.get("folder", str, ""),
        timeout_s=defaults.get("timeout_s", float, 0.0),
    )
    _done(root, operator, services, defaults, bus)
    return config


# ---------------------------------------------------------------------- helpers


def _root(path: str | Path) -> Table:
    document = read_document(path)
    return Table(document, document.root)


def _done(*tables: Table) -> None:
    for table in tables:
        table.done()


def _access(bus: Table, *, key_file: str) -> BusAccess:
    return BusAccess(
        address=bus.get("address", str, BusAccess().address),
        port=_port(bus, "port", 4222),
        tls_name=bus.get("tls_name", str, BusAccess().tls_name),
        ca_file=_path(bus, "ca_file", BusAccess().ca_file),
        ca_pem=bus.get("ca_pem", str, ""),
        key_file=_path(bus, "key_file", key_file),
    )


def _path(table: Table, key: str, default: str) -> str:
    value = table.get(key, str, default)
    if value and not value.startswith("/"):
        raise table.error(key, f"{value!r} is no absolute path")
    return value


def _port(table: Table, key: str, default: int) -> int:
    value = table.get(key, int, default)
    if not 0 < value < 65536:
        raise table.error(key, f"{value} is no port: 1 to 65535")
    return value


def _seconds(table: Table, key: str, default: float) -> float:
    value = table.get(key, float, default)
    if not 0 < value < 1e7:
        raise table.error(key, f"{value:g} s is out of range")
    return value


def _count(table: Table, key: str, default: int) -> int:
    value = table.get(key, int, default)
    if not 0 < value <= 100_000:
        raise table.error(key, f"{value} is out of range")
    return value


def _node_name(table: Table, key: str) -> str:
    name = table.need(key, str)
    if not is_node_name(name):
        raise table.error(key, f"{name[:60]!r} is no name: lower-case letters, digits and dashes, at most 32")
    return name


def _registries(table: Table) -> dict[str, tuple[str, str]]:
    made = {}
    for host in table.keys():  # noqa: SIM118 - a Table is no mapping
        entry = table.table(host)
        made[host] = (entry.need("username", str), _path(entry, "password_file", ""))
        entry.done()
    return made


def read_passwords(registries: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Return user name and password for each registry.

    Raises:
        AdapterError: a password file cannot be read.
    """
    made = {}
    for host, (user, file) in registries.items():
        try:
            made[host] = (user, Path(file).read_text().strip())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise AdapterError(f"cannot read the password for registry {host} from {file}: {reason.lower()}") from error
    return made
