"""The rig itself: brings a fleet of namespaces up, runs commands in its nodes, takes it down again.

Everything a rig writes lies on one tmpfs that dies with it; only keys, the registry's content and the arm64 files are
kept, in STATE/cache.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rig.binds import Bind
from rig.files import facts, files_of, write_files
from rig.keys import make_keys
from rig.machine import obstacles
from rig.shell import LabError, NotRunning, sh, start_ticks, wait_for
from rig.table import MTU, NODES, REGISTRY

HERE = Path(__file__).resolve().parent
SBIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NODE_ENV = {"PATH": SBIN_PATH, "HOME": "/root", "LANG": "C.UTF-8"}
"""What a command in a node sees of our environment: nothing of it."""

CERT_SECONDS = 90 * 86400
"""How long the ACME server's certificates last unless told otherwise."""

# Joins the control groups named in $1, then becomes the command.
JOIN = 'for f in $1; do echo 0 >"$f" || exit 1; done; shift; exec "$@"'


@dataclass(frozen=True)
class Ran:
    """How a command in a node ended; `seconds` includes starting it."""

    code: int
    out: str
    err: str
    seconds: float


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket: an engine's API without an engine's client."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        """Connect lazily; every read and write ends within the timeout."""
        super().__init__("localhost", timeout=timeout_s)
        self.path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Lab:
    """One rig, known by its state folder: two rigs with two folders do not meet."""

    def __init__(self, state: Path) -> None:
        """Speak of the rig with this state folder, whether it is up or not."""
        state = state.resolve()
        self.name = "lab-" + hashlib.sha256(str(state).encode()).hexdigest()[:8]  # in control group paths
        self.cache = state / "cache"  # keys and registry content: outlives `down`
        self.run = state / "run"  # everything of one `up`
        self.top = self.run / "top"  # a tmpfs inside the rig's own mount namespace
        self.pids_file = self.run / "pids.json"
        self.lock = threading.Lock()
        self.children: list[subprocess.Popen[str]] = []
        self.binds: list[Bind] = []
        self.cert_seconds = CERT_SECONDS
        self.seed_trees: list[Path] = []
        """Folders with all/ and NODE/ trees to lay over the nodes' files."""

    # ------------------------------------------------------------- processes

    def pids(self) -> dict[str, int]:
        """Return the first process of everything that runs, the switch included, as this machine numbers it."""
        for child in self.children:
            child.poll()  # or it would stay behind as a zombie
        try:
            known = json.loads(self.pids_file.read_text())
        except FileNotFoundError:
            return {}
        return {name: pid for name, (pid, ticks) in known.items() if ticks and start_ticks(pid) == ticks}

    def remember(self, name: str, pid: int) -> None:
        """Write down a process, for later calls of other programs too."""
        with self.lock:
            known = {name: [pid, start_ticks(pid)] for name, pid in {**self.pids(), name: pid}.items()}
            draft = self.pids_file.with_suffix(".tmp")
            draft.write_text(json.dumps(known))
            draft.rename(self.pids_file)

    def pid(self, name: str) -> int:
        """Return a node's first process.

        Raises:
            NotRunning: it is off.
        """
        try:
            return self.pids()[name]
        except KeyError:
            raise NotRunning(f"{name} is not running (see {self.run}/{name}.log)") from None

    def inside(self, name: str, *cmd: object) -> list[str]:
        """Return the command line that runs cmd in a node, or in the switch between them."""
        which = ["--mount", "--net"] if name == "switch" else ["--all"]
        return ["nsenter", f"--target={self.pid(name)}", *which, *map(str, cmd)]

    def exec(
        self,
        name: str,
        *cmd: object,
        stdin: str | None = None,
        timeout_s: float = 60,
        env: dict[str, str] | None = None,
    ) -> Ran:
        """Run a command in a node, with a clean environment, and say how it ended.

        Raises:
            subprocess.TimeoutExpired: it did not end in time.
        """
        begun_s = time.monotonic()
        done = subprocess.run(
            self.inside(name, *cmd),
            input=stdin,
            text=True,
            capture_output=True,
            timeout=timeout_s,
            env=NODE_ENV | (env or {}),
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr, time.monotonic() - begun_s)

    def on(self, name: str, script: str, *, check: bool = True, timeout_s: float = 60) -> str:
        """Run a shell script in a node and return its output, stripped.

        Raises:
            LabError: it failed and `check` is on.
        """
        ran = self.exec(name, "sh", "-c", script, timeout_s=timeout_s)
        if check and ran.code:
            raise LabError(f"{name}: {script}: exit {ran.code}: {ran.out}{ran.err}")
        return ran.out.strip()

    def root(self, name: str) -> Path:
        """Return a node's file system as seen from outside."""
        return Path(f"/proc/{self.pid(name)}/root")

    def engine(self, name: str, path: str, timeout_s: float = 5) -> Any:
        """GET a path of the node's own engine and return the JSON, or the text where it is none.

        Raises:
            OSError: it does not answer.
            LabError: it answers with an error.
        """
        connection = UnixConnection(self.root(name) / "run/docker.sock", timeout_s)
        try:
            connection.request("GET", path, headers={"Host": "docker"})
            answer = connection.getresponse()
            body = answer.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"{name}: dockerd: {error!r}") from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise LabError(f"{name}: GET {path}: {answer.status} {body.strip()}")
        return json.loads(body) if body[:1] in ("{", "[") else body

    def control_groups(self, name: str) -> Iterator[tuple[str, Path]]:
        """Yield hierarchy and folder of a node's control groups; without a name those of the whole rig."""
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            controllers = line.split(":", 2)[1].removeprefix("name=") or "unified"
            yield controllers, Path("/sys/fs/cgroup") / controllers / self.name / name

    # ------------------------------------------------------------------- up

    def up(self) -> float:
        """Start everything, wait until it answers, and return how many seconds that took.

        Raises:
            LabError: this machine cannot, or something did not come up; what did is for `down` to clear away.
        """
        begun_s = time.monotonic()
        self.prepare()
        self.start_switch()
        for name in NODES:
            self.seed(name)
        self.share()
        with ThreadPoolExecutor(len(NODES)) as pool:
            list(pool.map(self.boot, NODES))
            list(pool.map(self.wait_until_ready, NODES))
        network = ["nsenter", f"--target={self.pid('infra')}", "--net"]
        sh(*network, sys.executable, HERE / "images.py", REGISTRY)
        return time.monotonic() - begun_s

    def prepare(self) -> None:
        """Check the machine, make the folders and the keys."""
        if why := obstacles():
            raise LabError("; ".join(why))
        if self.pids():
            raise LabError(f"already up: {self.run.parent}")
        self.cache.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.run, ignore_errors=True)
        self.top.mkdir(parents=True)
        make_keys(self.cache)

    def start_switch(self) -> None:
        """Start a process that holds the bridges and the tmpfs on which all nodes' files live."""
        script = textwrap.dedent(f"""
            set -e
            mount --make-rprivate /
            mount -t tmpfs -o size=8g,mode=755 lab {self.top}
            mkdir -p {self.top}/nodes {self.top}/shared
            ip link set lo up
            ip link add ts type bridge; ip link set ts up
            ip link add pub type bridge; ip link set pub up
            nft 'add table bridge lab; add chain bridge lab cut {{ type filter hook forward priority 0; }}'
            : >{self.top}/ready
            exec sleep infinity
        """)
        child = self.spawn("switch", ["unshare", "--mount", "--net", "bash", "-c", script])
        self.remember("switch", child.pid)
        wait_for("the switch", lambda: (self.seen_by_switch() / "ready").exists(), 10)  # noqa: PLW0108 - looked up anew

    def spawn(self, name: str, cmd: list[str], stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        """Start a process that outlives us, its output in NAME.log."""
        with (self.run / f"{name}.log").open("a") as log:
            child = subprocess.Popen(
                cmd, stdin=stdin, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        self.children.append(child)
        return child

    def seen_by_switch(self, *below: str) -> Path:
        """Return a path on the tmpfs, which only the switch's mount namespace has."""
        return self.root("switch").joinpath(str(self.top).lstrip("/"), *below)

    def seed(self, name: str) -> None:
        """Lay out a node's folders and what is copied over its files at its first boot."""
        folder = self.seen_by_switch("nodes", name)
        for below in ("up", "work", "root", "home", "srv", "docker", "containerd", "seed"):
            (folder / below).mkdir(parents=True, exist_ok=True)
        own = {
            "infra": [(self.cache / "registry", Path("/var/lib/docker-registry"))],
            "hyperborea": [(self.cache / "arm64", Path("/opt/arm64"))],
        }.get(name, [])
        (folder / "binds").write_text("".join(f"{source}\t{target}\n" for source, target in [*self.binds, *own]))
        (folder / "readonly").write_text("etc/systemd/system\n" if NODES[name].is_nixos else "")
        write_files(files_of(name, self.cache, self.cert_seconds), folder / "seed")
        for tree in self.seed_trees:
            for part in ("all", name):
                if (tree / part).is_dir():
                    shutil.copytree(tree / part, folder / "seed", symlinks=True, dirs_exist_ok=True)

    def share(self) -> None:
        """Fill /lab, one folder shared by all nodes."""
        shared = self.seen_by_switch("shared")
        (shared / "acme-ca.pem").write_text((self.cache / "pebble" / "ca.pem").read_text())
        shutil.copy(self.cache / "ssh" / "id_ed25519", shared / "id_ed25519")
        (shared / "lab.json").write_text(json.dumps(facts(self.cache), indent=1))

    def boot(self, name: str, *, has_address: bool = True) -> None:
        """Start a node on the files it has; without an address its card is there, its tailnet is not yet."""
        node = NODES[name]
        self.write_network(name, has_address=has_address)
        groups = self.make_control_groups(name)
        procs = [folder / "cgroup.procs" for folder in groups]
        kind = "systemd" if node.units else "plain"
        join = ("sh", "-c", JOIN, "join", " ".join(map(str, procs)))
        apart = ("unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child")
        cmd = [*join, *self.inside("switch", *apart, HERE / "node-init.sh", name, self.top, kind)]
        child = self.spawn(name, cmd, subprocess.PIPE)
        pid = self.first_child(name, child)
        self.remember(name, pid)
        self.plug_in(name, pid)
        # unshare itself is no process of the node: systemd could not make sense of it there.
        for folder in groups:
            (folder.parent.parent / "cgroup.procs").write_text(str(child.pid))
        assert child.stdin
        child.stdin.write("go\n")
        child.stdin.close()

    def first_child(self, name: str, child: subprocess.Popen[str]) -> int:
        """Return the process that unshare has forked: the node's first one."""

        def forked() -> list[str]:
            if child.poll() is not None:
                raise NotRunning(f"{name} died: see {self.run}/{name}.log")
            return Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()

        return int(wait_for(name, forked, 10)[0])

    def write_network(self, name: str, *, has_address: bool) -> None:
        """Write what the node runs once its cards are plugged in."""
        lines = []
        for i, network in enumerate(NODES[name].networks):
            lines.append(f"ip link set {network}-{name} name eth{i} mtu {MTU[network]}")
            if has_address or network != "ts":
                lines.append(f"ip addr add {NODES[name].address(network)}/24 dev eth{i}")
            lines.append(f"ip link set eth{i} up")
        (self.seen_by_switch("nodes", name, "net.sh")).write_text("\n".join(lines) + "\n")

    def make_control_groups(self, name: str) -> list[Path]:
        """Make a node's control groups and return their folders."""
        made = []
        for controllers, folder in self.control_groups(name):
            folder.mkdir(parents=True, exist_ok=True)
            if "cpuset" in controllers.split(","):
                for part in (folder.parent, folder):
                    for file in ("cpuset.cpus", "cpuset.mems"):
                        (part / file).write_text((part.parent / file).read_text())
            made.append(folder)
        return made

    def plug_in(self, name: str, pid: int) -> None:
        """Give a node its network cards, the other end of each in the switch."""
        for network in NODES[name].networks:
            # A node that crashed a moment ago may still have its old ones: the kernel takes its time.
            sh(*self.inside("switch", "ip", "link", "del", f"p-{network}-{name}"), check=False)
        wires = "".join(
            f"link add p-{network}-{name} type veth peer name {network}-{name} netns {pid}\n"
            f"link set p-{network}-{name} mtu {MTU[network]} master {network} up\n"
            for network in NODES[name].networks
        )
        sh(*self.inside("switch", "ip", "-batch", "-"), stdin=wires)

    def wait_until_ready(self, name: str) -> None:
        """Return when everything that the node boots with answers."""
        node = NODES[name]
        if not node.units:
            wait_for(name, lambda: (self.root(name) / "run/lab-ready").exists(), 15)  # noqa: PLW0108 - as above
            return
        wait_for(f"{name}: systemd", lambda: (self.root(name) / "run/systemd/private").exists(), 15)  # noqa: PLW0108
        if node.has_engine:
            self.wait_for_engine(name)
        states = self.inside(name, "systemctl", "is-active", "multi-user.target", *node.units)
        wait_for(f"{name}: {' '.join(node.units)}", lambda: set(sh(*states, check=False).split()) == {"active"}, 60)

    def wait_for_engine(self, name: str) -> None:
        """Return when the node's dockerd answers."""
        wait_for(f"{name}: dockerd", lambda: self.engine(name, "/_ping") == "OK", 60)

    # ----------------------------------------------------------------- down

    def down(self) -> float:
        """End everything, leave nothing but the cache, and return how many seconds that took."""
        begun_s = time.monotonic()
        pids = self.pids()
        for name in sorted(pids, key=lambda name: name == "switch"):
            os.kill(pids[name], signal.SIGKILL)
        wait_for("the nodes' end", lambda: not self.pids(), 20)
        for name in (*NODES, ""):
            for _, folder in self.control_groups(name):
                if folder.is_dir():
                    wait_for(f"{folder} to empty", partial(remove_control_group, folder), 10)
        for child in self.children:
            child.wait(10)
        shutil.rmtree(self.run, ignore_errors=True)
        return time.monotonic() - begun_s

    def status(self) -> dict[str, Any]:
        """Return what runs, as `lab status` prints it."""
        pids = self.pids()
        return {"up": bool(pids), "nodes": {name: self.node_status(name, pids) for name in NODES if pids}}

    def node_status(self, name: str, pids: dict[str, int]) -> dict[str, Any] | str:
        """Return a node's process, addresses and units, or "off"."""
        if name not in pids:
            return "off"
        node, states = NODES[name], []
        if node.units:
            states = sh(
                *self.inside(name, "systemctl", "is-active", "multi-user.target", *node.units), check=False
            ).split()
        return {
            "pid": pids[name],
            "address": [node.address(network) for network in node.networks],
            **dict(zip(("systemd", *node.units), states, strict=False)),
        }


def remove_control_group(top: Path) -> bool:
    """Remove a control group and all below; raises OSError while something still runs there."""
    for folder, _, _ in os.walk(top, topdown=False):
        Path(folder).rmdir()
    return True
