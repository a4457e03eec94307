"""mcp-bus.toml."""

from __future__ import annotations

from pathlib import Path

from mcp.config.reading import HOME, absolute, address, flattened, read_document, section
from mcp.model.tables import Key, Schema, port, string
from mcp.model.values import frozen


@frozen(kw_only=True)
class BusConfig:
    """mcp-bus.toml: where nats-server listens, and where its files lie."""

    address: str = "127.0.0.1"
    port: int = 4222
    state: str = f"{HOME}/bus"
    keys: str = f"{HOME}/keys"
    binary: str = ""


BUS_FILE = Schema(
    "",
    (
        section(
            Key("address", address),
            Key("port", port),
            Key("state", absolute),
            Key("keys", absolute),
            Key("binary", string),
            name="bus",
        ),
    ),
)


def load_bus(path: str | Path) -> BusConfig:
    """Return mcp-bus.toml.

    Raises:
        BadDefinition: see read_document, and for every mistake in it.
    """
    return BusConfig(**flattened(read_document(path).read(BUS_FILE)))
