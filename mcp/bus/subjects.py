"""The one table: lanes to subjects to permissions. Subscriptions, server grants and the page in nats/ come from here.

| lane       | subject                           | from -> to          |
|------------|-----------------------------------|---------------------|
| command    | mcp.cmd.<user>.<kind>             | operator -> master  |
| join       | mcp.join.<invitation>             | new node -> master  |
| register   | mcp.node.<node>.register          | agent -> master     |
| heartbeat  | mcp.node.<node>.heartbeat         | agent -> master     |
| event      | mcp.node.<node>.event.<kind>      | agent -> master     |
| log        | mcp.node.<node>.log.<stream>      | agent -> master     |
| reply      | mcp.node.<node>.reply.<op>        | agent -> master     |
| work       | mcp.work.<node>.<kind>            | master -> agent     |
| sealed     | sealed.work.<node>.<kind>, sealed.cmd.<user>.<kind>     |
| event      | mcp.event.<kind>                  | master -> everybody |
"""

from __future__ import annotations

import re
from typing import Literal

from mcp.model.names import NODE_NAME
from mcp.model.values import frozen

ConnectionRole = Literal["agent", "operator", "debug", "join", "master", "answers", "system"]
OperatorRole = Literal["admin", "deployer", "viewer", "debug"]

LOOKING = (
    "explain_node",
    "follow_logs",
    "follow_operation",
    "get_status",
    "grant_reader_credit",
    "list_operations",
    "plan_service",
)
"""Commands that change nothing: all that a viewer may send."""

DEPLOYING = (
    "cancel_operation",
    "deploy_service",
    "restart_service",
    "start_service",
    "stop_service",
    "undeploy_service",
)
"""Commands that change services, not the fleet: a deployer may send them too. A command on neither list is for admins."""


@frozen
class Grant:
    """What one connection may publish and subscribe to. Allow lists only: deny rules can be got around."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


MAX_LENGTH = 512
"""Characters of a subject; ours have some 100. The server's limit for a whole protocol line is 4096."""

_SUBJECT = re.compile(r"[!-)+-\-/-=?-~]+(?:\.[!-)+-\-/-=?-~]+)*")
"""Tokens of visible ASCII without `.`, `*` and `>`, with dots between."""


def is_subject(text: str) -> bool:
    """Say whether something can be published there."""
    return len(text) <= MAX_LENGTH and _SUBJECT.fullmatch(text) is not None


def command(user: str, kind: str, *, is_sealed: bool = False) -> str:
    """Return where an operator's command goes; sealed when its body carries a secret."""
    return f"{_tree(is_sealed=is_sealed)}.cmd.{user}.{kind}"


def join(invitation: str) -> str:
    """Return where a joining node shows its key."""
    return f"mcp.join.{invitation}"


def register(node: str) -> str:
    """Return where a node registers."""
    return f"mcp.node.{node}.register"


def heartbeat(node: str) -> str:
    """Return where a node beats."""
    return f"mcp.node.{node}.heartbeat"


def node_event(node: str, kind: str) -> str:
    """Return where a node says what happened."""
    return f"mcp.node.{node}.event.{kind}"


def log(node: str, stream: str) -> str:
    """Return where a node sends the lines of a log stream."""
    return f"mcp.node.{node}.log.{stream}"


def reply(node: str, op: str) -> str:
    """Return where a node answers an order."""
    return f"mcp.node.{node}.reply.{op}"


def work(node: str, kind: str, *, is_sealed: bool = False) -> str:
    """Return where an order for a node goes; sealed when its body carries a secret."""
    return f"{_tree(is_sealed=is_sealed)}.work.{node}.{kind}"


def _tree(*, is_sealed: bool) -> str:
    return "sealed" if is_sealed else "mcp"


def event(kind: str) -> str:
    """Return where the master tells everybody."""
    return f"mcp.event.{kind}"


def inbox(role: Literal["cli", "agent", "join"], name: str) -> str:
    """Return the prefix, with its last dot, under which a connection may hear answers."""
    return f"_INBOX.{role}.{name}."


def node_pattern(node: str) -> str:
    """Return all that a node says: the master subscribes once for each enrolled node."""
    return f"mcp.node.{node}.>"


