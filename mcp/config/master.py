"""mcp-master.toml."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from pathlib import Path

import attrs

from mcp.config.reading import (
    ACCESS,
    HOME,
    BusAccess,
    absolute,
    domain,
    flattened,
    node_name,
    read_document,
    seconds,
    section,
    with_access,
)
from mcp.model.names import DEFAULT_ZONE, is_domain
from mcp.model.tables import Key, Schema, Table, integer
from mcp.model.values import frozen


@frozen(kw_only=True)
class MasterConfig:
    """mcp-master.toml."""

    node: str
    keys: str = f"{HOME}/keys"
    state: str = f"{HOME}/master"
    lock: str = f"{HOME}/master/lock"
    bus: BusAccess = attrs.field(factory=lambda: BusAccess(key_file=f"{HOME}/keys/master.nkey"))
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
    registrations_per_minute: int = 12
    messages_per_second: int = 50
    invitation_s: float = 300.0
    operation_timeout_s: float = 3600.0
    return_timeout_s: float = 60.0


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


MASTER_FILE = Schema(
    "",
    (
        section(
            Key("node", node_name, required='node = "rift"'),
            Key("keys", absolute),
            Key("state", absolute),
            Key("lock", absolute),
            name="master",
            required='[master] with node = "rift"',
        ),
        section(
            *ACCESS,
            Key("answers_key_file", absolute),
            Key("system_key_file", absolute),
            Key("enrolment", absolute),
            name="bus",
        ),
        section(Key("internal_zone", domain), name="names"),
        section(
            Key("allowed_domains", _list_of(is_domain, 'a domain like "example.net"')),
            Key("mesh", _list_of(_is_mesh, 'a network like "100.64.0.0/10"', low=1)),
            name="edge",
        ),
        section(
            Key("heartbeat_s", seconds),
            Key("missed", integer(1, 1000)),
            Key("probe_timeout_s", seconds),
            Key("census_timeout_s", seconds),
            Key("census_grace_s", seconds),
            Key("clock_skew_s", seconds),
            name="health",
        ),
        section(
            Key("max_nodes", integer(1, 10_000)),
            Key("registrations_per_minute", integer(1, 100_000)),
            Key("messages_per_second", integer(1, 100_000)),
            Key("invitation_s", seconds),
            name="limits",
        ),
        section(Key("operation_timeout_s", seconds), Key("return_timeout_s", seconds), name="deploy"),
    ),
)


def load_master(path: str | Path) -> MasterConfig:
    """Return mcp-master.toml.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
    """
    values = with_access(read_document(path).read(MASTER_FILE), MasterConfig(node="").bus)
    return MasterConfig(**flattened(values))
