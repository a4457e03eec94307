"""Configuration: TOML files to frozen classes; a mistake is answered with file, line, key and what was probably meant.

What may stand in a file is declared in its schema; what is left out is as the class of the file says.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from mcp.bus.files import read_private
from mcp.model.errors import AdapterError, BadDefinition
from mcp.model.names import DEFAULT_ZONE, is_domain, is_node_name
from mcp.model.tables import (
    MAX_FILE_BYTES,
    Document,
    Key,
    Schema,
    Table,
    choice,
    document_of,
    flag,
    integer,
    matching,
    number,
    port,
    string,
)

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
    """The CA's certificate itself, in place of the file."""
    key_file: str = ""


@attrs.frozen(kw_only=True)
class MasterConfig:
    """mcp-master.toml."""

    node: str
    keys: str = f"{HOME}/keys"
    state: str = f"{HOME}/master"
    lock: str = f"{HOME}/master/lock"
    bus: BusAccess = BusAccess(key_file=f"{HOME}/keys/master.nkey")
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
class ProxyAccess:
    """[proxy]: where the proxy's admin API is."""

    address: str = "unix:/run/mcp/proxy.sock"


@attrs.frozen(kw_only=True)
class AcmeConfig:
    """[acme]: the authority that issues certificates, and how it is shown that we may have one."""

    directory: str = ""
    ca_file: str = ""
    email: str = ""
    challenge: str = "http-01"
    eab_url: str = ""
    eab_token_file: str = ""


@attrs.frozen(kw_only=True)
class Rfc2136Config:
    """[rfc2136]: the name server that takes signed updates."""

    server: str = ""
    zone: str = ""
    key_name: str = "mcp"
    key_file: str = ""
    algorithm: str = "hmac-sha256"


@attrs.frozen(kw_only=True)
class AgentConfig:
    """mcp-agent.toml."""

    name: str
    role: str = "worker"
    address: str = "127.0.0.1"
    arch: str = ""
    """In Docker's words; empty: what the machine says."""
    state: str = f"{HOME}/agent"
    bus: BusAccess = BusAccess(key_file=f"{HOME}/keys/agent.nkey")
    containers: str = "docker"
    routes: str = "none"
    internal_certificates: str = "none"
    public_certificates: str = "none"
    names: str = "none"
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
    proxy: ProxyAccess = ProxyAccess()
    acme: AcmeConfig = AcmeConfig()
    rfc2136: Rfc2136Config = Rfc2136Config()


@attrs.frozen(kw_only=True)
class CliConfig:
    """~/.config/mcp/mcp.toml, and what `mcp operator add` prints."""

    operator: str
    seed: str = attrs.field(repr=False)
    bus: BusAccess = BusAccess()
    services: str = ""
    timeout_s: float = 0.0


