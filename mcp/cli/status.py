"""Looking at the fleet: status and ps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcp.cli.app import command, settings_of
from mcp.cli.completion import complete_nodes, complete_services

if TYPE_CHECKING:
    from mcp.bus.plain import Plain
    from mcp.cli.output import Output
    from mcp.cli.session import Session


@command("status", examples=("mcp status", "mcp status web", "mcp status --json"))
@click.argument("service", required=False, default=None, shell_complete=complete_services)
@click.pass_context
def status(ctx: click.Context, service: str | None) -> int:
    """The whole fleet on one screen: problems first, then services, then nodes.

    Every figure says how old it is and whose word it is. With SERVICE: all about that one.
    """
    from mcp.cli import session

    if service is not None:
        from mcp.cli.deploy import check_service_name

        check_service_name(service)

    async def work(connected: Session) -> int:
        found = await connected.status(service=service or "")
        if connected.settings.is_json:
            connected.out.result({key: value for key, value in found.items() if key not in ("part", "parts")})
        elif service:
            _show_service(connected.out, found, service)
        else:
            _show_fleet(connected.out, found)
        return 0

    return session.run(settings_of(ctx), work)


def _show_fleet(out: Output, found: Plain) -> None:
    from mcp.cli.output import safe

    _show_problems(out, found)
    _show_operations(out, found)
    services, nodes = found.get("services", ()), found.get("nodes", ())
    if services:
        heads = ("SERVICE", "STATE", "NODE", "VERSION", "COMPONENTS", "SEEN")
        out.table(heads, [_service_row(row) for row in services], paint=1, spare=("VERSION", "COMPONENTS"))
    elif found.get("is_learning"):
        out.say("no services known yet")
    else:
        out.say("no services; `mcp deploy FILE` puts one on a node")
    out.say()
    show_nodes(out, nodes)
    well = sum(node["health"] == "healthy" for node in nodes)
    count = f"{len(services)} service{'s' if len(services) != 1 else ''}"
    out.say()
    out.say(f"{count}, {well} of {len(nodes)} nodes healthy; master on {safe(found.get('master', '?'))}", "dim")


def _show_problems(out: Output, found: Plain) -> None:
    from mcp.cli.output import safe

    problems = found.get("problems", ())
    if not problems:
        return
    out.say(f"{len(problems)} problem{'s' if len(problems) != 1 else ''}", "bold", "red")
    for problem in problems:
        out.say(f"  {safe(problem)}")
    out.say()


def _show_operations(out: Output, found: Plain) -> None:
    from mcp.cli.output import safe

    for row in found.get("operations", ()):
        step = next((s for s in reversed(row.get("steps", ())) if s["state"] in ("running", "undoing")), None)
        at = f", at {safe(step['step'])}" if step else ""
        by = f" by {safe(row['operator'])}" if row.get("operator") else ""
        out.say(
            f"{safe(row['kind'])} of {safe(row['service'])} is {safe(row['state'])} as op {safe(row['op'])}{by}{at}",
            "cyan",
        )
    if found.get("operations"):
        out.say()


def _service_row(row: Plain) -> tuple[object, ...]:
    from mcp.cli.output import age

    components = row.get("components", ())
    current = [c for c in components if c["generation"] == row["generation"]] or components
    running = sum(c["state"] == "running" for c in current)
    seen = f"{age(row.get('seen_s'))} ago, {row['source']}" if row.get("source") else "-"
    return row["name"], row["state"], row["node"], row.get("version") or "-", f"{running}/{len(current)} running", seen


def show_nodes(out: Output, nodes: list[Plain]) -> None:
    """Print the table of nodes."""
    heads = ("NODE", "HEALTH", "ROLE", "ADDRESS", "ARCH", "RUNS", "LOAD", "MEMORY FREE", "DISK FREE", "SEEN")
    out.table(heads, [_node_row(node) for node in nodes], paint=1, spare=("LOAD", "ARCH", "ADDRESS", "DISK FREE"))


def _node_row(node: Plain) -> tuple[object, ...]:
    from mcp.cli.output import age, size

    has = node.get("containers") is not None and node.get("engine") != "none"
    memory = f"{size(node['memory_free_bytes'])} of {size(node['memory_bytes'])}" if node.get("memory_bytes") else "-"
    disk = size(node["disk_free_bytes"]) if node.get("disk_free_bytes") is not None else "-"
    load = f"{node['cpu_load']:.1f}/{node['cpu_cores']:g}" if node.get("cpu_cores") is not None else "-"
    seen = (
        "never"
        if node.get("last_seen_s") is None
        else f"{age(node['last_seen_s'])} ago, {node.get('last_seen_by') or '?'}"
    )
    return (
        node["name"],
        node["health"] + (" (draining)" if node.get("is_draining") else ""),
        node["role"],
        node.get("address") or "-",
        node.get("arch") or "-",
        node["containers"] if has else "-",
        load,
        memory,
        disk,
        seen,
    )


def _show_service(out: Output, found: Plain, name: str) -> None:
    from mcp.cli.output import age, facts, safe

    _show_operations(out, found)
    for row in found.get("services", ()):
        out.say(f"{safe(row['name'])}: {out.by_word(safe(row['state']))}", "bold")
        for problem in row.get("problems", ()):
            out.say(f"  {safe(problem)}", "red")
        seen = f"{age(row.get('seen_s'))} ago by {row['source']}" if row.get("source") else "never"
        out.say(
            facts(
                {
                    "node": row["node"],
                    "tier": row["tier"],
                    "version": row.get("version") or "-",
                    "generation": f"{row['generation']} (spec {row['spec_hash']})",
                    "last heard": seen,
                }
            )
        )
        out.say()
        show_containers(out, containers_of([row]))
        if row.get("routes"):
            out.say()
            out.table(
                ("ROUTE", "LISTENER", "MODE", "PUBLIC", "BACKEND"), [_route_row(route) for route in row["routes"]]
            )
            out.say(
                "not served yet: the backend answers on its node; certificates and the edge are still to come", "dim"
            )
    if not found.get("services"):
        out.say(f"{safe(name)} is not known yet: the master is still asking its nodes")


def _route_row(route: Plain) -> tuple[object, ...]:
    return (
        route["hostname"],
        route["listener"],
        route["mode"],
        "yes" if route["public"] else "no",
        route.get("backend") or "-",
    )


# ----------------------------------------------------------------------------- ps


@command("ps", examples=("mcp ps", "mcp ps --node orion", "mcp ps --json"))
@click.option("--node", default="", metavar="NODE", help="Only those on this node.", shell_complete=complete_nodes)
@click.pass_context
def ps(ctx: click.Context, node: str) -> int:
    """The containers of the fleet."""
    from mcp.cli import session

    async def work(connected: Session) -> int:
        found = await connected.status()
        rows = [row for row in containers_of(found["services"]) if node in ("", row["node"])]
        if connected.settings.is_json:
            connected.out.result({"containers": rows})
        else:
            show_containers(connected.out, rows)
        return 0

    return session.run(settings_of(ctx), work)


def containers_of(services: list[Plain]) -> list[Plain]:
    """Return every container of these services, as `mcp ps --json` shows it."""
    return [
        {
            "service": container["service"],
            "component": container["component"],
            "node": service["node"],
            "container": container["name"],
            "image": container["image"],
            "state": container["state"],
            "health": container["health"],
            "started_at": container.get("started_at", ""),
            "spec_hash": container["spec_hash"],
            "generation": container["generation"],
            "exit_code": container.get("exit_code", 0),
            "restarts": container.get("restarts", 0),
            "ports": container.get("ports", {}),
            "problem": container.get("problem", ""),
        }
        for service in services
        for container in service.get("components", ())
    ]


def show_containers(out: Output, rows: list[Plain]) -> None:
    """Print the table of containers."""
    if not rows:
        out.say("no containers")
        return
    heads = ("CONTAINER", "STATE", "HEALTH", "NODE", "IMAGE", "STARTED", "PORTS")
    cells = [
        (
            row["container"],
            row["state"] if row["state"] == "running" else f"{row['state']} ({row['exit_code']})",
            row["health"] if row["health"] != "none" else "-",
            row["node"],
            row["image"],
            row["started_at"][:19].replace("T", " ") or "-",
            ", ".join(f"{name}={where}" if name else where for name, where in row["ports"].items()) or "-",
        )
        for row in rows
    ]
    out.table(heads, cells, paint=1, spare=("HEALTH", "STARTED", "PORTS"))
