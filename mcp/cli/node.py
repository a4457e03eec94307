"""The nodes: list, show, why, invite, remove."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcp.cli import exits
from mcp.cli.app import Group, command, settings_of
from mcp.cli.completion import complete_nodes

if TYPE_CHECKING:
    from mcp.bus.plain import Plain
    from mcp.cli.output import Output
    from mcp.cli.session import Session

ENROLMENT_S = 15.0
"""The master renders, checks and reloads the bus's configuration: 70 ms, seconds on a busy machine."""


@click.group("node", cls=Group)
def node() -> None:
    """The nodes: list, show, why, invite, remove."""


def check_name(name: str, hint: str = "") -> None:
    """Refuse what no node can be called, before anything is sent.

    Raises:
        Usage: it is no name.
    """
    from mcp.model.names import is_node_name

    if not is_node_name(name):
        raise exits.Usage(
            f"{name[:60]!r} is no node name: lower-case letters, digits and dashes, at most 32, and no word of the bus",
            hint=hint or "`mcp node list` lists the nodes.",
        )


@command("list", group=node, examples=("mcp node list", "mcp node list --json"))
@click.pass_context
def list_(ctx: click.Context) -> int:
    """Every node: its health, what it has and what is free, and how old that word is."""
    from mcp.cli import session

    async def work(connected: Session) -> int:
        found = await connected.status()
        if connected.settings.is_json:
            connected.out.result({"nodes": found["nodes"]})
            return exits.DONE
        from mcp.cli.status import show_nodes

        show_nodes(connected.out, found["nodes"])
        _show_problems(connected.out, found["nodes"])
        return exits.DONE

    return session.run(settings_of(ctx), work)


def _show_problems(out: Output, nodes: list[Plain]) -> None:
    from mcp.cli.output import safe

    problems = [problem for each in nodes for problem in each.get("problems", ())]
    if problems:
        out.say()
    for problem in problems:
        out.say(safe(problem), "red")


@command("show", group=node, examples=("mcp node show orion",))
@click.argument("name", metavar="NODE", shell_complete=complete_nodes)
@click.pass_context
def show(ctx: click.Context, name: str) -> int:
    """All about one node, and what runs on it."""
    from mcp.cli import session

    check_name(name)

    async def work(connected: Session) -> int:
        found = await connected.status(node=name)
        row: Plain = next((each for each in found["nodes"] if each["name"] == name), {})
        services = [each for each in found["services"] if each["node"] == name]
        if connected.settings.is_json:
            connected.out.result({"node": row, "services": services})
        else:
            _show(connected.out, row, services)
        return exits.DONE

    return session.run(settings_of(ctx), work)


def _show(out: Output, row: Plain, services: list[Plain]) -> None:
    from mcp.cli.output import age, facts, safe, size
    from mcp.cli.status import containers_of, show_containers

    out.say(f"{safe(row['name'])}: {out.by_word(safe(row['health']))}", "bold")
    for problem in row.get("problems", ()):
        out.say(f"  {safe(problem)}", "red")
    seen = "never" if row.get("last_seen_s") is None else f"{age(row['last_seen_s'])} ago by {row.get('last_seen_by')}"
    out.say(
        facts(
            {
                "role": row["role"] + (", draining" if row.get("is_draining") else ""),
                "address": row.get("address") or "-",
                "health since": row.get("health_since") or "-",
                "last heard": seen,
                "agent": f"version {row.get('version') or '?'}, incarnation {row.get('incarnation') or '-'}",
                "engine": " ".join(filter(None, (row.get("engine"), row.get("engine_version")))) or "-",
                "machine": f"{row.get('arch') or '?'}, {row.get('cpu_cores') or '?'} cores, load {row.get('cpu_load') or 0:.2f}",
                "memory": f"{size(row.get('memory_free_bytes'))} free of {size(row.get('memory_bytes'))}",
                "disk": f"{size(row.get('disk_free_bytes'))} free",
            }
        )
    )
    out.say()
    show_containers(out, containers_of(services))


@command("why", group=node, examples=("mcp node why orion",))
@click.argument("name", metavar="NODE", shell_complete=complete_nodes)
@click.pass_context
def why(ctx: click.Context, name: str) -> int:
    """Why the master believes what it believes of a node: beats, disconnects, probes."""
    from mcp.cli import session

    check_name(name)

    async def work(connected: Session) -> int:
        from mcp.cli.output import age, safe

        found = await connected.question("explain_node", {"node": name})
        out = connected.out
        if connected.settings.is_json:
            out.result(found)
            return exits.DONE
        out.say(safe(found.get("explanation", "")), "bold")
        rows = [
            (f"{age(each['age_s'])} ago", each["sign"], each["health"], each.get("detail", ""))
            for each in found.get("evidence", ())
        ]
        if rows:
            out.table(("WHEN", "SIGN", "THEN", "DETAIL"), rows, paint=2)
        return exits.DONE

    return session.run(settings_of(ctx), work)


@command("invite", group=node, examples=("mcp node invite orion", "mcp node invite svc --role edge"))
@click.argument("name", metavar="NODE")
@click.option(
    "--role", type=click.Choice(("worker", "edge")), default="worker", show_default=True, help="What it will be."
)
@click.pass_context
def invite(ctx: click.Context, name: str, role: str) -> int:
    """Print the one line to run on a new node.

    Whoever has the line may join under this name, once, within five minutes.
    """
    from mcp.cli import session

    check_name(name, "Like `mcp node invite orion`; taken words are master, cli and the like.")

    async def work(connected: Session) -> int:
        made = await connected.change("invite_node", {"node": name, "role": role}, timeout_s=ENROLMENT_S)
        line = f"mcp-agent join {made['token']}"
        if connected.settings.is_json:
            connected.out.result({**made, "command": line})
            return exits.DONE
        connected.out.note(f"Run this on {name} within {made['valid_s'] / 60:.0f} minutes; it works once:")
        connected.out.say(line)
        return exits.DONE

    return session.run(settings_of(ctx), work)


@command("remove", group=node, examples=("mcp node remove orion", "mcp node remove orion --force"))
@click.argument("name", metavar="NODE", shell_complete=complete_nodes)
@click.option("--force", is_flag=True, help="Although services are on it, or may be.")
@click.pass_context
def remove(ctx: click.Context, name: str, force: bool) -> int:
    """Cut a node off the bus and forget it; its containers go on, unmanaged."""
    from mcp.cli import session

    check_name(name)

    async def work(connected: Session) -> int:
        from mcp.cli.output import safe

        done = await connected.change("remove_node", {"node": name, "force": force}, timeout_s=ENROLMENT_S)
        if connected.settings.is_json:
            connected.out.result({"node": name, "outcome": "done", "detail": done.get("detail", "")})
        else:
            connected.out.say(safe(done.get("detail") or f"{name} is removed"))
        return exits.DONE

    return session.run(settings_of(ctx), work)
