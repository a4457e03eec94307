"""Tab completion: the scripts for the shells, and live names that never make a terminal wait."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mcp.cli.app import command, mcp, settings_of

if TYPE_CHECKING:
    from mcp.cli.settings import Settings

FRESH_S = 10.0
"""Names younger than this are not asked for again: one press of Tab follows another."""

LIMIT_S = 0.5
"""All the time that completion may take; then what was known last is offered."""

SHELLS = ("bash", "zsh", "fish")


@command(
    "completion",
    examples=(
        'eval "$(mcp completion bash)"          # in ~/.bashrc',
        'eval "$(mcp completion zsh)"           # in ~/.zshrc',
        "mcp completion fish > ~/.config/fish/completions/mcp.fish",
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> int:
    """Print the script that makes Tab complete commands and live names.

    Names of services, nodes and operations come from the fleet; when it does not answer within half a second, the last known
    ones are offered.
    """
    import sys

    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    if made is None:  # click knows all of SHELLS
        raise click.UsageError(f"no completion for {shell}")
    script = made(mcp, {}, "mcp", "_MCP_COMPLETE")
    sys.stdout.write(script.source_template % script.source_vars() + "\n")
    return 0


def complete_services(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Offer services: those that are deployed and those that are defined here; then files."""
    from click.shell_completion import CompletionItem

    names = {*_names(settings_of(ctx)).get("services", ()), *_defined()}
    found: list[Any] = [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def complete_nodes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Offer nodes."""
    from click.shell_completion import CompletionItem

    names = _names(settings_of(ctx)).get("nodes", ())
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def complete_operations(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Offer operations that run."""
    from click.shell_completion import CompletionItem

    ops = _names(settings_of(ctx)).get("operations", ())
    return [CompletionItem(op) for op in ops if op.startswith(incomplete)]


def _defined() -> list[str]:
    from mcp.cli.settings import config_folder

    try:
        return [path.stem for path in (config_folder() / "services").glob("*.toml")]
    except OSError:
        return []


def _names(settings: Settings) -> dict[str, list[str]]:
    """Return live names, or the last known ones; nothing at all is better than a wait or an error."""
    kept = _cache_file(settings)
    known, age_s = _kept(kept)
    if age_s < FRESH_S:
        return known
    try:
        known = _asked(settings)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(known), encoding="utf-8")
    except Exception:  # noqa: BLE001, S110
        pass  # whatever it is: an error in the middle of what somebody types helps nobody
    return known


def _cache_file(settings: Settings) -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if base.startswith("/") else Path("~").expanduser() / ".cache"
    import hashlib

    which = hashlib.sha256(str(settings.config_file.absolute()).encode(errors="replace")).hexdigest()[:8]
    return folder / "mcp" / f"names-{which}.json"


def _kept(path: Path) -> tuple[dict[str, list[str]], float]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        age_s = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return {}, float("inf")
    return (known, age_s) if isinstance(known, dict) else ({}, float("inf"))


def _asked(settings: Settings) -> dict[str, list[str]]:
    import asyncio

    from mcp.cli import session

    connected = session.Session(settings, session.configured(settings), _silent(settings))

    async def ask() -> dict[str, list[str]]:
        async with asyncio.timeout(LIMIT_S):
            await connected.open()
            try:
                status = await connected.status()
            finally:
                await connected.close()
        return {
            "services": [row["name"] for row in status["services"]],
            "nodes": [row["name"] for row in status["nodes"]],
            "operations": [row["op"] for row in status["operations"]],
        }

    return asyncio.run(ask())


def _silent(settings: Settings) -> Any:
    from mcp.cli.output import Output

    return Output(settings)
