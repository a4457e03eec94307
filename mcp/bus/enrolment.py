"""Who may connect, changed while the bus runs: every change is checked, written, loaded, or undone as if it had not been.

The enrolment files are the truth; the server's configuration is rendered from them. A change is: render -> check with
nats-server -t -> write the files -> rename the configuration -> reload -> compare digests. A refused reload puts the old
files back. With the bus down the change stands and counts from the bus's next start.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, get_args

import attrs

from mcp.bus import roster
from mcp.bus.files import PRIVATE, publish, read_private, read_text, remove, write_draft, write_whole
from mcp.bus.init import operator_toml
from mcp.bus.join_token import JoinToken, new_invitation_id
from mcp.bus.keys import is_public_key, new_key
from mcp.bus.place import ServerPlace
from mcp.bus.roster import Entry, Invitation, Node, Operator, Roster
from mcp.bus.server import check_aside, find_binary, keep_refused, render_config, renew_certificate
from mcp.bus.subjects import OperatorRole
from mcp.bus.tls import fingerprint
from mcp.model.errors import AdapterError, BusUnreachable, McpError, Refused
from mcp.model.messages import Role
from mcp.model.names import is_node_name
from mcp.model.ports import Clock, Enrolled
from mcp.model.values import frozen

log = logging.getLogger(__name__)

INVITATION_S = 300.0
MAX_NODES = 16
LOCK_TIMEOUT_S = 10.0
_TRY_LOCK_EVERY_S = 0.01


class Reloads(Protocol):
    """Whatever can have the server read its configuration: System, OnDemand, NoBus."""

    async def reload(self, digest: str, *, only_if_other: bool = False) -> None:
        """Raise BusUnreachable when there is no server, another BusError or AdapterError when it did not work."""


@frozen(kw_only=True)
class NewOperator:
    """A fresh operator's way in; `toml` holds the private key, which is kept nowhere else."""

    name: str
    role: OperatorRole
    toml: str = attrs.field(repr=False)


