"""Who is enrolled: one small file for each node, operator, part of the master and open invitation; no secrets in them.

enrolment/node-orion.toml          name, role, public key
enrolment/operator-kyle.toml       name, role (admin, deployer, viewer, debug), public key
enrolment/part-answers.toml        a connection of the master's own: master (hearing), answers, system
enrolment/invitation-3f2a9c11.toml who may join under which name until when, and the throw-away public key
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import attrs

from mcp.bus.files import read_text
from mcp.bus.keys import is_public_key
from mcp.bus.server_config import ACCOUNT, SYSTEM_ACCOUNT, User
from mcp.bus.subjects import OperatorRole, grant, operator_grant
from mcp.bus.toml_text import Table, toml_text
from mcp.model.errors import AdapterError
from mcp.model.messages import Role
from mcp.model.names import is_node_name
from mcp.model.values import frozen

Part = Literal["master", "answers", "system"]

_INVITATION_ID = re.compile(r"[0-9a-f]{8}")


@frozen(kw_only=True)
class Node:
    """A node that may connect as itself."""

    name: str
    role: Role
    public_key: str


@frozen(kw_only=True)
class Operator:
    """A person, or a script, that may send commands (or, with role debug, only watch)."""

    name: str
    role: OperatorRole
    public_key: str


@frozen(kw_only=True)
class MasterPart:
    """One of the master's own connections."""

    name: Part
    public_key: str


@frozen(kw_only=True)
class Invitation:
    """Who holds the seed of `public_key` may join as `node`, once; the seed itself is in the token only.

    `used_by` is the public key the node showed: the same node may ask again until it has registered, nobody else.
    """

    id: str
    node: str
    role: Role
    public_key: str
    expires_at_s: float
    used_by: str = ""


Entry = Node | Operator | MasterPart | Invitation


@frozen
class Roster:
    """Everybody that may connect; `damaged` are files that could not be read, and who is in them may not."""

    entries: dict[str, Entry] = attrs.field(factory=dict)
    damaged: tuple[str, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Roster:
        """Make a roster of these."""
        return cls({file_name(entry): entry for entry in entries})

    @property
    def nodes(self) -> list[Node]:
        """The enrolled nodes, by name."""
        return sorted((e for e in self.entries.values() if isinstance(e, Node)), key=lambda node: node.name)

    @property
    def operators(self) -> list[Operator]:
        """The enrolled operators, by name."""
        return sorted((e for e in self.entries.values() if isinstance(e, Operator)), key=lambda who: who.name)

    @property
    def invitations(self) -> list[Invitation]:
        """All invitations, used and expired ones included."""
        return [entry for entry in self.entries.values() if isinstance(entry, Invitation)]

    def node(self, name: str) -> Node | None:
        """Return an enrolled node."""
        entry = self.entries.get(f"node-{name}.toml")
        return entry if isinstance(entry, Node) else None

    def operator(self, name: str) -> Operator | None:
        """Return an enrolled operator."""
        entry = self.entries.get(f"operator-{name}.toml")
        return entry if isinstance(entry, Operator) else None

    def invitation(self, id: str) -> Invitation | None:
        """Return an invitation, whatever has become of it."""
        entry = self.entries.get(f"invitation-{id}.toml")
        return entry if isinstance(entry, Invitation) else None

    def plus(self, *entries: Entry) -> Roster:
        """Return the roster with these added, or put in place of those with the same name."""
        return attrs.evolve(self, entries=self.entries | {file_name(entry): entry for entry in entries})

    def minus(self, *entries: Entry) -> Roster:
        """Return the roster without these."""
        gone = {file_name(entry) for entry in entries}
        return attrs.evolve(self, entries={name: e for name, e in self.entries.items() if name not in gone})

    def has_key(self, public_key: str) -> bool:
        """Say whether anybody has this key."""
        return any(entry.public_key == public_key for entry in self.entries.values())

    def users(self) -> list[User]:
        """Return what the server's configuration is rendered from."""
        return [_user(entry) for entry in self.entries.values()]


def _user(entry: Entry) -> User:
    match entry:
        case Node():
            return User(label=f"agent {entry.name}", public_key=entry.public_key, grant=grant("agent", entry.name))
        case Operator():
            rights = operator_grant(entry.role, entry.name)
            return User(label=f"operator {entry.name} {entry.role}", public_key=entry.public_key, grant=rights)
        case MasterPart():
            return User(
                label=f"master {entry.name}",
                public_key=entry.public_key,
                grant=grant(entry.name),
                account=SYSTEM_ACCOUNT if entry.name == "system" else ACCOUNT,
            )
        case Invitation():
            return User(label=f"join {entry.id}", public_key=entry.public_key, grant=grant("join", entry.id))


def file_name(entry: Entry) -> str:
    """Return what an entry's file is called."""
    match entry:
        case Node():
            return f"node-{entry.name}.toml"
        case Operator():
            return f"operator-{entry.name}.toml"
        case MasterPart():
            return f"part-{entry.name}.toml"
        case Invitation():
            return f"invitation-{entry.id}.toml"


def to_text(entry: Entry) -> str:
    """Return what stands in an entry's file."""
    table: Table = attrs.asdict(entry, filter=lambda _, value: value != "")
    return toml_text({"": table})


def load(folder: Path) -> Roster:
    """Read every enrolment file.

    One that makes no sense lets nobody in and is named in `damaged`; the others count.

    Raises:
        AdapterError: the folder is not there.
    """
    try:
        # iterdir and not glob: that one takes a folder that we may not read for an empty one.
        paths = sorted(path for path in folder.iterdir() if path.match("[!.]*.toml"))
    except OSError as error:
        raise AdapterError(
            f"cannot read the enrolment in {folder}: {(error.strerror or str(error)).lower()}",
            code="not_initialised",
            hint="Is the bus set up on this machine? `mcp init` does it.",
        ) from error
    entries: dict[str, Entry] = {}
    damaged: list[str] = []
    for path in paths:
        try:
            entries[path.name] = _entry(path)
        except (ValueError, TypeError, AdapterError) as error:
            damaged.append(f"{path}: {error}")
    return Roster(entries, tuple(damaged))


def _entry(path: Path) -> Entry:
    entry, is_sound = _made(path.name.partition("-")[0], tomllib.loads(read_text(path)))
    if not is_sound or not is_public_key(entry.public_key):
        raise ValueError("it holds something that cannot be")
    if file_name(entry) != path.name:
        raise ValueError("its name and its contents differ")
    return entry


def _made(kind: str, table: dict[str, Any]) -> tuple[Entry, bool]:
    match kind:
        case "node":
            node = Node(**table)
            return node, is_node_name(node.name) and node.role in get_args(Role)
        case "operator":
            operator = Operator(**table)
            return operator, is_node_name(operator.name) and operator.role in get_args(OperatorRole)
        case "part":
            part = MasterPart(**table)
            return part, part.name in get_args(Part)
        case "invitation":
            invitation = Invitation(**table)
            return invitation, _is_sound(invitation)
    raise ValueError("its name says nothing that is enrolled")


def _is_sound(invitation: Invitation) -> bool:
    return (
        _INVITATION_ID.fullmatch(invitation.id) is not None
        and is_node_name(invitation.node)
        and invitation.role in get_args(Role)
        and isinstance(invitation.expires_at_s, (int, float))
        and (invitation.used_by == "" or is_public_key(invitation.used_by))
    )
