"""Writes the pages in nats/ from the table of subjects: `python -m mcp.bus.permissions`, with --check for the tests.

permissions.md says who may do what; example.conf is the configuration of a small fleet, as nats-server is given it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from mcp.bus.keys import key_of, seed_of
from mcp.bus.roster import Invitation, MasterPart, Node, Operator, Roster
from mcp.bus.server_config import NOTHING, Listen, render
from mcp.bus.subjects import ConnectionRole, Grant, OperatorRole, grant, operator_grant

FOLDER = Path(__file__).parents[2] / "nats"

_NAMES: dict[ConnectionRole, str] = {"agent": "orion", "operator": "kyle", "debug": "kyle", "join": "3f2a9c11"}
_WHO: dict[ConnectionRole, str] = {
    "agent": "the agent of orion",
    "operator": "the operator kyle (admin)",
    "debug": "the operator kyle (debug)",
    "join": "whoever holds the token of invitation 3f2a9c11, until the node has registered",
    "master": "the master, hearing and ordering",
    "answers": "the master, answering",
    "system": "the master on the system account",
}


def pages() -> dict[str, str]:
    """Return every page by its file's name."""
    return {"permissions.md": permissions(), "example.conf": example()}


def permissions() -> str:
    """Return the table of who may say and hear what."""
    return f"""\
# Who may say and hear what

Made by `python -m mcp.bus.permissions` from `mcp/bus/subjects.py`; a test compares the two. The server's configuration is
rendered from the same table. There are allow lists only, no deny rules and no `allow_responses`. Where a list is empty the
server is given `{NOTHING}`, a subject that nobody uses: it takes an empty list for "everything".

{_table((_WHO[role], grant(role, _NAMES.get(role, ""))) for role in get_args(ConnectionRole))}
## Operators by role

An admin may send every command. The bus itself refuses the others what is not on their list.

{_table((f"{role} kyle", operator_grant(role, "kyle")) for role in get_args(OperatorRole))}"""


def example() -> str:
    """Return the configuration of a fleet of three nodes, an operator and an open invitation."""
    members = Roster.of(
        [
            MasterPart(name="master", public_key=_key("master")),
            MasterPart(name="answers", public_key=_key("answers")),
            MasterPart(name="system", public_key=_key("system")),
            Node(name="rift", role="master", public_key=_key("rift")),
            Node(name="orion", role="worker", public_key=_key("orion")),
            Node(name="svc", role="edge", public_key=_key("svc")),
            Operator(name="kyle", role="admin", public_key=_key("kyle")),
            Invitation(
                id="3f2a9c11",
                node="hyperborea",
                role="worker",
                public_key=_key("3f2a9c11"),
                expires_at_s=1_800_000_000.0,
            ),
        ]
    )
    return render(Listen(address="100.64.0.1", port=4222, cert_file="/srv/mcp/keys/bus.pem"), members.users())


def _key(name: str) -> str:
    """Return a public key that looks real and whose seed anybody can make: for the example only."""
    return key_of(seed_of(name.encode().ljust(32, b"."))).public_key


def _table(rows: Iterable[tuple[str, Grant]]) -> str:
    lines = ["| who | may publish | may subscribe |", "|---|---|---|"]
    lines += [f"| {who} | {_cell(rights.publish)} | {_cell(rights.subscribe)} |" for who, rights in rows]
    return "\n".join(lines) + "\n"


def _cell(subjects: tuple[str, ...]) -> str:
    return ", ".join(f"`{subject}`" for subject in subjects) or "nothing"


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with --check say whether they are as they should be (exit code 1: they are not)."""
    folders = [Path(argument) for argument in arguments if argument != "--check"]
    folder = folders[0] if folders else FOLDER
    stale = [folder / name for name, text in pages().items() if not _is(folder / name, text)]
    if "--check" not in arguments:
        for path in stale:
            path.write_text(pages()[path.name], encoding="utf-8")
        return 0
    for path in stale:
        print(f"{path} is stale: python -m mcp.bus.permissions writes it anew", file=sys.stderr)  # noqa: T201 - a program
    return 1 if stale else 0


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
