"""The one line that lets a node join: where the bus is, whose invitation it is, its secret, and which certificate to trust.

    mcpj1_100.64.0.1:4222_<base64url of: invitation 4 bytes, seed 32, SHA-256 of the certificate 32, checksum 4>

118 characters with that address. The checksum covers the address too, so a token that was cut off or changed on its way is
told apart from one that is merely used up.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets

import attrs

from mcp.bus.keys import SEED_BYTES, raw_seed, seed_of
from mcp.bus.server_config import endpoint
from mcp.model.errors import Refused
from mcp.model.values import frozen

PREFIX = "mcpj1_"
_ID_BYTES = 4
_CHECKSUM_BYTES = 4
_FINGERPRINT_BYTES = 32
_SECRET_CHARACTERS = 96
_SHAPE = re.compile(r"mcpj1_(\[[0-9a-f:.]+\]|[a-z0-9.-]+):([0-9]{1,5})_([A-Za-z0-9_-]*)")
_AGAIN = "Copy the whole line once more, or ask for a new invitation: mcp node invite NAME"


@frozen(kw_only=True)
class JoinToken:
    """What a join token says."""

    address: str
    port: int
    invitation: str
    """8 hex digits."""
    seed: str = attrs.field(repr=False)
    """Of the throw-away key that may only join."""
    fingerprint: str
    """SHA-256 of the bus's certificate, 64 hex digits."""

    def text(self) -> str:
        """Return the line to hand over; whoever has it may join, once."""
        where = endpoint(self.address, self.port)
        said = bytes.fromhex(self.invitation) + raw_seed(self.seed) + bytes.fromhex(self.fingerprint)
        return f"{PREFIX}{where}_{base64.urlsafe_b64encode(said + _checksum(where, said)).decode()}"


def new_invitation_id() -> str:
    """Return a fresh name for an invitation; it is public, the secret is the seed."""
    return secrets.token_hex(_ID_BYTES)


def parse_token(text: str) -> JoinToken:
    """Read a token; white space that a terminal or a mail put into it does not matter.

    Raises:
        Refused: code bad_token: no token, of another version, cut off, or changed. The text never shows the token.
    """
    line = "".join(text.split())
    _refuse_other_things(line)
    shape = _SHAPE.fullmatch(line)
    if shape is None or len(shape[3]) < _SECRET_CHARACTERS:
        raise _bad(f"it is cut off: {len(line)} characters are too few")
    if len(shape[3]) > _SECRET_CHARACTERS:
        raise _bad("something was added to its end")
    address, port = shape[1].strip("[]"), int(shape[2])
    said = base64.urlsafe_b64decode(shape[3])
    body, checksum = said[:-_CHECKSUM_BYTES], said[-_CHECKSUM_BYTES:]
    if checksum != _checksum(f"{shape[1]}:{shape[2]}", body):
        raise _bad("a character of it was changed")
    try:
        endpoint(address, port)
    except ValueError as error:
        raise _bad(str(error)) from error
    return JoinToken(
        address=address,
        port=port,
        invitation=body[:_ID_BYTES].hex(),
        seed=seed_of(body[_ID_BYTES : _ID_BYTES + SEED_BYTES]),
        fingerprint=body[-_FINGERPRINT_BYTES:].hex(),
    )


def _refuse_other_things(line: str) -> None:
    version = re.match(r"mcpj(\d+)_", line)
    if version is None:
        raise _bad("a token begins with mcpj1_")
    if version[0] != PREFIX:
        raise Refused(
            "bad_token",
            f"cannot read this join token: it is of version {version[1]}, this agent knows version 1",
            hint="Use the same version of MCP on this node as on the master.",
        )
    odd = re.search(r"[^A-Za-z0-9_.:\[\]-]", line)
    if odd is not None:
        raise _bad(f"its character {odd.start() + 1} is {odd[0]!r}, which no token has")


def _checksum(where: str, said: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + where.encode() + said).digest()[:_CHECKSUM_BYTES]


def _bad(reason: str) -> Refused:
    return Refused("bad_token", f"cannot read this join token: {reason}", hint=_AGAIN)
