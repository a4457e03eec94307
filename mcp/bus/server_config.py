"""The whole configuration of nats-server as text: who may connect and what they may say, nothing edited by hand.

Pure rendering: every name, key, path and address is checked first, so nothing that comes from outside can add a line.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Literal

from mcp.bus.keys import is_public_key
from mcp.bus.subjects import Grant
from mcp.bus.tls import SERVER_NAME
from mcp.model.values import frozen

MAX_PAYLOAD = "256KB"
"""Of one message, headers included; our own limit is half of it (transport.MAX_BODY_BYTES)."""

PING_INTERVAL_S = 5
PING_MAX = 2
"""A silent connection is given up after 12 to 20 s (docs/bus.md, Liveness); 2 s pings were brittle on a bad link."""

WRITE_DEADLINE_S = 5
MAX_PENDING = "16MB"
"""How long, and how many bytes, a reader may lag before the server closes it."""

NOTHING = "_none"
"""Rendered where a grant is empty: an empty allow list allows everything (seen with nats-server 2.15.1)."""

Account = Literal["MCP", "SYS"]
ACCOUNT: Account = "MCP"
SYSTEM_ACCOUNT: Account = "SYS"

_LABEL = re.compile(r"[a-z0-9 -]{1,80}")
_TOKEN = r"(?:[A-Za-z0-9_$-]{1,64}|\*)"
_SUBJECT = re.compile(rf"{_TOKEN}(?:\.{_TOKEN}){{0,9}}(?:\.>)?")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_PATH = re.compile(r"/[^\x00-\x1f\x7f\"'\\$]*")


@frozen(kw_only=True)
class Listen:
    """Where the server listens and what it shows to its clients."""

    address: str
    port: int
    cert_file: str
    """Certificate and private key, in one file."""


@frozen(kw_only=True)
class User:
    """One key that may connect; `label` is for whoever reads the file ("agent orion")."""

    label: str
    public_key: str
    grant: Grant
    account: Account = ACCOUNT


def render(listen: Listen, users: Iterable[User]) -> str:
    """Return the configuration: the same users give the same text, in whatever order they come.

    Raises:
        ValueError: something would not be what it seems in the file: a name, a key, a subject, a path, an address;
            or one key stands for two users.
    """
    ordered = sorted(users, key=lambda user: (user.label, user.public_key))
    _refuse_shared_keys(ordered)
    return "\n".join(
        [
            "# Made by MCP from the enrolment files beside it; changes here are lost.",
            f'server_name: "{SERVER_NAME}"',
            f"listen: {_quoted(endpoint(listen.address, listen.port))}",
            f"max_payload: {MAX_PAYLOAD}",
            f'ping_interval: "{PING_INTERVAL_S}s"',
            f"ping_max: {PING_MAX}",
            f'write_deadline: "{WRITE_DEADLINE_S}s"',
            f"max_pending: {MAX_PENDING}",
            "tls {",
            f"  cert_file: {_quoted(_path(listen.cert_file))}",
            f"  key_file: {_quoted(_path(listen.cert_file))}",
            "  handshake_first: true",
            '  min_version: "1.3"',
            "}",
            f"system_account: {SYSTEM_ACCOUNT}",
            "accounts {",
            *_account(SYSTEM_ACCOUNT, ordered),
            *_account(ACCOUNT, ordered),
            "}",
            "",
        ]
    )


def endpoint(address: str, port: int) -> str:
    """Return "address:port", an IPv6 address in brackets.

    Raises:
        ValueError: no address, or no port.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"{port} is no port")
    try:
        # A scope ("fe80::1%eth0") may hold any character, quotes and line ends too.
        bracketed = "%" not in address and ipaddress.ip_address(address).version == 6
    except ValueError:
        bracketed = False
    if not bracketed and not _HOST_NAME.fullmatch(address):
        raise ValueError(f"{address!r} is neither an IP address nor a host name")
    return f"[{address}]:{port}" if bracketed else f"{address}:{port}"


def _refuse_shared_keys(users: list[User]) -> None:
    owner: dict[str, str] = {}
    for user in users:
        if user.public_key in owner:
            raise ValueError(f"{owner[user.public_key]} and {user.label} have the same key")
        owner[user.public_key] = user.label


def _account(name: Account, users: list[User]) -> list[str]:
    return [
        f"  {name} {{ users: [",
        *[line for user in users if user.account == name for line in _user(user)],
        "  ] }",
    ]


def _user(user: User) -> list[str]:
    if not _LABEL.fullmatch(user.label):
        raise ValueError(f"{user.label!r} is no label")
    if not is_public_key(user.public_key):
        raise ValueError(f"{user.label} has no valid public key: {user.public_key!r}")
    return [
        f"    # {user.label}",
        f"    {{ nkey: {user.public_key}, permissions: {{",
        f"      publish: {{ allow: [{_subjects(user.grant.publish)}] }}",
        f"      subscribe: {{ allow: [{_subjects(user.grant.subscribe)}] }}",
        "    } }",
    ]


def _subjects(subjects: tuple[str, ...]) -> str:
    for subject in subjects:
        if not _SUBJECT.fullmatch(subject):
            raise ValueError(f"{subject!r} is no subject")
    return ", ".join(_quoted(subject) for subject in subjects or (NOTHING,))


def _path(path: str) -> str:
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not an absolute path without quotes, backslashes, $ and control characters")
    return path


def _quoted(text: str) -> str:
    return f'"{text}"'
