"""A whole fleet on this machine, shown and taken away again."""

from __future__ import annotations

import click

from mcp.cli import exits, interrupt
from mcp.cli.app import command, settings_of


@command(
    "demo",
    examples=("mcp demo", "mcp demo --keep", "mcp demo --stop", "DOCKER_HOST=unix:///run/podman/podman.sock mcp demo"),
)
@click.option("--keep", is_flag=True, help="Leave the fleet running, and say how to go on and how to end it.")
@click.option("--stop", is_flag=True, help="End a fleet that --keep has left running, and remove everything of it.")
@click.pass_context
def demo(ctx: click.Context, keep: bool, stop: bool) -> int:
    """A whole fleet on this machine in about half a minute, and gone again.

    Bus, master and four agents run as processes of their own on 127.0.1.x, and a web service in this machine's container
    engine. Everything is removed at the end, also after Ctrl-C.
    """
    from mcp.cli.output import Output
    from mcp.demo.show import Show, stop_kept

    if stop:
        stop_kept(Output(settings_of(ctx)))
        return exits.DONE
    interrupt.raise_again()
    show = Show(settings_of(ctx), keep=keep)
    try:
        show.run()
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    return exits.DONE
