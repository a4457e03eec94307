"""The grammar of names, and the names of containers; every name is checked on the way in, wherever it comes from."""

from __future__ import annotations

import re

NODE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
"""A node or an operator: a subject token of the bus, so no dots (docs/bus.md lanes)."""

SERVICE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
"""A service or a component: at most 40 characters, so that container names and DNS labels stay legal."""

RESERVED_NAMES = frozenset({"master", "cli", "sys", "join", "debug", "all"})
"""Words of the subject tree that no node and no operator may be called."""

DEFAULT_ZONE = "svc.mcp.metacircular.net"
"""Where internal names live, unless the master's configuration says otherwise (PLATFORM's convention)."""

_HOST_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def is_node_name(name: str) -> bool:
    """Say whether a node or an operator may be called this."""
    return NODE_NAME.fullmatch(name) is not None and name not in RESERVED_NAMES


def is_service_name(name: str) -> bool:
    """Say whether a service or a component may be called this."""
    return SERVICE_NAME.fullmatch(name) is not None


def is_domain(name: str) -> bool:
    """Say whether this is a DNS name, in lower case and without a dot at its end; an address is none."""
    labels = name.split(".")
    return all(map(_HOST_LABEL.fullmatch, labels)) and not labels[-1].isdigit() and len(name) <= 253


def container_name(service: str, component: str, generation: int) -> str:
    """Name a container so that asking twice for the same one collides instead of making two."""
    stem = service if component == service else f"{service}.{component}"
    return f"mcp.{stem}.g{generation}"


def port_variable(route: str) -> str:
    """Return the variable that tells a container its port: PORT, or PORT_<NAME> for a named route."""
    return "PORT" if not route else "PORT_" + route.upper().replace("-", "_")
