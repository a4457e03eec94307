"""What the configuration files have in common: how they are read, and how the bus is reached.

What may stand in a file is declared in its schema; what is left out is as the class of the file says.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import attrs

from mcp.model.errors import BadDefinition
from mcp.model.names import is_domain, is_node_name
from mcp.model.tables import MAX_FILE_BYTES, Document, Key, Schema, Table, document_of, matching, number, port, string
from mcp.model.values import frozen

HOME = "/srv/mcp"
"""Where everything of a node lies, unless `--home` says otherwise."""


@frozen(kw_only=True)
class BusAccess:
    """[bus] of whoever connects: where it is, how to know it, which key to show."""

    address: str = "127.0.0.1"
    port: int = 4222
    tls_name: str = "mcp-bus"
    ca_file: str = f"{HOME}/keys/bus-ca.pem"
    ca_pem: str = ""
    """The CA's certificate itself, in place of the file."""
    key_file: str = ""


# ---------------------------------------------------------------------- values


def is_ip(text: str) -> bool:
    """Say whether this is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def node_name(table: Table, key: str) -> str:
    """Read the name of a node or an operator."""
    name = table.value(key, str)
    if not is_node_name(name):
        what = "no name: lower-case letters, digits and dashes, at most 32, and no word of the bus (master, cli, ...)"
        raise table.error(key, f"{name[:60]!r} is {what}")
    return name


absolute = matching(lambda text: text.startswith("/"), "an absolute path")
address = matching(lambda text: is_ip(text) or is_domain(text), "an address or a host name")
domain = matching(is_domain, "a domain: lower-case labels of letters, digits and dashes")
seconds = number(0.01, 1e7, "s")


def section(*keys: Key, name: str, required: str = "") -> Key:
    """Declare a table of a file; its values are read by attribute, like the file's own."""
    schema = Schema(f"in [{name}]", keys)
    return Key(name, lambda table, key: table.table(key).read(schema) or {}, required=required, inner=schema)


ACCESS = (
    Key("address", address),
    Key("port", port),
    Key("tls_name", string),
    Key("ca_file", absolute),
    Key("ca_pem", string),
    Key("key_file", absolute),
)


# ---------------------------------------------------------------------- loading


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


def with_access(values: dict[str, Any], base: BusAccess) -> dict[str, Any]:
    """Put how to reach the bus into an object of its own; what else stands in [bus] is the file's."""
    names = {field.name for field in attrs.fields(BusAccess)}
    bus = values.get("bus", {})
    access = attrs.evolve(base, **{name: value for name, value in bus.items() if name in names})
    return {**values, "bus": {"bus": access, **{n: v for n, v in bus.items() if n not in names}}}


def flattened(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the values of all sections by attribute."""
    return {name: value for section in sections.values() for name, value in section.items()}
