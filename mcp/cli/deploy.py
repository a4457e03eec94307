"""Commands that change services: plan, deploy, undeploy, start, stop, restart."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

from mcp.cli import exits
from mcp.cli.app import command, settings_of
from mcp.cli.completion import complete_nodes, complete_services
from mcp.model.errors import McpError

if TYPE_CHECKING:
    from mcp.bus.plain import Plain
    from mcp.cli.definitions import Definition
    from mcp.cli.session import Session

PLAN_S = 60.0
"""A plan asks nodes and registries which platforms the images have."""

ROUTES_NOTE = "routes: the node publishes their ports; host names, certificates and the edge are not served yet"


@command("plan", examples=("mcp plan ./web.toml", "mcp plan web --node orion", "mcp plan web --json"))
@click.argument("services", nargs=-1, metavar="SERVICE|FILE...", shell_complete=complete_services)
@click.option("--node", default="", metavar="NODE", help="Plan for this node.", shell_complete=complete_nodes)
@click.pass_context
def plan(ctx: click.Context, services: tuple[str, ...], node: str) -> int:
    """Show what a deploy would do, and why there.

    Nothing is changed. Exit code 0: nothing to do, 10: there are changes, 3: no node fits.
    """

    async def work(session: Session, definitions: list[Definition]) -> int:
        made = [await _plan(session, definition, node) for definition in definitions]
        if session.settings.is_json:
            session.out.result(made[0] if len(made) == 1 else _several_plans(made))
        else:
            for definition, each in zip(definitions, made, strict=True):
                _show_plan(session, definition, node, each)
        if not all(each.get("can_place", True) for each in made):
            return exits.REFUSED
        return exits.CHANGES if any(each.get("changes") for each in made) else exits.DONE

    return _with_definitions(ctx, services, work)


async def _plan(session: Session, definition: Definition, node: str) -> Plain:
    body = {"spec": _plain_spec(definition), "node": node}
    return await session.question("plan_service", body, timeout_s=PLAN_S)


def _plain_spec(definition: Definition) -> Plain:
    import attrs

    return attrs.asdict(definition.spec)


def _several_plans(made: list[Plain]) -> Plain:
    return {
        "changes": any(each.get("changes") for each in made),
        "world": "",
        "steps": [step for each in made for step in each.get("steps", ())],
        "placement": [],
        "plans": made,
    }


def _show_plan(session: Session, definition: Definition, node: str, made: Plain) -> None:
    from mcp.cli.output import safe, safe_lines

    out = session.out
    name = definition.spec.name
    for warning in made.get("warnings", ()):
        out.warn(f"warning: {safe(warning)}")
    steps = made.get("steps", ())
    if is_first(made):
        steps = [step for step in steps if step["step"] != "retire"]
    if not made.get("can_place", True):
        out.complain(str(made.get("reason", "")), str(made.get("hint", "")))
    elif not made.get("changes"):
        out.say(f"{name}: nothing to do, it runs unchanged on {safe(made.get('node', ''))}")
    else:
        out.say(f"{name} on {safe(made.get('node', ''))}", "bold")
        out.table(("STEP", "NODE", "WHAT"), [(s["step"], s["node"], s.get("detail", "")) for s in steps], indent="  ")
        if not is_first(made):
            out.say(
                f"  downtime: {safe(made.get('downtime') or 'none: the old copy serves until the new one is healthy')}"
            )
        if any(component.routes for component in definition.spec.components):
            out.say(f"  {ROUTES_NOTE}")
    if made.get("differences"):
        out.say("\nWhat is different", "bold")
        for line in made["differences"]:
            out.say(f"  {safe_lines(line)}")
    if made.get("placement") and made.get("can_place", True):
        out.say("\nPlacement", "bold")
        rows = [_placement(row, str(made.get("node", ""))) for row in made["placement"]]
        out.table(("NODE", "FITS", "CONTAINERS", "WHY"), rows, indent="  ")
    if made.get("changes"):
        nodes = {step["node"] for step in steps}
        again = f"mcp deploy {shlex.quote(definition.argument)}{f' --node {shlex.quote(node)}' if node else ''}"
        out.say(
            f"\n{len(steps)} steps on {len(nodes)} node{'s' if len(nodes) != 1 else ''}; nothing has been changed. To do it:"
        )
        out.say(f"  {again} --world {safe(made.get('world', ''))}", "cyan")


def is_first(made: Plain) -> bool:
    """Say whether a plan is for a service of which nothing runs: its first generation, beside nothing."""
    runs = next((str(step.get("detail", "")) for step in made.get("steps", ()) if step["step"] == "run"), "")
    return runs.startswith("generation 1:") and not made.get("differences")


def _placement(row: Plain, chosen: str) -> tuple[object, ...]:
    why = "; ".join(row.get("reasons", ())) or ("chosen" if row["node"] == chosen else "")
    return row["node"], "yes" if row["fits"] else "no", f"{row.get('score', 0):g}", why


# ------------------------------------------------------------------------- deploy


@command(
    "deploy",
    examples=(
        "mcp deploy ./web.toml",
        "mcp deploy web api --json",
        "mcp deploy web --node orion",
        "mcp deploy web --detach",
    ),
)
@click.argument("services", nargs=-1, metavar="SERVICE|FILE...", shell_complete=complete_services)
@click.option(
    "--node",
    default="",
    metavar="NODE",
    help="Put it on this node, whatever the definition says.",
    shell_complete=complete_nodes,
)
@click.option("--detach", is_flag=True, help="Do not wait for the end; print the operation.")
@click.option(
    "--world", default="", metavar="WORLD", help="Only if nothing has changed since the plan that printed this."
)
@click.pass_context
def deploy(ctx: click.Context, services: tuple[str, ...], node: str, detach: bool, world: str) -> int:
    """Put services on the right nodes, healthy, or leave all as it was.

    A SERVICE is the name of a definition in ~/.config/mcp/services, or a file. Several are deployed one after the other. The
    new copy runs beside the old one until it is healthy; if it does not get there, the old one serves on.
    """
    if world and len(services) > 1:
        raise click.UsageError("--world is of a plan for one service", ctx)

    async def work(session: Session, definitions: list[Definition]) -> int:
        jobs = [
            _Job("deploy", each.spec.name, _order(each, node, world), each.file, is_sealed=each.has_secrets)
            for each in definitions
        ]
        return await _carry_out(session, jobs, is_detached=detach)

    return _with_definitions(ctx, services, work)


def _order(definition: Definition, node: str, world: str) -> Plain:
    return {"spec": _plain_spec(definition), "node": node, "world": world}


class _Job:
    def __init__(self, kind: str, service: str, body: Plain, source: str = "", *, is_sealed: bool = False) -> None:
        self.kind = kind
        self.service = service
        self.body = body
        self.source = source
        self.is_sealed = is_sealed


async def _carry_out(session: Session, jobs: list[_Job], *, is_detached: bool) -> int:
    """Carry one operation out after the other; the first that did not end well gives the exit code."""
    from mcp.cli import operation

    results: list[Plain] = []
    code = exits.DONE
    error: Plain | None = None
    for job in jobs:
        try:
            ended = await _one(session, job, is_detached=is_detached)
            each = operation.exit_code(ended)
        except McpError as trouble:
            if not results:
                raise
            ended = {"op": "", "service": job.service, "kind": job.kind, "node": "", "outcome": "refused", "steps": []}
            ended |= {"reason": trouble.reason, "code": trouble.code, "hint": trouble.hint}
            each = exits.code_of(trouble)
        results.append(ended)
        if not session.settings.is_json:
            operation.tell(session.out, ended)
        code = code or each
        if each and error is None:
            error = {
                "code": ended.get("code") or ended["outcome"],
                "reason": ended["reason"],
                "hint": ended.get("hint", ""),
            }
        if each in (exits.UNREACHABLE, exits.UNKNOWN):
            break
    if session.settings.is_json:
        session.out.result({"results": results} | ({"error": error} if error else {}))
    _say_not_attempted(session, jobs[len(results) :])
    return code


def _say_not_attempted(session: Session, left: list[_Job]) -> None:
    if left:
        session.out.warn(f"not attempted: {', '.join(job.service for job in left)}")


async def _one(session: Session, job: _Job, *, is_detached: bool) -> Plain:
    from mcp.cli.operation import DOING, Operation
    from mcp.cli.output import safe

    source = f" ({safe(job.source)})" if job.source else ""
    title = f"{DOING[job.kind]} {job.service}{source}"
    running = Operation(session, job.kind, job.service)
    return await running.carry_out(job.body, title=title, is_detached=is_detached, is_sealed=job.is_sealed)


def _with_definitions(
    ctx: click.Context,
    services: tuple[str, ...],
    work: Callable[[Session, list[Definition]], Coroutine[Any, Any, int]],
) -> int:
    """Read the definitions before anything is sent, then connect."""
    from mcp.cli import session
    from mcp.cli.definitions import read_definitions, services_folder

    settings = settings_of(ctx)
    folder = services_folder("")
    if not services:
        read_definitions(services, folder)
    config = session.configured(settings)
    definitions = read_definitions(services, services_folder(config.services))
    return session.run(settings, lambda connected: work(connected, definitions))


# ------------------------------------------------- what takes a deployed service


def _service_command(kind: str, words: str, more: str) -> Any:
    @command(kind, examples=(f"mcp {kind} web", f"mcp {kind} web api --json"))
    @click.argument("services", nargs=-1, required=True, metavar="SERVICE...", shell_complete=complete_services)
    @click.option("--detach", is_flag=True, help="Do not wait for the end; print the operation.")
    @click.pass_context
    def made(ctx: click.Context, services: tuple[str, ...], detach: bool) -> int:
        from mcp.cli import session

        for name in services:
            check_service_name(name)
        jobs = [_Job(kind, name, {"service": name}) for name in dict.fromkeys(services)]
        return session.run(settings_of(ctx), lambda connected: _carry_out(connected, jobs, is_detached=detach))

    made.help = f"{words}\n\n{more}"
    return made


def check_service_name(name: str) -> None:
    """Refuse what no service can be called, before anything is sent.

    Raises:
        Usage: it is no name.
    """
    from mcp.model.names import is_service_name

    if not is_service_name(name):
        raise exits.Usage(
            f"{name[:60]!r} is no service name: lower-case letters, digits and dashes, at most 40",
            hint="`mcp status` lists the services.",
        )


undeploy = _service_command(
    "undeploy", "Remove a service and everything of it.", "Its data in mounted folders of the host stays."
)
start = _service_command("start", "Start a stopped service.", "Waits until its containers are healthy.")
stop = _service_command("stop", "Stop a service; it stays deployed.", "`mcp start` brings it back.")
restart = _service_command(
    "restart", "Restart a service's containers, one component after the other.", "Waits for health after each."
)
