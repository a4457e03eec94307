"""The operations: list, show, cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcp.cli import exits
from mcp.cli.app import Group, command, settings_of
from mcp.cli.completion import complete_operations

if TYPE_CHECKING:
    from mcp.bus.plain import Plain
    from mcp.cli.output import Output
    from mcp.cli.session import Session

MAX_ID = 64


@click.group("op", cls=Group)
def op() -> None:
    """The operations: list, show, cancel."""


@command("list", group=op, examples=("mcp op list", "mcp op list --json"))
@click.pass_context
def list_(ctx: click.Context) -> int:
    """What is being done to services, and what was done; also from before a restart of the master."""
    from mcp.cli import session

    async def work(connected: Session) -> int:
        found = await connected.question("list_operations", {})
        if connected.settings.is_json:
            connected.out.result({"operations": found["operations"]})
        else:
            _show_list(connected.out, found["operations"])
        return exits.DONE

    return session.run(settings_of(ctx), work)


def _show_list(out: Output, rows: list[Plain]) -> None:
    if not rows:
        out.say("no operations")
        return
    cells = [
        (
            row["op"],
            row["service"],
            row["kind"],
            row.get("outcome") or row["state"],
            row.get("node") or "-",
            row.get("operator") or "-",
            (row.get("started_at") or row.get("ended_at") or "-")[:19].replace("T", " "),
            (row.get("reason") or "").partition("\n")[0],
        )
        for row in rows
    ]
    out.table(
        ("OP", "SERVICE", "KIND", "STATE", "NODE", "BY", "WHEN (UTC)", "WHY"), cells, paint=3, spare=("BY", "NODE")
    )


@command("show", group=op, examples=("mcp op show 4f2c", "mcp op show 4f2c --follow"))
@click.argument("id", metavar="ID", shell_complete=complete_operations)
@click.option("-f", "--follow", is_flag=True, help="Wait for its end; the exit code is then the operation's.")
@click.pass_context
def show(ctx: click.Context, id: str, follow: bool) -> int:
    """How an operation stands, or how it ended."""
    from mcp.cli import session

    check_id(id)

    async def work(connected: Session) -> int:
        rows = (await connected.question("list_operations", {}))["operations"]
        row = next((each for each in rows if each["op"] == id), None)
        if row and row["state"] != "ended" and follow:
            return await _follow(connected, row)
        ended = await connected.question("follow_operation", {"op": id, "wait": False})
        state = row["state"] if row else "ended"
        if connected.settings.is_json:
            connected.out.result({"state": state, **(row or {}), **ended})
        else:
            _show(connected.out, ended, state, row)
        return _code_of(ended, state) if follow else exits.DONE

    return session.run(settings_of(ctx), work)


async def _follow(connected: Session, row: Plain) -> int:
    from mcp.cli.operation import DOING, Operation, tell

    running = Operation.known(connected, row["op"], row["kind"], row["service"])
    ended = await running.follow(f"{DOING.get(row['kind'], row['kind'])} {row['service']} (op {row['op']})")
    if connected.settings.is_json:
        connected.out.result({"state": "ended", **row, **ended})
    else:
        tell(connected.out, ended)
    return _code_of(ended, "ended")


def _code_of(ended: Plain, state: str) -> int:
    from mcp.cli.operation import exit_code

    return exit_code(ended) if state == "ended" else exits.DONE


def _show(out: Output, ended: Plain, state: str, row: Plain | None) -> None:
    from mcp.cli.operation import tell_log
    from mcp.cli.output import safe, safe_lines, took

    what = safe(ended["outcome"]) if state == "ended" else state
    by = f" by {safe(row['operator'])}" if row and row.get("operator") else ""
    when = f", begun {safe(row['started_at'])}" if row and row.get("started_at") else ""
    out.say(f"op {safe(ended['op'])}: {safe(ended['kind'])} of {safe(ended['service'])}{by}{when}: {out.by_word(what)}")
    if ended.get("steps"):
        heads = ("STEP", "STATE", "NODE", "TOOK", "DETAIL")
        cells = [(s["step"], s["state"], s["node"], took(s["seconds"]), s.get("detail", "")) for s in ended["steps"]]
        out.table(heads, cells, indent="  ", paint=1)
    if ended.get("reason"):
        out.say(safe_lines(ended["reason"]))
    for log in ended.get("logs", ()):
        tell_log(out, log)
    for leftover in ended.get("leftovers", ()):
        out.say(f"left: {safe(leftover)}", "yellow")
    if state != "ended":
        word = safe(ended["op"])
        out.say(f"`mcp op show {word} --follow` waits for its end, `mcp op cancel {word}` stops it.", "dim")
    elif ended.get("hint"):
        out.say(safe_lines(ended["hint"]))


@command("cancel", group=op, examples=("mcp op cancel 4f2c",))
@click.argument("id", metavar="ID", shell_complete=complete_operations)
@click.pass_context
def cancel(ctx: click.Context, id: str) -> int:
    """Stop an operation at the next safe point, and undo what it did."""
    from mcp.cli import session

    check_id(id)

    async def work(connected: Session) -> int:
        from mcp.cli.output import safe

        done = await connected.change("cancel_operation", {"op": id}, timeout_s=session.QUESTION_S)
        if connected.settings.is_json:
            connected.out.result({"op": id, "outcome": "done", "detail": done.get("detail", "")})
        else:
            connected.out.say(safe(done.get("detail") or f"op {id} is being undone"))
            connected.out.note(f"`mcp op show {safe(id)} --follow` waits for its end.")
        return exits.DONE

    return session.run(settings_of(ctx), work)


def check_id(id: str) -> None:
    """Refuse what no operation is called, before anything is sent.

    Raises:
        Usage: it is no id.
    """
    if not (0 < len(id) <= MAX_ID and id.isascii() and id.replace("-", "").isalnum()):
        raise exits.Usage(f"{id[:60]!r} is no operation id", hint="`mcp op list` lists them.")
