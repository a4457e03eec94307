"""mcp-agent.toml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs

from mcp.config.reading import (
    ACCESS,
    HOME,
    BusAccess,
    absolute,
    address,
    domain,
    flattened,
    is_ip,
    node_name,
    read_document,
    seconds,
    section,
    with_access,
)
from mcp.model.errors import AdapterError
from mcp.model.tables import Document, Key, Schema, Table, choice, flag, matching, port, string
from mcp.model.values import frozen


@frozen(kw_only=True)
class ProxyAccess:
    """[proxy]: where the proxy's admin API is."""

    address: str = "unix:/run/mcp/proxy.sock"


@frozen(kw_only=True)
class AcmeConfig:
    """[acme]: the authority that issues certificates, and how it is shown that we may have one."""

    directory: str = ""
    ca_file: str = ""
    email: str = ""
    challenge: str = "http-01"
    eab_url: str = ""
    eab_token_file: str = ""


@frozen(kw_only=True)
class Rfc2136Config:
    """[rfc2136]: the name server that takes signed updates."""

    server: str = ""
    zone: str = ""
    key_name: str = "mcp"
    key_file: str = ""
    algorithm: str = "hmac-sha256"


@frozen(kw_only=True)
class AgentConfig:
    """mcp-agent.toml."""

    name: str
    role: str = "worker"
    address: str = "127.0.0.1"
    arch: str = ""
    """In Docker's words; empty: what the machine says."""
    state: str = f"{HOME}/agent"
    bus: BusAccess = attrs.field(factory=lambda: BusAccess(key_file=f"{HOME}/keys/agent.nkey"))
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


_ip = matching(is_ip, "an IP address")
_ENGINE = re.compile(r"unix:///\S+|(?:tcp|https?)://\S+")
_PROXY = re.compile(r"unix:/\S+|[^\s/]+:[0-9]{1,5}")
_ARCH = re.compile(r"[a-z0-9]{2,16}(?:/[a-z0-9]{1,8})?")
_engine = matching(_ENGINE.fullmatch, 'an engine: "unix:///path", "tcp://host:port" or "https://host:port"')
_proxy_address = matching(_PROXY.fullmatch, '"unix:/path" or "host:port"')


def _registries(table: Table, key: str) -> dict[str, Any]:
    registries = table.table(key)
    found = {host: registries.table(host).read(_REGISTRY) for host in registries.values}
    return {"registries": {host: (each["username"], each["password_file"]) for host, each in found.items() if each}}


_REGISTRY = Schema(
    'in [registry."HOST:PORT"]',
    (
        Key("username", string, required='username = "lab"'),
        Key("password_file", absolute, required=f'password_file = "{HOME}/registry.pass"'),
    ),
)

AGENT_FILE = Schema(
    "",
    (
        section(
            Key("name", node_name, required='name = "orion"'),
            Key("role", choice("master", "worker", "edge")),
            Key("address", address),
            Key("arch", matching(_ARCH.fullmatch, 'an architecture in Docker\'s words, like "arm64"', or_empty=True)),
            Key("state", absolute),
            name="node",
            required='[node] with name = "orion"',
        ),
        section(*ACCESS, name="bus"),
        section(
            Key("containers", choice("docker", "none")),
            Key("routes", choice("mcproxy", "none")),
            Key("internal_certificates", choice("local-ca", "acme", "none")),
            Key("public_certificates", choice("acme", "local-ca", "none")),
            Key("names", choice("rfc2136", "mcns", "none")),
            name="adapters",
        ),
        section(
            Key("url", _engine, to="docker_url"),
            Key("network", string),
            Key("publish_address", _ip),
            Key("is_shared", flag),
            Key("request_timeout_s", seconds),
            name="docker",
        ),
        Key("registry", _registries, inner=_REGISTRY),
        section(Key("first", port, to="first_port"), Key("last", port, to="last_port"), name="ports"),
        section(Key("heartbeat_s", seconds), name="health"),
        section(Key("address", _proxy_address), name="proxy"),
        section(
            Key("directory", matching(lambda url: url.startswith("https://"), "a URL that begins with https://")),
            Key("ca_file", absolute),
            Key("email", string),
            Key("challenge", choice("http-01", "dns-01")),
            Key("eab_url", matching(lambda url: url.startswith("https://"), "a URL that begins with https://")),
            Key("eab_token_file", absolute),
            name="acme",
        ),
        section(
            Key("server", string),
            Key("zone", domain),
            Key("key_name", string),
            Key("key_file", absolute),
            Key("algorithm", choice("hmac-sha256", "hmac-sha384", "hmac-sha512")),
            name="rfc2136",
        ),
    ),
)


def load_agent(path: str | Path) -> AgentConfig:
    """Return mcp-agent.toml.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
    """
    document = read_document(path)
    values = with_access(document.read(AGENT_FILE), AgentConfig(name="").bus)
    for name, cls in (("proxy", ProxyAccess), ("acme", AcmeConfig), ("rfc2136", Rfc2136Config)):
        if name in values:
            values[name] = {name: cls(**values[name])}
    flat = flattened(values)
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
