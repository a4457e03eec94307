"""The product on a running rig, set up and used as an operator would (CLI contract), and the tests' way to hurt it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig import faults
from rig.lab import Lab, Ran
from rig.shell import LabError, NotRunning, wait_for
from rig.table import NODES, REGISTRY, REGISTRY_PASSWORD, REGISTRY_USER, REGISTRY_WITH_PASSWORD

PROGRAMS = ("mcp", "mcp-master", "mcp-agent")
WORKERS = ("orion", "hyperborea")
ENGINES = ("rift", *WORKERS)
AGENTS = (*ENGINES, "svc")
BUS, MASTER, AGENT = "mcp-bus", "mcp-master", "mcp-agent"

HEARTBEAT_S, MISSED, PROBE_TIMEOUT_S = 1.0, 3, 1.0
SILENCE_NOTICED_S = HEARTBEAT_S * MISSED + PROBE_TIMEOUT_S
"""How soon a silent node must be called so, by the health table of [health] in mcp-master.toml."""

CUT_NOTICED_S = 20.0
"""How long the bus may take to forget a connection that went silent: ping 5 s, two missed (docs/bus.md, Liveness)."""

UNIT = """\
[Unit]
Description=MCP {what}
ConditionPathExists=/srv/mcp/{unit}.toml
After={after}
StartLimitIntervalSec=0
[Service]
ExecStart={command} --config /srv/mcp/{unit}.toml
TimeoutStopSec=20
# No Restart: the tests say when what they killed starts again.
"""
COMMANDS = {
    BUS: ("bus", "/usr/local/bin/mcp bus run", "network.target"),
    MASTER: ("master", "/usr/local/bin/mcp-master", "mcp-bus.service"),
    AGENT: ("agent", "/usr/local/bin/mcp-agent", "network.target"),
}


# ------------------------------------------------------- what nodes boot with


def missing_programs() -> list[str]:
    """Return which console scripts the Python that runs the tests does not have beside it."""
    return [name for name in PROGRAMS if not (Path(sys.executable).parent / name).exists()]


def write_seed_tree(folder: Path) -> Path:
    """Write what every node has before it boots: our programs in PATH, our units, which wait for their configuration.

    The units lie where a distribution's would, so that NixOS-like nodes have them too, and one that `mcp` itself
    writes to /etc wins.
    """
    programs = folder / "all/usr/local/bin"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        (programs / name).symlink_to(Path(sys.executable).parent / name)
    for node in AGENTS:
        units = folder / node / "usr/local/lib/systemd/system"
        (units / "multi-user.target.wants").mkdir(parents=True)
        for unit in (BUS, MASTER, AGENT) if node == "rift" else (AGENT,):
            what, command, after = COMMANDS[unit]
            (units / f"{unit}.service").write_text(UNIT.format(what=what, unit=unit, command=command, after=after))
            (units / "multi-user.target.wants" / f"{unit}.service").symlink_to(f"../{unit}.service")
    return folder


def with_setting(text: str, table: str, key: str, value: str) -> str:
    """Return TOML with a key of a table set, in place of what it was before or of the comment that shows it."""
    head = f"[{table}]"
    lines = text.splitlines()
    if head not in lines:
        return f"{text.rstrip()}\n\n{head}\n{key} = {value}\n".lstrip()
    begin = lines.index(head) + 1
    end = next((i for i in range(begin, len(lines)) if lines[i].startswith("[")), len(lines))
    kept = [line for line in lines[begin:end] if not re.match(rf"#?\s*{re.escape(key)}\s*=", line)]
    return "\n".join([*lines[:begin], f"{key} = {value}", *kept, *lines[end:]]) + "\n"


# ---------------------------------------------------------------- definitions


def definition(
    name: str,
    image: str = "web:v1",
    *,
    tier: str = "",
    node: str = "",
    ports: Iterable[str] = (),
    registry: str = REGISTRY,
    timeout: str = "30s",
) -> str:
    """Return a service definition: one component with one route, or with fixed ports where some are given."""
    lines = [f'name = "{name}"']
    lines += [f'{key} = "{value}"' for key, value in (("tier", tier), ("node", node)) if value]
    lines += ["[[components]]", f'name = "{name}"', f'image = "{registry}/{image}"']
    if ports:
        lines.append(f"ports = {json.dumps(list(ports))}")
    else:
        lines += ["[components.health]", 'path = "/healthz"', f'timeout = "{timeout}"']
        lines += ["[[components.routes]]", "port = 8443", 'mode = "l7"']
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Container:
    """One container as a node's own engine describes it; equal means that nobody has touched it."""

    name: str
    id: str
    image: str
    state: str
    exit_code: int
    error: str
    pid: int
    started_at: str
    restarts: int


