"""Writes nats/permissions.md from the table of subjects: `python -m mcp.bus.permissions`, with --check for the tests."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from mcp.bus.server_config import NOTHING
from mcp.bus.subjects import ConnectionRole, Grant, OperatorRole, grant, operator_grant

PAGE = Path(__file__).parents[2] / "nats" / "permissions.md"

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


def page() -> str:
    """Return the page."""
    return f"""\
# Who may say and hear what

Made by `python -m mcp.bus.permissions` from `mcp/bus/subjects.py`; a test compares the two. The server's configuration is
rendered from the same table. There are allow lists only, no deny rules and no `allow_responses`. Where a list is empty the
server is given `{NOTHING}`, a subject that nobody uses: it takes an empty list for "everything".

{_table((_WHO[role], grant(role, _NAMES.get(role, ""))) for role in get_args(ConnectionRole))}
## Operators by role

An admin may send every command. The bus itself refuses the others what is not on their list.

{_table((f"{role} kyle", operator_grant(role, "kyle")) for role in get_args(OperatorRole))}"""


def _table(rows: Iterable[tuple[str, Grant]]) -> str:
    lines = ["| who | may publish | may subscribe |", "|---|---|---|"]
    lines += [f"| {who} | {_cell(rights.publish)} | {_cell(rights.subscribe)} |" for who, rights in rows]
    return "\n".join(lines) + "\n"


def _cell(subjects: tuple[str, ...]) -> str:
    return ", ".join(f"`{subject}`" for subject in subjects) or "nothing"


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with --check say whether it is as it should be (exit code 1: it is not)."""
    paths = [Path(argument) for argument in arguments if argument != "--check"]
    path = paths[0] if paths else PAGE
    if "--check" not in arguments:
        path.write_text(page(), encoding="utf-8")
        return 0
    if path.exists() and path.read_text(encoding="utf-8") == page():
        return 0
    print(f"{path} is stale: python -m mcp.bus.permissions writes it anew", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
