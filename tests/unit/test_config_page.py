"""docs/configuration.md and the schemas of the configuration files say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mcp.config.agent import AGENT_FILE, AgentConfig
from mcp.config.bus import BUS_FILE, BusConfig
from mcp.config.cli import CLI_FILE, CliConfig
from mcp.config.master import MASTER_FILE, MasterConfig
from mcp.model.tables import Key

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
FILES = {
    "mcp-bus.toml": (BUS_FILE, BusConfig()),
    "mcp-master.toml": (MASTER_FILE, MasterConfig(node="")),
    "mcp-agent.toml": (AGENT_FILE, AgentConfig(name="")),
    "mcp.toml": (CLI_FILE, CliConfig(operator="", seed="")),
}
TABLES = [(file, table.name) for file, (schema, _) in FILES.items() for table in schema.keys]


def rows_of_the_page() -> dict[tuple[str, str], dict[str, list[str]]]:
    """Return the cells of each key, by file and table."""
    found = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        file = part.splitlines()[0]
        for table in part.split("\n### ")[1:]:
            name = re.match(r"`\[([a-z0-9]+)", table)
            assert name
            rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "| `" in line]
            found[file, name[1]] = {row[0].strip("`"): row for row in rows}
    return found


def keys_of(file: str, table: str) -> tuple[Key, ...]:
    (key,) = (each for each in FILES[file][0].keys if each.name == table)
    assert key.inner
    return key.inner.keys


def default(file: str, table: str, key: Key) -> str:
    """Return what the class of the file says when the key is left out, as the page writes it."""
    if key.required:
        return "needed"
    config: Any = FILES[file][1]
    holder = getattr(config, table) if table in ("proxy", "acme", "rfc2136") else config
    if table == "bus" and hasattr(holder, "bus") and hasattr(holder.bus, key.name):
        holder = holder.bus
    value = getattr(holder, key.to or key.name, "")
    match value:
        case "" | ():
            return ""
        case tuple():
            return _strings(value)
        case bool():
            return f"`{str(value).lower()}`"
        case str():
            return f'`"{value}"`'
    return f"`{value:g}`"


def _strings(values: tuple[str, ...]) -> str:
    inside = ", ".join(f'"{each}"' for each in values)
    return f"`[{inside}]`"


def test_the_page_has_every_table_and_no_other() -> None:
    assert list(rows_of_the_page()) == TABLES


@pytest.mark.parametrize(("file", "table"), TABLES)
def test_the_page_explains_every_key_with_its_default_and_no_other(file: str, table: str) -> None:
    rows = rows_of_the_page()[file, table]
    assert {name: row[2] for name, row in rows.items()} == {
        key.name: default(file, table, key) for key in keys_of(file, table)
    }
    assert all(len(row) == 4 and row[1] and row[3] for row in rows.values())
