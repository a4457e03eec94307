"""The first node's bus: authority, keys, enrolment and configuration files, all of it or nothing."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path

import attrs

from mcp.bus import tls
from mcp.bus.files import PRIVATE, PUBLIC, make_private_folder, write_whole
from mcp.bus.keys import KeyPair, new_key
from mcp.bus.place import ServerPlace
from mcp.bus.roster import Entry, MasterPart, Node, Roster, to_text
from mcp.bus.server import find_binary, refuse_taken_port, write_config
from mcp.bus.server_config import endpoint
from mcp.bus.subjects import ConnectionRole
from mcp.bus.tls import SERVER_NAME
from mcp.bus.toml_text import Table, toml_text
from mcp.model.errors import AdapterError, Refused
from mcp.model.messages import Role
from mcp.model.names import is_node_name
from mcp.model.values import frozen

Tables = Mapping[str, Table]

_CONNECTIONS: tuple[ConnectionRole, ...] = ("master", "answers", "system", "agent")
"""What the first machine connects as: the master's three, and its node's agent."""


@frozen(kw_only=True)
class NewBus:
    """What `init_bus` wrote; every path is absolute."""

    place: ServerPlace
    bus_config: Path
    master_config: Path
    agent_config: Path
    ca_pem: str
    files: tuple[Path, ...] = ()


def init_bus(
    home: Path,
    address: str,
    port: int,
    master_node: str,
    *,
    now_s: float,
    binary: str = "",
    master_tables: Tables | None = None,
    agent_tables: Tables | None = None,
) -> NewBus:
    """Set a bus up in a folder: everything that `mcp bus run`, the master and its node's agent need to start.

    `master_tables` and `agent_tables` are further tables for their configuration files, e.g. {"adapters": {...}}.

    Raises:
        Refused: there is a bus already (nothing was changed), or a name or an address cannot be.
        AdapterError: no nats-server, nobody could listen there, or a file could not be written: nothing was left behind.
    """
    home = home.absolute()
    place = ServerPlace(address, port, home / "bus", home / "keys", binary)
    _refuse_bad_names(place, master_node)
    _refuse_second_init(home, place)
    found = find_binary(binary)
    refuse_taken_port(address, port)
    keys = {role: new_key() for role in _CONNECTIONS}
    members = Roster.of(_first_members(master_node, keys))
    authority = tls.new_authority(master_node, now_s)
    made = NewBus(
        place=place,
        bus_config=home / "mcp-bus.toml",
        master_config=home / "mcp-master.toml",
        agent_config=home / "mcp-agent.toml",
        ca_pem=authority.pem,
    )
    private = {
        place.ca_key_file: authority.key_pem,
        place.cert_file: tls.new_server_certificate(authority, now_s).text(),
        **{place.key_file(role): key.seed + "\n" for role, key in keys.items()},
    }
    public = {
        place.ca_file: authority.pem,
        **{place.enrolment / name: to_text(entry) for name, entry in members.entries.items()},
        made.bus_config: _bus_toml(place),
        made.master_config: _master_toml(home, place, master_node, master_tables or {}),
        made.agent_config: agent_toml(
            home, master_node, "master", address, bus=(address, port), tables=agent_tables or {}
        ),
    }
    _write_all(place, found, members, private, public)
    return attrs.evolve(made, files=(*private, *public, place.config_file))


def _refuse_bad_names(place: ServerPlace, master_node: str) -> None:
    if not is_node_name(master_node):
        raise Refused(
            "bad_name",
            f"cannot call a node {master_node!r}",
            hint="A name has lower-case letters, digits and dashes, at most 32 of them, and is no reserved word.",
        )
    try:
        endpoint(place.address, place.port)
        is_wildcard = ipaddress.ip_address(place.address).is_unspecified
    except ValueError as error:
        raise Refused("bad_address", f"cannot use {place.address}:{place.port} for the bus: {error}") from error
    if is_wildcard:
        raise Refused(
            "bad_address",
            f"cannot use {place.address} for the bus: nodes need one address to connect to",
            hint="Give the address that this machine has in the mesh, e.g. 100.64.0.1.",
        )


def _refuse_second_init(home: Path, place: ServerPlace) -> None:
    ours = [home / f"mcp-{what}.toml" for what in ("bus", "master", "agent")]
    for path in (*ours, place.ca_file, place.ca_key_file, place.enrolment):
        if path.exists():
            raise Refused(
                "already_initialised",
                f"cannot set up a bus in {home}: there is {path.relative_to(home)} already; nothing was changed",
                hint="Start what is there (mcp bus run), or choose another folder with --home.",
            )


def _first_members(master_node: str, keys: Mapping[ConnectionRole, KeyPair]) -> list[Entry]:
    return [
        MasterPart(name="master", public_key=keys["master"].public_key),
        MasterPart(name="answers", public_key=keys["answers"].public_key),
        MasterPart(name="system", public_key=keys["system"].public_key),
        Node(name=master_node, role="master", public_key=keys["agent"].public_key),
    ]


def _write_all(
    place: ServerPlace, binary: Path, members: Roster, private: Mapping[Path, str], public: Mapping[Path, str]
) -> None:
    written: list[Path] = []
    try:
        make_private_folder(place.keys)
        make_private_folder(place.state)
        for path, text in (*private.items(), *public.items()):
            write_whole(path, text, PRIVATE if path in private else PUBLIC)
            written.append(path)
        write_config(place, binary, members)
    except AdapterError:
        for path in written:
            path.unlink(missing_ok=True)
        place.binary_link.unlink(missing_ok=True)
        if place.enrolment.is_dir():
            place.enrolment.rmdir()
        raise


def _bus_toml(place: ServerPlace) -> str:
    table: Table = {
        "address": place.address,
        "port": place.port,
        "state": str(place.state),
        "keys": str(place.keys),
        "binary": place.binary,
    }
    return toml_text({"bus": table}, heading="The bus of this fleet: `mcp bus run --config` this file.")


def _master_toml(home: Path, place: ServerPlace, node: str, tables: Tables) -> str:
    master: Table = {
        "node": node,
        "keys": str(place.keys),
        "state": str(home / "master"),
        "lock": str(home / "master" / "lock"),
    }
    bus: Table = {
        "address": place.address,
        "port": place.port,
        "tls_name": SERVER_NAME,
        "ca_file": str(place.ca_file),
        "key_file": str(place.key_file("master")),
        "answers_key_file": str(place.key_file("answers")),
        "system_key_file": str(place.key_file("system")),
        "enrolment": str(place.state),
    }
    return toml_text({"master": master, "bus": bus, **tables}, heading="The master: `mcp-master --config` this file.")


def agent_toml(
    home: Path, name: str, role: Role, address: str, *, bus: tuple[str, int], tables: Tables | None = None
) -> str:
    """Return an agent's first configuration file; `bus` is where it connects to, `tables` what else it shall say."""
    keys = home / "keys"
    node: Table = {"name": name, "role": role, "address": address, "state": str(home / "agent")}
    connection: Table = {
        "address": bus[0],
        "port": bus[1],
        "tls_name": SERVER_NAME,
        "ca_file": str(keys / "bus-ca.pem"),
        "key_file": str(keys / "agent.nkey"),
    }
    return toml_text(
        {"node": node, "bus": connection, **(tables or {})},
        heading=f"The agent of {name}: `mcp-agent --config` this file.",
    )


def operator_toml(name: str, seed: str, ca_pem: str, *, bus: tuple[str, int]) -> str:
    """Return an operator's file: all that the CLI needs to connect, the private key included (keep it 0600)."""
    connection: Table = {"address": bus[0], "port": bus[1], "tls_name": SERVER_NAME, "ca_pem": ca_pem}
    return toml_text(
        {"bus": connection, "operator": {"name": name, "seed": seed}},
        heading=f"{name}'s way in: `mcp login` this file. It holds a private key.",
    )