class FileEnrolment:
    """The Enrolment port on files and a real server; see mcp/model/ports.py for its promises."""

    def __init__(
        self,
        place: ServerPlace,
        clock: Clock,
        bus: Reloads,
        *,
        max_nodes: int = MAX_NODES,
        invitation_s: float = INVITATION_S,
    ) -> None:
        self._place = place
        self._clock = clock
        self._bus = bus
        self._max_nodes = max_nodes
        self._invitation_s = invitation_s
        self._mine = asyncio.Lock()
        self._binary: Path | None = None
        self._damaged: tuple[str, ...] = ()
        self.is_live = True
        """Whether the running bus has the last change; False: no bus ran, it counts from its next start."""

    # ---------------------------------------------------------------- looking

    async def nodes(self) -> list[Enrolled]:
        """Return every enrolled node."""
        return [_enrolled(node) for node in self._load().nodes]

    async def operators(self) -> list[Operator]:
        """Return every enrolled operator."""
        return self._load().operators

    def _load(self) -> Roster:
        found = roster.load(self._place.enrolment)
        if found.damaged != self._damaged:  # said once, not at every look
            for why in found.damaged:
                log.warning("an enrolment file is damaged; who is in it cannot connect", extra={"file": why})
            self._damaged = found.damaged
        return found

    # ----------------------------------------------------------------- joining

    async def invite(self, node: str, role: str) -> tuple[str, float]:
        """Return a token for one join under this name; an older open invitation for it is void from now on.

        Raises:
            Refused: bad_name, bad_role, name_taken, or limit.
            AdapterError: nothing was changed.
        """
        made = new_key()
        token = JoinToken(
            address=self._place.address,
            port=self._place.port,
            invitation=new_invitation_id(),
            seed=made.seed,
            fingerprint=fingerprint(read_private(self._place.cert_file)),
        )
        invitation = Invitation(
            id=token.invitation,
            node=node,
            role=_joining_role(node, role),
            public_key=made.public_key,
            expires_at_s=self._clock.wall_s() + self._invitation_s,
        )
        await self._change(lambda members: self._invited(members, invitation))
        return token.text(), self._invitation_s

    def _invited(self, members: Roster, invitation: Invitation) -> Roster:
        name = invitation.node
        if members.node(name) is not None:
            raise Refused(
                "name_taken",
                f"cannot invite {name}: a node of that name is enrolled",
                hint=f"If it is to join anew: mcp node remove {name}",
            )
        members = self._swept(members)
        members = members.minus(*(i for i in members.invitations if i.node == name))
        count = len(members.nodes) + sum(not i.used_by for i in members.invitations)
        if count >= self._max_nodes:
            raise Refused(
                "limit",
                f"cannot invite {name}: the fleet has {count} nodes, open invitations included, "
                f"and the limit is {self._max_nodes}",
                hint="Remove a node, or raise `max_nodes` in [limits] of mcp-master.toml.",
            )
        return members.plus(invitation)

    async def redeem(self, invitation: str, public_key: str) -> Enrolled:
        """Enrol the node of an invitation with this key; the same key asking again gets the same answer.

        Raises:
            Refused: unknown_invitation, invitation_used, invitation_expired, name_taken, bad_key.
            AdapterError: nothing was changed.
        """
        after = await self._change(lambda members: self._redeemed(members, invitation, public_key))
        used = after.invitation(invitation)
        node = after.node(used.node) if used is not None else None
        assert node is not None, "redeeming enrols"
        return _enrolled(node)

    def _redeemed(self, members: Roster, id: str, public_key: str) -> Roster:
        invitation = members.invitation(id)
        if invitation is None:
            raise _no_entry("unknown_invitation", "there is no such invitation")
        if invitation.used_by == public_key and members.node(invitation.node) is not None:
            return members
        if invitation.used_by:
            raise _no_entry("invitation_used", f"{invitation.node} has joined with this invitation", invitation.node)
        if self._is_expired(invitation):
            raise _no_entry("invitation_expired", "the invitation has expired", invitation.node)
        if members.node(invitation.node) is not None:
            raise _no_entry("name_taken", f"a node named {invitation.node} is enrolled")
        if not is_public_key(public_key) or members.has_key(public_key):
            raise Refused("bad_key", "cannot join: the key that was shown is none, or is somebody else's")
        node = Node(name=invitation.node, role=invitation.role, public_key=public_key)
        return members.plus(node, attrs.evolve(invitation, used_by=public_key))

    async def settle(self, node: str) -> None:
        """The node has registered: the credential it joined with goes. Done already is fine."""
        await self._change(
            lambda members: members.minus(*(i for i in members.invitations if i.node == node and i.used_by))
        )

    async def remove(self, node: str) -> None:
        """Forget a node and every invitation for its name; its live connections are cut (2 ms, docs/bus.md).

        Raises:
            Refused: no_such_node, or it is the master's own.
            AdapterError: nothing was changed.
        """
        await self._change(lambda members: _removed(members, node))

    async def sweep(self) -> None:
        """Remove the credentials of invitations that have expired."""
        await self._change(self._swept)

    def _swept(self, members: Roster) -> Roster:
        return members.minus(*(i for i in members.invitations if self._is_expired(i)))

    def _is_expired(self, invitation: Invitation) -> bool:
        return self._clock.wall_s() >= invitation.expires_at_s

    # --------------------------------------------------------------- operators

    async def add_operator(self, name: str, role: str) -> NewOperator:
        """Make a key for an operator and enrol it; the private part is in the answer and nowhere else.

        Raises:
            Refused: bad_name, bad_role, name_taken.
            AdapterError: nothing was changed.
        """
        rights = _operator_role(name, role)
        key = new_key()
        ca_pem = read_text(self._place.ca_file)
        entry = Operator(name=name, role=rights, public_key=key.public_key)
        await self._change(lambda members: _with_operator(members, entry))
        text = operator_toml(name, key.seed, ca_pem, bus=(self._place.address, self._place.port))
        return NewOperator(name=name, role=rights, toml=text)

    async def remove_operator(self, name: str) -> None:
        """Forget an operator; live connections are cut.

        Raises:
            Refused: no_such_operator.
            AdapterError: nothing was changed.
        """
        await self._change(lambda members: _without_operator(members, name))

    # ---------------------------------------------------------------- changing

    async def reconcile(self) -> None:
        """Have the bus run on what the enrolment files say, if it does not.

        For the master's start, and for after an outcome that was left open (a crash, a bus that did not answer).

        Raises:
            AdapterError: it does not.
        """
        async with self._alone():
            members = self._load()
            await self._apply(members, members, only_if_other=True)

    async def renew_certificate(self) -> None:
        """Give the bus a new certificate of the same authority; nobody is disconnected.

        Raises:
            AdapterError: the bus goes on with the old one.
        """
        async with self._alone():
            old = read_private(self._place.cert_file)
            renew_certificate(self._place, self._clock.wall_s())
            members = self._load()
            try:
                await self._apply(members, members)
            except AdapterError:
                write_whole(self._place.cert_file, old, PRIVATE)
                raise

    async def _change(self, change: Callable[[Roster], Roster]) -> Roster:
        async with self._alone():
            before = self._load()
            after = change(before)
            if after.entries != before.entries:
                await self._apply(before, after)
            return after

    async def _apply(self, before: Roster, after: Roster, *, only_if_other: bool = False) -> None:
        place = self._place
        draft = write_draft(place.config_file, render_config(place, after), PRIVATE)
        try:
            digest = await self._checked(draft)
            old_text = read_text(place.config_file) if place.config_file.exists() else render_config(place, before)
            self._put_in_place(before, after, draft)
        finally:
            draft.unlink(missing_ok=True)
        try:
            await self._bus.reload(digest, only_if_other=only_if_other)
            self.is_live = True
        except BusUnreachable:
            self.is_live = False
            log.warning("the bus does not run: the change counts from its next start")
        except McpError as error:
            self._write_entries(after, before)
            write_whole(place.config_file, old_text, PRIVATE)
            await self._tell_again()
            raise AdapterError(
                f"cannot change who may connect: {error}; nothing was changed", code="enrolment_failed", retryable=True
            ) from error

    def _put_in_place(self, before: Roster, after: Roster, draft: Path) -> None:
        try:
            self._write_entries(before, after)
            publish(draft, self._place.config_file)
        except AdapterError:
            self._write_entries(after, before)
            raise

    async def _checked(self, draft: Path) -> str:
        if self._binary is None:
            link = self._place.binary_link
            self._binary = find_binary(self._place.binary or (str(link) if link.exists() else ""))
        try:
            return await check_aside(self._binary, draft)
        except AdapterError:
            keep_refused(draft, self._place)
            raise

    async def _tell_again(self) -> None:
        """Have the bus read the old file after the new one: one that did not answer may still do what it was asked."""
        self.is_live = False
        try:
            assert self._binary is not None, "a change was checked before"
            await self._bus.reload(await check_aside(self._binary, self._place.config_file))
            self.is_live = True
        except McpError as error:
            log.warning("the bus could not be told to keep its configuration", extra={"reason": str(error)})

    def _write_entries(self, old: Roster, new: Roster) -> None:
        """Turn one set of files into the other: removals first, for they work on a full disk too (undoing is one)."""
        folder = self._place.enrolment
        for name in old.entries.keys() - new.entries.keys():
            remove(folder / name)
        # A node before the invitation that it used: after a crash between them nobody else can use that.
        for name, entry in sorted(new.entries.items(), key=lambda item: isinstance(item[1], Invitation)):
            if old.entries.get(name) != entry:
                write_whole(folder / name, roster.to_text(entry))

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """One change at a time, in this process and among all of this machine."""
        async with self._mine:
            handle = _open_lock(self._place.lock_file)
            try:
                await self._lock(handle)
                yield
            finally:
                os.close(handle)

    async def _lock(self, handle: int) -> None:
        try:
            async with asyncio.timeout(LOCK_TIMEOUT_S):
                while not _is_locked_now(handle):  # noqa: ASYNC110 - another process holds it
                    await asyncio.sleep(_TRY_LOCK_EVERY_S)
        except TimeoutError as error:
            raise AdapterError(
                f"cannot change who may connect: another command holds {self._place.lock_file}",
                code="enrolment_busy",
                retryable=True,
            ) from error


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    except OSError as error:
        raise AdapterError(
            f"cannot change who may connect: {path}: {(error.strerror or str(error)).lower()}",
            code="not_initialised",
            hint="Run this on the master's machine, as the user whom the bus's files belong to.",
        ) from error


