"""A real nats-server with the project's own configuration, for tests: users by role and name, and all that can happen to it."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from mcp.bus import tls
from mcp.bus.keys import KeyPair, new_key
from mcp.bus.nats_bus import BusAddress, Credential, NatsTransport, connect
from mcp.bus.server import find_binary
from mcp.bus.server_config import ACCOUNT, SYSTEM_ACCOUNT, Listen, User, render
from mcp.bus.subjects import ConnectionRole, Grant, grant
from tests.helpers import eventually, free_port

Who = tuple[ConnectionRole, str]

EVERYBODY: tuple[Who, ...] = (
    ("master", ""),
    ("answers", ""),
    ("system", ""),
    ("debug", "watcher"),
    ("agent", "orion"),
    ("agent", "rift"),
    ("agent", "svc"),
    ("operator", "kyle"),
    ("operator", "alice"),
    ("join", "inv1"),
)


class RealBus:
    """One nats-server on a port of its own; its users are those of EVERYBODY and whoever is added."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.log_file = folder / "nats-server.log"
        self._config = folder / "nats-server.conf"
        self._cert_file = folder / "bus.pem"
        self._authority = tls.new_authority("test", time.time())
        self.certificate = tls.new_server_certificate(self._authority, time.time())
        self._cert_file.write_text(self.certificate.text())
        self._keys: dict[Who, KeyPair] = {}
        self._grants: dict[Who, Grant] = {}
        self._process: subprocess.Popen[bytes] | None = None
        for role, name in EVERYBODY:
            self.add(role, name)

    # ------------------------------------------------------------------ who may

    def add(self, role: ConnectionRole, name: str, allowed: Grant | None = None) -> KeyPair:
        """Let somebody in from the next start or reload on."""
        self._grants[role, name] = allowed or grant(role, name)
        return self._keys.setdefault((role, name), new_key())

    def remove(self, role: ConnectionRole, name: str) -> None:
        """Let somebody in no more, from the next start or reload on; the key stays what it was."""
        del self._grants[role, name]

    def key(self, role: ConnectionRole, name: str = "") -> KeyPair:
        """Return somebody's key."""
        return self._keys[role, name]

    @property
    def ca_pem(self) -> str:
        """The authority that signed the server's certificate."""
        return self._authority.pem

    def _write(self) -> None:
        users = [
            User(
                label=f"{role} {name}".strip(),
                public_key=self._keys[role, name].public_key,
                grant=allowed,
                account=SYSTEM_ACCOUNT if role == "system" else ACCOUNT,
            )
            for (role, name), allowed in self._grants.items()
        ]
        self._config.write_text(
            render(Listen(address="127.0.0.1", port=self.port, cert_file=str(self._cert_file)), users)
        )

    # --------------------------------------------------------------- the process

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and return when it takes connections; running already is fine."""
        if self._process is not None:
            return
        self._write()
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [find_binary(), "-c", self._config], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        ready = self._said("Server is ready")
        eventually("nats-server is ready", lambda: self._said("Server is ready") > ready or self._process is None)

    def _said(self, text: str) -> int:
        return self.log_file.read_text().count(text)

    def kill(self) -> None:
        """End it as kill -9 does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def freeze(self) -> None:
        """Stop it in its tracks: connections stay open and nobody answers."""
        self._signal(signal.SIGSTOP)
        eventually("every thread is stopped", lambda: self._states() == "T")

    def _states(self) -> str:
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return "".join(sorted({(task / "stat").read_text().rpartition(") ")[2][0] for task in tasks}))

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def reload(self) -> None:
        """Have it read who may connect, and cut those who may not any more."""
        self._write()
        before = self._said("Reloaded server configuration")
        self._signal(signal.SIGHUP)
        eventually("the configuration is reloaded", lambda: self._said("Reloaded server configuration") > before)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    # --------------------------------------------------------------- connections

    def address(self, port: int = 0) -> BusAddress:
        """Return where it is; `port` may be that of a proxy in front of it."""
        return BusAddress(host="127.0.0.1", port=port or self.port, ca_pem=self.ca_pem)

    def credential(self, role: ConnectionRole, name: str = "") -> Credential:
        """Return what somebody connects with."""
        return Credential(role=role, name=name, seed=self._keys[role, name].seed)

    async def connect(
        self, role: ConnectionRole, name: str = "", *, port: int = 0, forever: bool = True
    ) -> NatsTransport:
        """Connect as somebody."""
        return await connect(
            self.address(port), self.credential(role, name), forever=forever, name=f"test {role} {name}"
        )
