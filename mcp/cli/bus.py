"""The bus itself."""

from __future__ import annotations

import click

from mcp.cli.app import Group, command
from mcp.cli.settings import home_folder


@click.group("bus", cls=Group)
def bus() -> None:
    """The bus itself: run."""


@command("run", group=bus, examples=("mcp bus run", "mcp bus run --config /srv/mcp/mcp-bus.toml"))
@click.option("--config", default="", metavar="FILE", help="The bus's configuration.  [/srv/mcp/mcp-bus.toml]")
def run(config: str) -> int:
    """Become the bus: write nats-server's configuration and run it in this process's place."""
    import time

    from mcp.bus.server import run_bus
    from mcp.config.bus import load_bus

    settings = load_bus(config or home_folder() / "mcp-bus.toml")
    run_bus(settings, time.time())