def _is_locked_now(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _enrolled(node: Node) -> Enrolled:
    return Enrolled(name=node.name, role=node.role, public_key=node.public_key)


def _no_entry(code: str, reason: str, node: str = "NAME") -> Refused:
    return Refused(code, f"cannot join: {reason}", hint=f"Ask for a new invitation: mcp node invite {node}")


def _refuse_bad_name(what: str, name: str) -> None:
    if not is_node_name(name):
        raise Refused(
            "bad_name",
            f"cannot call {what} {name!r}",
            hint="A name has lower-case letters, digits and dashes, at most 32 of them, and is no reserved word.",
        )


def _joining_role(node: str, role: str) -> Role:
    _refuse_bad_name("a node", node)
    if role == "master":
        raise Refused("bad_role", "cannot invite a second master: the master's node is made by `mcp init`")
    for known in get_args(Role):
        if role == known:
            return known  # type: ignore[no-any-return]
    raise Refused("bad_role", f"cannot invite {node} as {role!r}: a node is a worker or an edge")


def _operator_role(name: str, role: str) -> OperatorRole:
    _refuse_bad_name("an operator", name)
    for known in get_args(OperatorRole):
        if role == known:
            return known  # type: ignore[no-any-return]
    raise Refused("bad_role", f"cannot enrol {name} as {role!r}: a role is one of {', '.join(get_args(OperatorRole))}")


def _removed(members: Roster, name: str) -> Roster:
    node = members.node(name)
    invitations = [i for i in members.invitations if i.node == name]
    if node is None and not invitations:
        known = ", ".join(node.name for node in members.nodes)
        raise Refused("no_such_node", f"cannot remove {name}: no such node is enrolled (enrolled: {known})")
    if node is not None and node.role == "master":
        raise Refused("master_node", f"cannot remove {name}: it is the master's own node")
    gone: list[Entry] = [*invitations, *([node] if node else [])]
    return members.minus(*gone)


def _with_operator(members: Roster, entry: Operator) -> Roster:
    if members.operator(entry.name) is not None:
        raise Refused(
            "name_taken",
            f"cannot add {entry.name}: an operator of that name is enrolled",
            hint=f"For a new key: mcp operator remove {entry.name}, then add again.",
        )
    return members.plus(entry)


def _without_operator(members: Roster, name: str) -> Roster:
    entry = members.operator(name)
    if entry is None:
        known = ", ".join(operator.name for operator in members.operators) or "none"
        raise Refused("no_such_operator", f"cannot remove {name}: no such operator is enrolled (enrolled: {known})")
    return members.minus(entry)