def as_container(inspected: dict[str, Any]) -> Container:
    """Read the engine's long description."""
    state = inspected["State"]
    return Container(
        name=inspected["Name"].removeprefix("/"),
        id=inspected["Id"],
        image=inspected["Config"]["Image"],
        state=state["Status"],
        exit_code=state["ExitCode"],
        error=state["Error"],
        pid=state["Pid"],
        started_at=state["StartedAt"],
        restarts=inspected["RestartCount"],
    )


# ---------------------------------------------------------------------- fleet


class Fleet:
    """rift with bus, master and agent; orion, hyperborea (arm64) and svc (edge) with an agent each; a workstation."""

    def __init__(self, lab: Lab) -> None:
        """Take a running rig that was seeded with `write_seed_tree`."""
        self.lab = lab
        self.services: set[str] = set()

    # ---------------------------------------------------------------- set up

    def set_up(self) -> None:
        """Do what the manual tells an operator to do, from `mcp init` to four healthy nodes."""
        for node in ENGINES:
            self.lab.on(node, "docker network inspect mcpnet >/dev/null 2>&1 || docker network create mcpnet")
        self.lab.on("rift", f"mcp init --name rift --address {NODES['rift'].address()} --no-systemd")
        for key, value in (("heartbeat_s", HEARTBEAT_S), ("missed", MISSED), ("probe_timeout_s", PROBE_TIMEOUT_S)):
            self.configure("rift", MASTER, "health", key, str(value))
        self.start("rift", BUS)
        wait_for("the bus", lambda: ":4222 " in self.lab.on("rift", "ss -Hltn"), 10)
        self.start("rift", MASTER, AGENT)
        self.lab.on("op", "ssh rift mcp operator add kyle >/root/kyle.mcp")
        self.lab.on("op", "chmod 600 /root/kyle.mcp && mcp login /root/kyle.mcp")
        wait_for("the master", lambda: self.mcp("node", "list").code == 0, 20)
        for node in (*WORKERS, "svc"):
            self.join(node)
        self.wait_until_whole(30)

    def join(self, node: str) -> None:
        """Invite a node at the workstation, run the printed line there, start its agent."""
        role = "edge" if node == "svc" else "worker"
        printed = self.mcp("node", "invite", node, "--role", role)
        line = next((line.strip() for line in printed.out.splitlines() if "mcp-agent join" in line), "")
        assert printed.code == 0 and line, f"mcp node invite {node}: {printed}"
        self.lab.on(node, line[line.index("mcp-agent join") :])
        if node == "hyperborea":
            self.configure(node, AGENT, "node", "arch", '"arm64"')
        if node in ENGINES:
            self.give_password(node)
        self.lab.on(node, f"systemctl restart {AGENT}")

    def give_password(self, node: str) -> None:
        """Let a node's agent pull from the registry that wants a password."""
        self.lab.on(node, f"umask 077; printf {REGISTRY_PASSWORD} >/srv/mcp/registry.pass")
        table = f'registry."{REGISTRY_WITH_PASSWORD}"'
        self.configure(node, AGENT, table, "username", f'"{REGISTRY_USER}"')
        self.configure(node, AGENT, table, "password_file", '"/srv/mcp/registry.pass"')

    def configure(self, node: str, unit: str, table: str, key: str, value: str) -> None:
        """Edit one key of a configuration file, as people do."""
        file = f"/srv/mcp/{unit}.toml"
        text = with_setting(self.lab.on(node, f"cat {file}"), table, key, value)
        ran = self.lab.exec(node, "sh", "-c", f"cat >{file}", stdin=text)
        assert ran.code == 0, f"{node}: cannot write {file}: {ran.err}"

    # ------------------------------------------------------------------- use

    def mcp(self, *args: str, timeout_s: float = 120) -> Ran:
        """Run `mcp` at the workstation."""
        return self.lab.exec("op", "mcp", *args, timeout_s=timeout_s)

    def json(self, *args: str, codes: tuple[int, ...] = (0,), timeout_s: float = 120) -> Any:
        """Run `mcp --json` at the workstation and return what it prints.

        Raises:
            AssertionError: another exit code than one of these.
        """
        ran = self.mcp("--json", *args, timeout_s=timeout_s)
        assert ran.code in codes, f"mcp {' '.join(args)}: exit {ran.code}\n{ran.out}{ran.err}"
        return json.loads(ran.out)

    def on(self, node: str, script: str, *, check: bool = True, timeout_s: float = 60) -> str:
        """Run a shell script in a node and return its output."""
        return self.lab.on(node, script, check=check, timeout_s=timeout_s)

    def write(self, name: str, text: str) -> str:
        """Put a definition on the workstation and return its path."""
        path = f"/root/services/{name}.toml"
        self.lab.exec("op", "sh", "-c", f"mkdir -p /root/services; cat >{path}", stdin=text)
        self.services.add(name)
        return path

    def deploy(self, name: str, image: str = "web:v1", **wishes: Any) -> dict[str, Any]:
        """Deploy a service that must arrive, and return its result."""
        path = self.write(name, definition(name, image, **wishes))
        results = self.json("deploy", path)["results"]
        assert len(results) == 1 and results[0]["outcome"] in ("deployed", "unchanged"), results
        return dict(results[0])

    def try_deploy(self, name: str, image: str = "web:v1", *args: str, timeout_s: float = 120, **wishes: Any) -> Ran:
        """Deploy a service that may be refused, as a person would see it."""
        return self.mcp("deploy", self.write(name, definition(name, image, **wishes)), *args, timeout_s=timeout_s)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Return `mcp node list` by name."""
        return {node["name"]: node for node in self.json("node", "list")["nodes"]}

    def health(self, node: str) -> str:
        """Return what `mcp node list` says of a node's health."""
        return str(self.nodes()[node]["health"])

    def view(self) -> list[tuple[Any, ...]]:
        """Return what `mcp status` claims, without ages: equal views are equal claims."""
        status = self.json("status")
        nodes = [("node", node["name"], node["health"]) for node in status["nodes"]]
        services = [
            ("service", one["name"], one["node"], one["state"], one["spec_hash"], one["generation"])
            for one in status["services"]
        ]
        return sorted(nodes + services)

    # ---------------------------------------------------------- what is real

    def containers(self, node: str) -> dict[str, Container]:
        """Return a node's containers by name, running or not, asked of its own engine without our product.

        Raises:
            OSError: it does not answer.
        """
        listed = self.lab.engine(node, "/containers/json?all=1")
        found = (as_container(self.lab.engine(node, f"/containers/{one['Id']}/json")) for one in listed)
        return {one.name: one for one in found}

    def everything(self) -> dict[str, dict[str, Container]]:
        """Return the containers of all nodes: compare two of these to see whether anybody was restarted."""
        return {node: self.containers(node) for node in ENGINES}

    def copies(self, service: str) -> dict[str, list[Container]]:
        """Return where containers of a service are, running or not, by the engines' own word."""
        prefixes = (f"mcp.{service}.", f"mcp.{service}-")
        found = {
            node: [one for name, one in containers.items() if name.startswith(prefixes)]
            for node, containers in self.everything().items()
        }
        return {node: copies for node, copies in found.items() if copies}

    def page(self, node: str, port: int = 8080) -> str:
        """Fetch a page from the workstation; empty when there is none."""
        return self.on("op", f"curl -s -m 2 http://{node}:{port}/", check=False)

    # ---------------------------------------------------------------- faults

    def start(self, node: str, *units: str) -> None:
        """Start units, also after a failure."""
        self.lab.on(node, f"systemctl reset-failed {' '.join(units)} 2>/dev/null; systemctl start {' '.join(units)}")

    def kill(self, node: str, unit: str) -> None:
        """kill -9 the main process of a unit and return when it is gone."""
        self.lab.on(node, f"systemctl kill --signal=KILL --kill-who=main {unit}")
        wait_for(f"{unit} to die", lambda: not self.is_active(node, unit), 5)

    def is_active(self, node: str, unit: str) -> bool:
        """Say whether a unit runs."""
        return self.lab.on(node, f"systemctl is-active {unit}", check=False) == "active"

    def partition(self, node: str, **how: Any) -> None:
        """See faults.partition."""
        faults.partition(self.lab, node, **how)

    def heal(self, node: str = "") -> None:
        """See faults.heal."""
        faults.heal(self.lab, node)

    def crash(self, node: str) -> None:
        """See faults.crash."""
        faults.crash(self.lab, node)

    def boot(self, node: str, *, has_address: bool = True) -> None:
        """See faults.boot."""
        faults.boot(self.lab, node, has_address=has_address)

    def give_address(self, node: str) -> None:
        """See faults.give_address."""
        faults.give_address(self.lab, node)

    def kill_docker(self, node: str, how: faults.How = "crash") -> None:
        """See faults.kill_engine."""
        faults.kill_engine(self.lab, node, how)

    def start_docker(self, node: str) -> None:
        """See faults.start_engine."""
        faults.start_engine(self.lab, node)

    # --------------------------------------------------------------- waiting

    def shown_after(self, what: str, look: Callable[[], bool], since_s: float, within_s: float) -> float:
        """Return how long after `since_s` a command was typed that showed it: the age of the news, not of the answer.

        Raises:
            AssertionError: no command typed within the time showed it; one that failed shows nothing.
        """
        trouble = ""
        while True:
            asked_s = time.monotonic() - since_s
            try:
                if look() and asked_s <= within_s:
                    print(f"{what}: shown to who asks {asked_s:.2f} s after (bound {within_s:g} s)")
                    return asked_s
            except (AssertionError, OSError, LabError, subprocess.TimeoutExpired) as error:
                trouble = f"; last: {error}"
            assert asked_s <= within_s, f"{what}: not shown within {within_s:g} s{trouble}"

    def wait_until_whole(self, within_s: float) -> float:
        """Return after how many seconds all four nodes are healthy."""

        def whole() -> bool:
            return {name: node["health"] for name, node in self.nodes().items()} == dict.fromkeys(AGENTS, "healthy")

        return self.shown_after("four healthy nodes", whole, time.monotonic(), within_s)

    def mend(self) -> None:
        """Undo every fault, start what is down, undeploy what tests deployed, and wait for a whole fleet."""
        self.heal()
        for node in AGENTS:
            try:
                self.lab.pid(node)
            except NotRunning:
                self.boot(node)
        for node in ENGINES:
            self.give_address(node)
            self.start_docker(node)
        self.start("rift", BUS, MASTER)
        for node in AGENTS:
            self.start(node, AGENT)
        self.wait_until_whole(60)
        for service in sorted(self.services):
            self.mcp("undeploy", service)
        self.services.clear()

    def journal(self, node: str, unit: str, lines: int = 40) -> str:
        """Return the last lines of a unit's log."""
        return self.lab.on(node, f"journalctl -q --no-pager -n {lines} -u {unit}", check=False)


def keep_journals(fleet: Fleet, folder: Path) -> None:
    """Write every unit's log to a folder, for who looks into a failure."""
    folder.mkdir(parents=True, exist_ok=True)
    for node in AGENTS:
        for unit in (BUS, MASTER, AGENT) if node == "rift" else (AGENT,):
            (folder / f"{node}-{unit}.log").write_text(fleet.journal(node, unit, 2000))
