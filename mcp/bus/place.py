"""Where the bus listens and where its files lie: one list of names for everything that reads or writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from mcp.bus.server_config import Listen
from mcp.bus.subjects import ConnectionRole
from mcp.model.values import frozen


class BusSettings(Protocol):
    """What mcp-bus.toml says."""

    @property
    def address(self) -> str:
        """The address to listen on, and the one that join tokens carry."""

    @property
    def port(self) -> int:
        """The port to listen on."""

    @property
    def state(self) -> str | os.PathLike[str]:
        """The folder of the enrolment and the generated configuration."""

    @property
    def binary(self) -> str:
        """The nats-server to run; empty: look for one."""

    @property
    def keys(self) -> str | os.PathLike[str]:
        """The folder of the private keys."""


@frozen
class ServerPlace:
    """One bus on this machine; all paths are absolute."""

    address: str
    port: int
    state: Path
    keys: Path
    binary: str = ""

    @classmethod
    def of(cls, settings: BusSettings) -> ServerPlace:
        """Read it out of the settings."""
        return cls(
            settings.address,
            settings.port,
            Path(settings.state).absolute(),
            Path(settings.keys).absolute(),
            settings.binary,
        )

    @property
    def config_file(self) -> Path:
        """The generated configuration that nats-server reads."""
        return self.state / "nats-server.conf"

    @property
    def binary_link(self) -> Path:
        """A link to the nats-server that this bus runs: changes are checked by the very same one."""
        return self.state / "nats-server"

    @property
    def enrolment(self) -> Path:
        """The folder with one small file for everything that may connect."""
        return self.state / "enrolment"

    @property
    def lock_file(self) -> Path:
        """Held while the enrolment changes: the master and a command may both want to."""
        return self.state / "enrolment.lock"

    @property
    def log_file(self) -> Path:
        """What a child server says (demo and tests; the service writes to the journal)."""
        return self.state / "nats-server.log"

    @property
    def ca_file(self) -> Path:
        """The authority's certificate: what every client knows."""
        return self.keys / "bus-ca.pem"

    @property
    def ca_key_file(self) -> Path:
        """The authority's private key."""
        return self.keys / "bus-ca.key"

    @property
    def cert_file(self) -> Path:
        """The server's certificate and its private key in one file: they are replaced together or not at all."""
        return self.keys / "bus.pem"

    def key_file(self, role: ConnectionRole) -> Path:
        """The nkey with which a part of the master, or the agent of its node, connects."""
        return self.keys / f"{role}.nkey"

    @property
    def listen(self) -> Listen:
        """What of this stands in the server's configuration."""
        return Listen(address=self.address, port=self.port, cert_file=str(self.cert_file))