def work_pattern(node: str, *, is_sealed: bool = False) -> str:
    """Return all that is asked of a node, in one of the two trees."""
    return f"{_tree(is_sealed=is_sealed)}.work.{node}.>"


def grant(role: ConnectionRole, name: str = "") -> Grant:
    """Return what a connection may do; `name` is the node, the operator or the invitation.

    A wildcard must be a whole token, else it is taken literally (docs/bus.md traps), hence the dotted inboxes.
    """
    match role:
        case "agent":
            return Grant(
                publish=(node_pattern(name),),
                subscribe=(work_pattern(name), work_pattern(name, is_sealed=True), f"_INBOX.agent.{name}.>"),
            )
        case "operator":
            return Grant(
                publish=(f"mcp.cmd.{name}.>", f"sealed.cmd.{name}.>"),
                subscribe=(f"_INBOX.cli.{name}.>", "mcp.event.>"),
            )
        case "debug":
            return Grant(publish=(), subscribe=("mcp.>",))
        case "join":
            return Grant(publish=(f"mcp.join.{name}",), subscribe=(f"_INBOX.join.{name}.>",))
        case "master":
            return Grant(
                publish=("mcp.work.>", "sealed.work.>", "mcp.event.>"),
                subscribe=("mcp.cmd.>", "sealed.cmd.>", "mcp.join.*", "mcp.node.>"),
            )
        case "answers":
            return Grant(publish=("_INBOX.cli.>", "_INBOX.agent.>", "_INBOX.join.>"), subscribe=())
        case "system":
            return Grant(
                publish=(
                    "$SYS.REQ.SERVER.PING.VARZ",
                    "$SYS.REQ.SERVER.*.CONNZ",
                    "$SYS.REQ.SERVER.*.RELOAD",
                ),
                subscribe=(
                    "_INBOX.system.>",
                    "$SYS.ACCOUNT.MCP.CONNECT",
                    "$SYS.ACCOUNT.MCP.DISCONNECT",
                    "$SYS.SERVER.*.CLIENT.AUTH.ERR",
                ),
            )


def operator_grant(role: OperatorRole, name: str) -> Grant:
    """Return what an operator may do; the bus itself refuses a viewer's deploy, whatever the master would say."""
    match role:
        case "admin":
            return grant("operator", name)
        case "debug":
            return grant("debug", name)
        case "viewer":
            kinds: tuple[str, ...] = LOOKING
        case "deployer":
            kinds = LOOKING + DEPLOYING
    allowed = tuple(f"{lane}.cmd.{name}.{kind}" for lane in ("mcp", "sealed") for kind in kinds)
    return Grant(publish=allowed, subscribe=grant("operator", name).subscribe)


def matches(pattern: str, subject: str) -> bool:
    """Say whether a subject falls under a pattern with NATS wildcards."""
    want, have = pattern.split("."), subject.split(".")
    for i, token in enumerate(want):
        if token == ">":
            return len(have) > i
        if i >= len(have) or token not in ("*", have[i]):
            return False
    return len(want) == len(have)


def speaker(subject: str) -> tuple[Literal["cli", "agent", "join"], str] | None:
    """Return who said it, from the subject that the grant pins; None where nobody may say such a thing.

    Messages carry no sender identity: this is the only one there is.
    """
    tokens = subject.split(".")
    match tokens:
        case ["mcp" | "sealed", "cmd", name, _]:
            role: Literal["cli", "agent", "join"] = "cli"
        case ["mcp", "node", name, *_]:
            role = "agent"
        case ["mcp", "join", name]:
            return ("join", name) if name.isalnum() else None
        case _:
            return None
    return (role, name) if NODE_NAME.fullmatch(name) else None


def may_answer(subject: str, reply_to: str) -> bool:
    """Say whether an answer to this message may go to this reply subject.

    The server does not check the reply field: without this an agent could have the master deliver its answer as an order
    to another agent (the confused deputy, docs/bus.md). Every answer passes here.
    """
    who = speaker(subject)
    if who is None:
        return False
    return reply_to.startswith(inbox(*who)) and is_subject(reply_to)
