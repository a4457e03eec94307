"""The one place where an error becomes an exit code."""

from __future__ import annotations

from mcp.model.errors import BadDefinition, BusUnreachable, McpError, NoAnswer, NobodyListens, NotPermitted, Refused

DONE = 0
FAILED = 1
USAGE = 2
REFUSED = 3
UNREACHABLE = 4
UNKNOWN = 5
CHANGES = 10
INTERRUPTED = 130
OUTPUT_CLOSED = 141

MEANINGS = {
    DONE: "done (also: unchanged)",
    FAILED: "failed, and undone where something had been done",
    USAGE: "wrong usage, or a bad definition or configuration; nothing was sent",
    REFUSED: "refused, and the reason says by whom and why",
    UNREACHABLE: "unreachable; nothing was started",
    UNKNOWN: "the outcome is unknown; the operation's id and the command that will tell are printed",
    CHANGES: "`mcp plan` only: there are changes",
    INTERRUPTED: "interrupted with Ctrl-C; an operation that has begun goes on",
    OUTPUT_CLOSED: "whoever read the output has closed it",
}
"""Every exit code there is, for `mcp --help` and docs/cli.md."""

OUTCOMES = {
    "deployed": DONE,
    "unchanged": DONE,
    "done": DONE,
    "undone": FAILED,
    "failed": FAILED,
    "refused": REFUSED,
    "unknown": UNKNOWN,
}
"""How an operation ended -> exit code; an outcome we do not know is unknown."""


class Usage(McpError):
    """What was typed cannot be meant."""

    code = "usage"


class Unanswered(McpError):
    """A question that changes nothing got no answer."""

    code = "no_answer"


def code_of(error: McpError) -> int:
    """Return the exit code of an error of ours."""
    match error:
        case BadDefinition() | Usage():
            return USAGE
        case BusUnreachable() | NobodyListens() | Unanswered():
            return UNREACHABLE
        case NoAnswer():
            return UNKNOWN
        case Refused(code="internal" | "busy_master"):
            return FAILED
        case Refused() | NotPermitted():
            return REFUSED
    return FAILED
