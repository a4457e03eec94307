"""The node's side of joining: its own key is made here and stays here; a token opens the door once."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mcp.bus.files import make_private_folder, write_whole
from mcp.bus.join_token import JoinToken
from mcp.bus.keys import KeyPair, new_key, read_key, write_key
from mcp.bus.links import JoinLink
from mcp.bus.nats_bus import BusAddress, Credential, connect
from mcp.bus.transport import Transport
from mcp.model.errors import BusUnreachable, McpError, NoAnswer, NobodyListens, NotPermitted, Refused
from mcp.model.messages import Join, Joined
from mcp.model.values import frozen

ANSWER_TIMEOUT_S = 15.0
"""The master enrols, renders, checks and reloads before it answers: some 50 ms, seconds on a busy machine."""

PROOF_TIMEOUT_S = 10.0
_TRY_AGAIN_S = 0.1


@frozen(kw_only=True)
class Newcomer:
    """What a node says of itself when it joins."""

    address: str
    arch: str
    version: str


async def join(token: JoinToken, newcomer: Newcomer, *, key_file: Path, ca_file: Path) -> Joined:
    """Join the fleet: show this node's public key, get the authority's certificate, and prove that both work.

    Writes the key file (0600) before anything is said, and the CA file when everything is proved; nothing else. After an
    interruption the same call goes on with the same key. When the master says no, the key goes again.

    Raises:
        Refused: the node has joined before, or the invitation is used, expired or unknown.
        BusUnreachable: no bus there, or not the one that the token was made for; nothing was done.
        NobodyListens: the bus is there and the master is not; nothing was done.
        NoAnswer: the bus is there and the master does not answer; the same token may be tried again.
        AdapterError: a file could not be written or read.
    """
    if ca_file.exists():
        raise Refused(
            "joined_before",
            f"cannot join: this node is in a fleet already ({ca_file} is there); nothing was changed",
            hint=f"To join another one, remove {ca_file} and {key_file} first.",
        )
    is_new = not key_file.exists()
    key = _new_key_in(key_file) if is_new else read_key(key_file)
    try:
        joined = await _show_key(token, newcomer, key)
    except (Refused, BusUnreachable, NobodyListens, NotPermitted):  # nothing was done
        if is_new:
            key_file.unlink(missing_ok=True)
        raise
    await _prove(token, joined, key)
    write_whole(ca_file, joined.ca_pem)
    return joined


def _new_key_in(path: Path) -> KeyPair:
    key = new_key()
    if not path.parent.exists():
        make_private_folder(path.parent)
    write_key(path, key)
    return key


async def _show_key(token: JoinToken, newcomer: Newcomer, key: KeyPair) -> Joined:
    transport = await _enter(token)
    try:
        link = JoinLink(transport, token.invitation)
        shown = Join(
            node="",  # the invitation says who this is
            public_key=key.public_key,
            address=newcomer.address,
            arch=newcomer.arch,
            version=newcomer.version,
        )
        return await link.join(shown, timeout_s=ANSWER_TIMEOUT_S)
    finally:
        await transport.close()


async def _enter(token: JoinToken) -> Transport:
    address = BusAddress(host=token.address, port=token.port, fingerprint=token.fingerprint)
    door = Credential(role="join", name=token.invitation, seed=token.seed)
    try:
        return await connect(address, door, forever=False, name="mcp-agent join")
    except (NotPermitted, BusUnreachable) as error:
        # A connection in mid-handshake while the server reloads is refused or cut once, whoever it is.
        if error.code not in ("not_permitted", "hung_up"):
            raise
        await asyncio.sleep(_TRY_AGAIN_S)
    try:
        return await connect(address, door, forever=False, name="mcp-agent join")
    except NotPermitted as error:
        raise Refused(
            "unknown_invitation",
            f"cannot join: the bus at {token.address}:{token.port} does not know this invitation (used, or expired)",
            hint="Ask for a new invitation: mcp node invite NAME",
        ) from error


async def _prove(token: JoinToken, joined: Joined, key: KeyPair) -> None:
    """Connect as the node itself, as every later start will."""
    address = BusAddress(host=token.address, port=token.port, tls_name=joined.tls_name, ca_pem=joined.ca_pem)
    me = Credential(role="agent", name=joined.node, seed=key.seed)
    last: McpError | None = None
    try:
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            while True:
                try:
                    transport = await connect(address, me, forever=False, name=f"mcp-agent {joined.node}")
                    await transport.close()
                    return
                except (NotPermitted, BusUnreachable) as error:
                    # The reload that lets us in may just be going on, or the bus restarting.
                    last = error
                await asyncio.sleep(_TRY_AGAIN_S)
    except TimeoutError as error:
        raise NoAnswer(
            f"{joined.node} is enrolled, but cannot connect as itself: {last or 'the bus does not answer'}",
            hint="Run the same join line once more.",
        ) from error
