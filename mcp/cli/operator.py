"""Who may give commands; on the master's machine, where the enrolment lies."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mcp.cli import exits
from mcp.cli.app import Group, command, settings_of
from mcp.cli.settings import home_folder

if TYPE_CHECKING:
    from mcp.bus.enrolment import FileEnrolment
    from mcp.cli.output import Output

ROLES = ("admin", "deployer", "viewer", "debug")


@click.group("operator", cls=Group)
def operator() -> None:
    """Who may give commands: add, list, remove. On the master's machine."""


def _home_option() -> Callable[[Any], Any]:
    return click.option("--home", default="", metavar="DIR", help="Where the bus's files lie.  [/srv/mcp]")


@command(
    "add",
    group=operator,
    examples=("mcp operator add kyle > kyle.mcp", "mcp operator add watch --role debug > watch.mcp"),
)
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), default="admin", show_default=True, help="What they may do.")
@click.option("--force", is_flag=True, help="Print the secret although the output is a terminal.")
@_home_option()
@click.pass_context
def add(ctx: click.Context, name: str, role: str, force: bool, home: str) -> int:
    """Make a key for an operator and print the one file that lets them in.

    The file holds a private key that is kept nowhere else. Hand it over, and there: `mcp login FILE`. Roles: an admin may do
    everything, a deployer changes services, a viewer looks, debug only watches the bus.
    """
    out = _out(ctx)
    if out.is_terminal and not force and not out.settings.is_json:
        raise exits.Usage(
            "the file that this prints holds a secret, and the output is a terminal",
            hint=f"`mcp operator add {name} > {name}.mcp`, or --force to see it here.",
        )

    async def work(enrolment: FileEnrolment) -> int:
        made = await enrolment.add_operator(name, role)
        try:
            _make_private(sys.stdout)
            if out.settings.is_json:
                out.result({"name": made.name, "role": made.role, "file": made.toml})
            else:
                out.raw(made.toml)
        except (OSError, ValueError):
            await enrolment.remove_operator(name)  # nobody has the key, so nobody shall be enrolled with it
            raise
        _say_if_not_live(out, enrolment)
        out.note(
            f"{name} is enrolled as {role}. Where {name} works: `mcp login FILE` with this file; it holds a private key."
        )
        return exits.DONE

    return _with_enrolment(home, work)


@command("list", group=operator, examples=("mcp operator list",))
@_home_option()
@click.pass_context
def list_(ctx: click.Context, home: str) -> int:
    """Who is enrolled."""
    out = _out(ctx)

    async def work(enrolment: FileEnrolment) -> int:
        rows = await enrolment.operators()
        if out.settings.is_json:
            out.result(
                {"operators": [{"name": row.name, "role": row.role, "public_key": row.public_key} for row in rows]}
            )
        else:
            out.table(("OPERATOR", "ROLE", "PUBLIC KEY"), [(row.name, row.role, row.public_key) for row in rows])
        return exits.DONE

    return _with_enrolment(home, work)


@command("remove", group=operator, examples=("mcp operator remove kyle",))
@click.argument("name")
@_home_option()
@click.pass_context
def remove(ctx: click.Context, name: str, home: str) -> int:
    """Take an operator's key out of the fleet; live connections are cut."""
    out = _out(ctx)

    async def work(enrolment: FileEnrolment) -> int:
        await enrolment.remove_operator(name)
        if out.settings.is_json:
            out.result({"name": name, "outcome": "done"})
        else:
            out.say(f"{name} is removed")
        _say_if_not_live(out, enrolment)
        return exits.DONE

    return _with_enrolment(home, work)


def _out(ctx: click.Context) -> Output:
    from mcp.cli.output import Output

    return Output(settings_of(ctx))


def _say_if_not_live(out: Output, enrolment: FileEnrolment) -> None:
    if not enrolment.is_live:
        out.warn("The bus does not run: this counts from its next start.")


def _make_private(stream: Any) -> None:
    """Where the output is a file, let nobody else read it: a shell makes it readable for all."""
    try:
        handle = stream.fileno()
        if stat.S_ISREG(os.fstat(handle).st_mode):
            os.fchmod(handle, 0o600)
    except (OSError, ValueError, AttributeError):
        return  # not a file of ours; a pipe or a terminal keeps nothing


def _with_enrolment(home: str, work: Callable[[FileEnrolment], Awaitable[int]]) -> int:
    """Open the enrolment of this machine and do the work; the bus is told if it runs."""
    import logging

    logging.getLogger().addHandler(logging.NullHandler())  # what the enrolment logs is for the master's journal
    from mcp.adapters.clock import SystemClock
    from mcp.bus.enrolment import FileEnrolment
    from mcp.bus.place import ServerPlace
    from mcp.bus.system import OnDemand
    from mcp.config.bus import load_bus

    place = ServerPlace.of(load_bus((Path(home) if home else home_folder()).absolute() / "mcp-bus.toml"))
    enrolment = FileEnrolment(place, SystemClock(), OnDemand(lambda: _system_connection(place)))
    return asyncio.run(work(enrolment))  # type: ignore[arg-type]


async def _system_connection(place: Any) -> Any:
    from mcp.bus.files import read_text
    from mcp.bus.keys import read_key
    from mcp.bus.nats_bus import BusAddress, Credential, connect

    address = BusAddress(host=place.address, port=place.port, ca_pem=read_text(place.ca_file))
    credential = Credential(role="system", name="system", seed=read_key(place.key_file("system")).seed)
    return await connect(address, credential, forever=False, name="mcp operator")