# ----------------------------------------------------------------- single values


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_mesh(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _list_of(fits: Callable[[str], bool], what: str, *, low: int = 0) -> Callable[[Table, str], tuple[str, ...]]:
    def read(table: Table, key: str) -> tuple[str, ...]:
        found = table.strings(key)
        for i, text in enumerate(found):
            if not fits(text):
                raise table.error(i, f"{text[:80]!r} is not {what}", within=key)
        if len(found) < low:
            raise table.error(key, f"is empty: at least one is needed, {what}")
        return found

    return read


def _node_name(table: Table, key: str) -> str:
    name = table.value(key, str)
    if not is_node_name(name):
        what = "no name: lower-case letters, digits and dashes, at most 32, and no word of the bus (master, cli, ...)"
        raise table.error(key, f"{name[:60]!r} is {what}")
    return name


_file = matching(lambda text: text.startswith("/"), "an absolute path")
_host = matching(lambda text: _is_ip(text) or is_domain(text), "an address or a host name")
_ip = matching(_is_ip, "an IP address")
_domain = matching(is_domain, "a domain: lower-case labels of letters, digits and dashes")
_seconds = number(0.01, 1e7, "s")
_ENGINE = re.compile(r"unix:///\S+|(?:tcp|https?)://\S+")
_PROXY = re.compile(r"unix:/\S+|[^\s/]+:[0-9]{1,5}")
_ARCH = re.compile(r"[a-z0-9]{2,16}(?:/[a-z0-9]{1,8})?")
_engine = matching(_ENGINE.fullmatch, 'an engine: "unix:///path", "tcp://host:port" or "https://host:port"')
_proxy_address = matching(_PROXY.fullmatch, '"unix:/path" or "host:port"')


# ----------------------------------------------------------------------- schemas


def _section(*keys: Key, name: str, required: str = "") -> Key:
    """Declare a table of a file; its values are read by attribute, like the file's own."""
    schema = Schema(f"in [{name}]", keys)
    return Key(name, lambda table, key: table.table(key).read(schema) or {}, required=required, inner=schema)


_ACCESS = (
    Key("address", _host),
    Key("port", port),
    Key("tls_name", string),
    Key("ca_file", _file),
    Key("ca_pem", string),
    Key("key_file", _file),
)


def _registries(table: Table, key: str) -> dict[str, Any]:
    registries = table.table(key)
    found = {host: registries.table(host).read(_REGISTRY) for host in registries.values}
    return {"registries": {host: (each["username"], each["password_file"]) for host, each in found.items() if each}}


_REGISTRY = Schema(
    'in [registry."HOST:PORT"]',
    (
        Key("username", string, required='username = "lab"'),
        Key("password_file", _file, required=f'password_file = "{HOME}/registry.pass"'),
    ),
)

BUS_FILE = Schema(
    "",
    (
        _section(
            Key("address", _host),
            Key("port", port),
            Key("state", _file),
            Key("keys", _file),
            Key("binary", string),
            name="bus",
        ),
    ),
)

MASTER_FILE = Schema(
    "",
    (
        _section(
            Key("node", _node_name, required='node = "rift"'),
            Key("keys", _file),
            Key("state", _file),
            Key("lock", _file),
            name="master",
            required='[master] with node = "rift"',
        ),
        _section(
            *_ACCESS,
            Key("answers_key_file", _file),
            Key("system_key_file", _file),
            Key("enrolment", _file),
            name="bus",
        ),
        _section(Key("internal_zone", _domain), name="names"),
        _section(
            Key("allowed_domains", _list_of(is_domain, 'a domain like "example.net"')),
            Key("mesh", _list_of(_is_mesh, 'a network like "100.64.0.0/10"', low=1)),
            name="edge",
        ),
        _section(
            Key("heartbeat_s", _seconds),
            Key("missed", integer(1, 1000)),
            Key("probe_timeout_s", _seconds),
            Key("census_timeout_s", _seconds),
            Key("census_grace_s", _seconds),
            Key("clock_skew_s", _seconds),
            name="health",
        ),
        _section(
            Key("max_nodes", integer(1, 10_000)),
            Key("registrations_per_minute", integer(1, 100_000)),
            Key("messages_per_second", integer(1, 100_000)),
            Key("invitation_s", _seconds),
            name="limits",
        ),
        _section(Key("operation_timeout_s", _seconds), Key("return_timeout_s", _seconds), name="deploy"),
    ),
)

AGENT_FILE = Schema(
    "",
    (
        _section(
            Key("name", _node_name, required='name = "orion"'),
            Key("role", choice("master", "worker", "edge")),
            Key("address", _host),
            Key("arch", matching(_ARCH.fullmatch, 'an architecture in Docker\'s words, like "arm64"', or_empty=True)),
            Key("state", _file),
            name="node",
            required='[node] with name = "orion"',
        ),
        _section(*_ACCESS, name="bus"),
        _section(
            Key("containers", choice("docker", "none")),
            Key("routes", choice("mcproxy", "none")),
            Key("internal_certificates", choice("local-ca", "acme", "none")),
            Key("public_certificates", choice("acme", "local-ca", "none")),
            Key("names", choice("rfc2136", "mcns", "none")),
            name="adapters",
        ),
        _section(
            Key("url", _engine, to="docker_url"),
            Key("network", string),
            Key("publish_address", _ip),
            Key("is_shared", flag),
            Key("request_timeout_s", _seconds),
            name="docker",
        ),
        Key("registry", _registries, inner=_REGISTRY),
        _section(Key("first", port, to="first_port"), Key("last", port, to="last_port"), name="ports"),
        _section(Key("heartbeat_s", _seconds), name="health"),
        _section(Key("address", _proxy_address), name="proxy"),
        _section(
            Key("directory", matching(lambda url: url.startswith("https://"), "a URL that begins with https://")),
            Key("ca_file", _file),
            Key("email", string),
            Key("challenge", choice("http-01", "dns-01")),
            Key("eab_url", matching(lambda url: url.startswith("https://"), "a URL that begins with https://")),
            Key("eab_token_file", _file),
            name="acme",
        ),
        _section(
            Key("server", string),
            Key("zone", _domain),
            Key("key_name", string),
            Key("key_file", _file),
            Key("algorithm", choice("hmac-sha256", "hmac-sha384", "hmac-sha512")),
            name="rfc2136",
        ),
    ),
)

CLI_FILE = Schema(
    "",
    (
        _section(*_ACCESS, name="bus"),
        _section(
            Key("name", _node_name, to="operator", required='name = "kyle"'),
            Key("seed", string),
            Key("key_file", _file, to="operator_key_file"),
            name="operator",
            required='[operator] with name = "kyle" and a seed; or `mcp login FILE`',
        ),
        _section(Key("folder", string, to="services"), name="services"),
        _section(Key("timeout_s", number(0, 1e7, "s")), name="defaults"),
    ),
)


# ----------------------------------------------------------------------- loading


def read_document(path: str | Path) -> Document:
    """Return a TOML file.

    Raises:
        BadDefinition: it is not there, not readable, too large, not UTF-8 or no TOML.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise BadDefinition(f"cannot be read: {reason.lower()}", file=str(path)) from error
    return document_of(data, file=str(path))


def load_bus(path: str | Path) -> BusConfig:
    """Return mcp-bus.toml.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
    """
    return BusConfig(**_flat(read_document(path).read(BUS_FILE)))


def load_master(path: str | Path) -> MasterConfig:
    """Return mcp-master.toml.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
    """
    values = _with_access(read_document(path).read(MASTER_FILE), MasterConfig(node="").bus)
    return MasterConfig(**_flat(values))


def load_agent(path: str | Path) -> AgentConfig:
    """Return mcp-agent.toml.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
    """
    document = read_document(path)
    values = _with_access(document.read(AGENT_FILE), AgentConfig(name="").bus)
    for name, cls in (("proxy", ProxyAccess), ("acme", AcmeConfig), ("rfc2136", Rfc2136Config)):
        if name in values:
            values[name] = {name: cls(**values[name])}
    flat = _flat(values)
    if flat.get("role") == "edge":
        flat.setdefault("containers", "none")
    config = AgentConfig(**flat)
    _check_agent(document, config)
    document.check()
    return config


def _check_agent(document: Document, config: AgentConfig) -> None:
    if config.role == "edge" and config.containers != "none":
        reason = 'an edge node runs no containers: write "none"'
        document.note(document.error(reason, ("adapters", "containers")))
    if config.first_port > config.last_port:
        reason = f"{config.first_port} is above the last port, {config.last_port}"
        document.note(document.error(reason, ("ports", "first" if "first" in document.root["ports"] else "last")))


def load_cli(path: str | Path) -> CliConfig:
    """Return an operator's file.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
        AdapterError: the key's file cannot be read, or others can read it.
    """
    document = read_document(path)
    flat = _flat(_with_access(document.read(CLI_FILE), BusAccess()))
    key_file = flat.pop("operator_key_file", "")
    if bool(key_file) == bool(flat.get("seed")):
        both = "seed and key_file: only one of them" if key_file else "'seed' is missing"
        raise document.error(
            both, ("operator", "seed"), hint="`mcp login FILE` writes it, from `mcp operator add NAME`."
        )
    return CliConfig(**(flat if not key_file else {**flat, "seed": read_private(Path(key_file)).strip()}))


def _with_access(values: dict[str, Any], base: BusAccess) -> dict[str, Any]:
    """Put how to reach the bus into an object of its own; what else stands in [bus] is the file's."""
    names = {field.name for field in attrs.fields(BusAccess)}
    bus = values.get("bus", {})
    access = attrs.evolve(base, **{name: value for name, value in bus.items() if name in names})
    return {**values, "bus": {"bus": access, **{n: v for n, v in bus.items() if n not in names}}}


def _flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: value for section in sections.values() for name, value in section.items()}


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
