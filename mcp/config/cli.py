"""~/.config/mcp/mcp.toml: an operator's way in."""

from __future__ import annotations

from pathlib import Path

import attrs

from mcp.bus.files import read_private
from mcp.config.reading import ACCESS, BusAccess, absolute, flattened, node_name, read_document, section, with_access
from mcp.model.tables import Key, Schema, number, string
from mcp.model.values import frozen


@frozen(kw_only=True)
class CliConfig:
    """~/.config/mcp/mcp.toml, and what `mcp operator add` prints."""

    operator: str
    seed: str = attrs.field(repr=False)
    bus: BusAccess = attrs.field(factory=BusAccess)
    services: str = ""
    timeout_s: float = 0.0


CLI_FILE = Schema(
    "",
    (
        section(*ACCESS, name="bus"),
        section(
            Key("name", node_name, to="operator", required='name = "kyle"'),
            Key("seed", string),
            Key("key_file", absolute, to="operator_key_file"),
            name="operator",
            required='[operator] with name = "kyle" and a seed; or `mcp login FILE`',
        ),
        section(Key("folder", string, to="services"), name="services"),
        section(Key("timeout_s", number(0, 1e7, "s")), name="defaults"),
    ),
)


def load_cli(path: str | Path) -> CliConfig:
    """Return an operator's file.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
        AdapterError: the key's file cannot be read, or others can read it.
    """
    document = read_document(path)
    flat = flattened(with_access(document.read(CLI_FILE), BusAccess()))
    key_file = flat.pop("operator_key_file", "")
    if bool(key_file) == bool(flat.get("seed")):
        both = "seed and key_file: only one of them" if key_file else "'seed' is missing"
        raise document.error(
            both, ("operator", "seed"), hint="`mcp login FILE` writes it, from `mcp operator add NAME`."
        )
    return CliConfig(**(flat if not key_file else {**flat, "seed": read_private(Path(key_file)).strip()}))
