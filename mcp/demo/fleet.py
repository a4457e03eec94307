"""A whole fleet on this machine: bus, master and agents as processes of their own on 127.0.1.x, set up as an operator would.

Everything lies in one folder and is made with the commands that an operator types: init, operator add, login, node invite,
mcp-agent join. The demo shows it; the live tests stop, kill and freeze its parts.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mcp
from mcp.demo.processes import Child, wait_until
from mcp.model.errors import AdapterError
from mcp.model.values import frozen

COMMAND_TIMEOUT_S = 120.0
READY_TIMEOUT_S = 30.0

Tables = Mapping[str, Mapping[str, Any]]
Tell = Callable[[str], None]


@frozen
class DemoNode:
    """A node of the demo."""

    name: str
    role: str
    address: str


NODES = (
    DemoNode("rift", "master", "127.0.1.1"),
    DemoNode("orion", "worker", "127.0.1.2"),
    DemoNode("hyperborea", "worker", "127.0.1.3"),
    DemoNode("svc", "edge", "127.0.1.4"),
)


def default_engine_url() -> str:
    """Return the machine's container engine: $DOCKER_HOST, or its usual socket."""
    return os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"


def _nothing(_: str) -> None:
    """Nobody watches."""


class DemoFleet:
    """Set up by `start`, taken away by `close`; also a context manager.

    `engine_url` "" makes a fleet without container engines. `master` and `agents` are further tables of the configuration
    files, e.g. {"health": {"heartbeat_s": 1.0}}; `per_node` the same for single agents. Its processes end with us, unless
    `is_tied` is False.
    """

    def __init__(
        self,
        folder: Path,
        *,
        engine_url: str = "",
        nodes: Sequence[DemoNode] = NODES,
        network: str = "mcpdemo",
        master: Tables | None = None,
        agents: Tables | None = None,
        per_node: Mapping[str, Tables] | None = None,
        is_tied: bool = True,
        tell: Tell = _nothing,
    ) -> None:
        self.folder = folder.absolute()
        self.engine_url = engine_url
        self.nodes = tuple(nodes)
        self.network = network
        self.config = self.folder / "config" / "mcp" / "mcp.toml"
        """The operator's way in; `env` makes it the default of every command."""
        self.port = 0
        self.children: dict[str, Child] = {}
        """By name: "bus", "master", and "agent NODE"."""
        self._tell = tell
        self._is_tied = is_tied
        self._master_tables = master or {}
        self._agent_tables = agents or {}
        self._per_node = per_node or {}
        self._had_network = True
        self._has_used_engine = False

    # ---------------------------------------------------------------- the whole

    def start(self) -> None:
        """Set the fleet up and return when every node is healthy.

        Raises:
            AdapterError: a part did not start; with its last words.
        """
        if self.engine_url:
            asyncio.run(self._look_at_engine())
        self.init()
        self.start_bus()
        self.start_master()
        self.log_in()
        self.start_agent(self.nodes[0].name)
        for node in self.nodes[1:]:
            self.join(node)
            self.start_agent(node.name)
        self.wait_until_healthy()

    def close(self) -> None:
        """Stop every process, and remove the containers, the network and the folder that this fleet made."""
        for name in reversed(list(self.children)):
            if name.startswith("agent"):
                self.children[name].stop()
        for child in self.children.values():
            child.stop()
        try:
            if self._has_used_engine:
                self.remove_containers()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------- its setting up

    def home(self, node: str) -> Path:
        """Return where everything of a node lies (what /srv/mcp is on a machine of its own)."""
        return self.folder / node

    def init(self) -> None:
        """Make the first node."""
        first = self.nodes[0]
        self.port = _free_port(first.address)
        self.folder.mkdir(parents=True, exist_ok=True)
        words = ["mcp", "init", "--name", first.name, "--address", first.address, "--port", str(self.port)]
        words += ["--home", str(self.home(first.name)), "--no-systemd"]
        if self.engine_url:
            words += ["--docker-url", self.engine_url]
        self.run(words)
        _change_config(self.home(first.name) / "mcp-master.toml", self._master_tables)
        self._configure_agent(first)

    def log_in(self, name: str = "kyle", role: str = "admin", config: Path | None = None) -> Path:
        """Enrol an operator and return the configuration with which it gives commands."""
        file = self.folder / f"{name}.mcp"
        home = str(self.home(self.nodes[0].name))
        added = self.run(["mcp", "operator", "add", name, "--role", role, "--home", home])
        file.touch(mode=0o600)
        file.write_text(added.stdout, encoding="utf-8")
        self.run(["mcp", *(["--config", str(config)] if config else []), "login", str(file)])
        return config or self.config

    def join(self, node: DemoNode) -> None:
        """Invite a node and let it join, with the line that the invitation prints."""
        invited = self.run(["mcp", "node", "invite", node.name, "--role", node.role])
        line = shlex.split(invited.stdout)
        line += ["--home", str(self.home(node.name)), "--address", node.address, "--no-systemd"]
        if self.engine_url and node.role != "edge":
            line += ["--docker-url", self.engine_url]
        self.run(line, shown=invited.stdout.strip())
        self._configure_agent(node)

    def _configure_agent(self, node: DemoNode) -> None:
        docker: dict[str, Any] = {"network": self.network, "publish_address": node.address, "is_shared": True}
        has_engine = self.engine_url and node.role != "edge"
        file = self.home(node.name) / "mcp-agent.toml"
        _change_config(file, {"adapters": {"containers": "docker" if has_engine else "none"}})
        if has_engine:
            _change_config(file, {"docker": docker})
        _change_config(file, self._agent_tables)
        _change_config(file, self._per_node.get(node.name, {}))

    # ------------------------------------------------------------------ its parts

    def start_bus(self) -> None:
        """Start the bus and return when it takes connections."""
        first = self.nodes[0]
        child = self._child("bus", ["mcp", "bus", "run", "--config", str(self.home(first.name) / "mcp-bus.toml")])
        child.start()
        wait_until(
            "the bus listens", lambda: _listens(first.address, self.port), timeout_s=READY_TIMEOUT_S, child=child
        )

    def start_master(self) -> None:
        """Start the master and return when it says so."""
        home = self.home(self.nodes[0].name)
        child = self._child("master", ["mcp-master", "--config", str(home / "mcp-master.toml")])
        before = child.log().count("master started")
        child.start()
        wait_until(
            "the master starts",
            lambda: child.log().count("master started") > before,
            timeout_s=READY_TIMEOUT_S,
            child=child,
        )

    def start_agent(self, node: str) -> None:
        """Start a node's agent; `wait_until_healthy` tells when the master has it."""
        self._child(f"agent {node}", ["mcp-agent", "--config", str(self.home(node) / "mcp-agent.toml")]).start()

    def agent(self, node: str) -> Child:
        """Return a node's agent."""
        return self.children[f"agent {node}"]

    @property
    def bus(self) -> Child:
        """The bus."""
        return self.children["bus"]

    @property
    def master(self) -> Child:
        """The master."""
        return self.children["master"]

    def _child(self, name: str, words: Sequence[str]) -> Child:
        if name not in self.children:
            logs = self.folder / "logs"
            logs.mkdir(exist_ok=True)
            log_file = logs / f"{name.replace(' ', '-')}.log"
            self.children[name] = Child(name, resolved(words), log_file, self.env(), is_tied=self._is_tied)
        return self.children[name]

    # --------------------------------------------------------------- its commands

    def env(self) -> dict[str, str]:
        """Return the environment of every program of this fleet."""
        env = {**os.environ, "PYTHONPATH": _source_path(os.environ.get("PYTHONPATH", ""))}
        env |= {"XDG_CONFIG_HOME": str(self.folder / "config"), "XDG_CACHE_HOME": str(self.folder / "cache")}
        env.pop("MCP_HOME", None)
        return env

    def mcp(self, *args: str, timeout_s: float = COMMAND_TIMEOUT_S, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run `mcp ARGS` as this fleet's operator and return how it ended, whatever the exit code."""
        words = resolved(["mcp", *args])
        return subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.env(),
            check=False,
            stdin=subprocess.DEVNULL,
            **more,
        )

    def json(self, *args: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Any:
        """Run `mcp ARGS --json` and return what it printed, whatever the exit code."""
        done = self.mcp(*args, "--json", timeout_s=timeout_s)
        try:
            return json.loads(done.stdout)
        except ValueError as error:
            raise AdapterError(
                f"mcp {shlex.join(args)} printed no JSON: {done.stdout[-500:]}{done.stderr[-500:]}"
            ) from error

    def run(self, words: Sequence[str], *, shown: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command that must succeed, as it would be typed.

        Raises:
            AdapterError: it did not, with what it said.
        """
        self._tell(shown or shlex.join(words))
        done = subprocess.run(
            resolved(words),
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env=self.env(),
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise AdapterError(
                f"{shlex.join(words)[:200]} ended with {done.returncode}:\n{said}", code="command_failed"
            )
        return done

    def wait_until_healthy(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return when the master has every node healthy.

        Raises:
            AdapterError: it has not in time, with what it says of the others.
        """
        seen: dict[str, str] = {}

        def is_so() -> bool:
            if ended := [c for c in self.children.values() if c.exit_code is not None]:
                said = "\n".join(f"{c.name} ended with {c.exit_code}: {c.last_words()}" for c in ended)
                raise AdapterError(f"not every part of the fleet runs:\n{said}", code="child_ended")
            done = self.mcp("node", "list", "--json", timeout_s=timeout_s)
            if done.returncode == 0:
                seen.update({row["name"]: row["health"] for row in json.loads(done.stdout)["nodes"]})
            return len(seen) >= len(self.nodes) and set(seen.values()) == {"healthy"}

        try:
            wait_until("every node is healthy", is_so, timeout_s=timeout_s)
        except AdapterError as error:
            raise AdapterError(f"{error.reason} (seen: {seen})", code=error.code) from error

    # ----------------------------------------------------------------- its engine

    def remove_containers(self) -> None:
        """Remove this fleet's containers, and its network unless it was there before."""
        from mcp.demo import engine

        asyncio.run(engine.clean(self.engine_url, self.network, remove_network=not self._had_network))

    async def _look_at_engine(self) -> None:
        """Clear away what a demo that was killed has left, and touch nothing else."""
        from mcp.demo import engine

        await engine.check(self.engine_url)
        await engine.refuse_foreign_containers(self.engine_url, [node.name for node in self.nodes], self.network)
        left = await self._left_behind()
        self._has_used_engine = True
        await engine.clean(self.engine_url, self.network, remove_network=left)
        self._had_network = await self._is_there()

    async def _left_behind(self) -> bool:
        from mcp.demo.engine import DemoEngine

        seen = DemoEngine(self.engine_url)
        try:
            return bool(await seen.on_network(self.network))
        finally:
            await seen.close()

    async def _is_there(self) -> bool:
        from mcp.demo.engine import DemoEngine

        seen = DemoEngine(self.engine_url)
        try:
            return await seen.has_network(self.network)
        finally:
            await seen.close()


def resolved(words: Sequence[str]) -> list[str]:
    """Replace the name of one of our programs by what runs it here."""
    from mcp.cli.programs import MODULES, program

    return [*program(words[0]), *words[1:]] if words[0] in MODULES else list(words)


def _source_path(given: str) -> str:
    """Return a PYTHONPATH under which our modules are found from anywhere."""
    ours = str(Path(mcp.__file__).resolve().parent.parent)
    return f"{ours}{os.pathsep}{given}" if given else ours


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1.0):
            return True
    except OSError:
        return False


def _change_config(file: Path, tables: Tables) -> None:
    """Set keys in a configuration file, as an editor would."""
    text = file.read_text(encoding="utf-8")
    for table, keys in tables.items():
        if f"[{table}]" not in text:
            text += f"[{table}]\n"
        for key, value in keys.items():
            text = _with_key(text, table, key, json.dumps(value))
    file.write_text(text, encoding="utf-8")


def _with_key(text: str, table: str, key: str, value: str) -> str:
    head, _, rest = text.partition(f"[{table}]\n")
    body, bracket, after = rest.partition("\n[")
    lines = [line for line in body.splitlines() if not re.match(rf"{re.escape(key)}\s*=", line)]
    return f"{head}[{table}]\n" + "\n".join([*lines, f"{key} = {value}"]) + ("\n[" + after if bracket else "\n")


__all__ = ["NODES", "DemoFleet", "DemoNode", "default_engine_url", "resolved"]
