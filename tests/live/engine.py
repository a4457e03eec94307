"""A container engine and registries of the tests' own: killed, frozen and restarted without touching anybody else's.

The engine is a dockerd with its own containerd, folders and socket, and without iptables rules; docs/engine.md says what
it needs. Where the machine cannot, tests are skipped with the reason, or fail when MCP_REQUIRE_LIVE=1.
"""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mcp.demo.image import Image, digest

MACHINE_SOCKET = Path("/var/run/docker.sock")
START_S = 60.0
"""A daemon is up in 1 s; with a stale containerd 15 s were seen, and machines are busy."""

REGISTRY_USER = ("tester", "s3cret-for-tests")
_HTPASSWD = "tester:$2b$04$zuxOES/8GXIHM75c.n85Q.osG7MM435Q.HKFJh1LgSw0bIoA6pwbG"
"""The password as docker-registry wants it: bcrypt, which Python has no module for."""

_BLOB, _DOCKER = "application/octet-stream", "application/vnd.docker."
_MANIFEST = _DOCKER + "distribution.manifest.v2+json"
_MANIFEST_LIST = _DOCKER + "distribution.manifest.list.v2+json"


def unavailable(reason: str) -> None:
    """Skip, unless the run insists on the real thing."""
    if os.environ.get("MCP_REQUIRE_LIVE") == "1":
        pytest.fail(f"no container engine for the tests, and MCP_REQUIRE_LIVE=1: {reason}", pytrace=False)
    pytest.skip(f"no container engine for the tests: {reason}")


def obstacle(*programs: str) -> str:
    """Return why these programs cannot be run here, "" when they can."""
    if os.geteuid() != 0:
        return "it takes root"
    missing = [program for program in programs if shutil.which(program, path=_path()) is None]
    return f"not installed: {', '.join(missing)} (apt-get install docker.io docker-registry)" if missing else ""


def wait_until(what: str, is_so: Callable[[], Any], limit_s: float = START_S) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: it did not come true in time.
    """
    end_s = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end_s, f"waited {limit_s:g} s in vain: {what}"
        time.sleep(0.02)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"


def _spawn(cmd: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a daemon that ends with the thread that starts it, however that ends, and does not hear our terminal."""
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with log.open("ab") as out:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *cmd],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env | {"PATH": _path()}, start_new_session=True,
        )  # fmt: skip


class PrivateEngine:
    """A dockerd that belongs to one test run; `url` is what an agent's configuration would say."""

    def __init__(self, *options: str) -> None:
        _clear_after_the_killed()
        # Not pytest's folder: the path of a socket must be short.
        self.folder = Path(tempfile.mkdtemp(prefix=f"mcp-engine-{os.getpid()}-", dir="/var/tmp"))
        self.socket = self.folder / "docker.sock"
        self.url = f"unix://{self.socket}"
        self._options = options
        self._pool = f"10.{random.randrange(200, 250)}.{16 * random.randrange(16)}.0/20"
        self._containerd: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What both daemons said; for the one who reads why a test failed."""
        return "".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("*.log")))

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        self.spawn()
        wait_until(f"a private dockerd\n{self.log}", self.answers)

    def spawn(self) -> None:
        """Start the daemon and do not wait."""
        if self._containerd is None or self._containerd.poll() is not None:
            self._containerd = self._start_containerd()
        # What a killed daemon leaves would stop the next one.
        (self.folder / "docker.pid").unlink(missing_ok=True)
        self._daemon = _spawn(
            [
                "dockerd",
                f"--containerd={self.folder}/containerd.sock",
                f"--data-root={self.folder}/data",
                f"--exec-root={self.folder}/exec",
                f"--pidfile={self.folder}/docker.pid",
                f"--host={self.url}",
                # Nothing of the machine's network is changed; published ports are forwarded by docker-proxy.
                "--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false",
                f"--default-address-pool=base={self._pool},size=24",
                "--shutdown-timeout=3",
                *self._options,
            ],
            self.folder / "dockerd.log",
        )  # fmt: skip

    def _start_containerd(self) -> subprocess.Popen[bytes]:
        config = self.folder / "containerd.toml"
        config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
        sock = self.folder / "containerd.sock"
        started = _spawn(
            [
                "containerd", f"--config={config}", f"--address={sock}",
                f"--root={self.folder}/containerd", f"--state={self.folder}/containerd-state",
            ],
            self.folder / "containerd.log",
        )  # fmt: skip
        wait_until("containerd's socket", sock.exists)
        return started

    def answers(self) -> bool:
        """Say whether the engine answers a ping within a second."""
        assert self._daemon is None or self._daemon.poll() is None, f"dockerd ended\n{self.log}"
        return pings(self.socket)

    def kill(self) -> None:
        """End it as a crash does: containers live on or not, as their policy says, and the socket file stays."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGCONT)
        self._daemon.kill()
        self._daemon.wait()

    def stop(self) -> None:
        """Stop it as `systemctl stop docker` does."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGCONT)
        self._daemon.terminate()
        self._daemon.wait(START_S)

    def freeze(self) -> None:
        """Make it accept and not answer."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGCONT)

    def repair(self) -> None:
        """Make it run again, whatever was done to it."""
        if self._daemon is not None and self._daemon.poll() is None:
            self.thaw()
            wait_until("a thawed dockerd", self.answers)
        else:
            self.start()

    def docker(self, *args: str) -> str:
        """Return what the docker command says: the tests' own view, independent of our adapter."""
        done = subprocess.run(
            ["docker", "--host", self.url, *args], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"docker {' '.join(args)}: {done.stderr}"
        return done.stdout.strip()

    def clear(self) -> None:
        """Remove every container."""
        if ids := self.docker("ps", "--all", "--quiet").split():
            self.docker("rm", "--force", "--volumes", *ids)

    def close(self) -> None:
        """Remove everything, the folder too."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            if self._daemon is not None and self._daemon.poll() is None:
                self.thaw()
                self.clear()
                for network in self.docker("network", "ls", "--quiet", "--filter", "type=custom").split():
                    self.docker("network", "rm", network)
        for daemon in (self._daemon, self._containerd):
            if daemon is not None and daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        _clear(self.folder)


def pings(path: Path) -> bool:
    """Say whether an engine at a socket answers a ping within a second."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            client.connect(str(path))
            client.sendall(b"GET /_ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return client.recv(100).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def _clear_after_the_killed() -> None:
    """Remove what runs left behind that did not live to do it."""
    for folder in Path("/var/tmp").glob("mcp-engine-*-*"):
        pid = folder.name.split("-")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            _clear(folder)


def _clear(folder: Path) -> None:
    _end_shims(folder)
    _unmount_below(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _end_shims(folder: Path) -> None:
    """End what containerd leaves when it is stopped: one supervisor for each container of ours."""
    for proc in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if (
                b"containerd-shim" in (proc / "cmdline").read_bytes()
                and str(folder).encode() in (proc / "cmdline").read_bytes()
            ):
                os.kill(int(proc.name), signal.SIGKILL)


def _unmount_below(folder: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)


@contextmanager
def private_engine(*options: str) -> Iterator[PrivateEngine]:
    """Yield a private engine that is up; skips where none can be."""
    if why := obstacle("dockerd", "containerd", "docker", "setpriv"):
        unavailable(why)
    engine = PrivateEngine(*options)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()


def machine_engine_url() -> str:
    """Return the URL of the machine's own engine, "" when none answers."""
    return f"unix://{MACHINE_SOCKET}" if pings(MACHINE_SOCKET) else ""


# --------------------------------------------------------------------- registry


class Registry:
    """A docker-registry on loopback, where engines do without TLS; with a password when `login` is set."""

    def __init__(self, folder: Path, *, login: bool = False) -> None:
        self._folder = folder
        self._login = login
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.address = f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self._folder / "blobs")}},
            "http": {"addr": self.address},
        }
        if self._login:
            (self._folder / "htpasswd").write_text(_HTPASSWD + "\n")
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(self._folder / "htpasswd")}}
        path = self._folder / "config.yml"
        path.write_text(json.dumps(config))  # JSON is YAML too
        self._process = _spawn(["docker-registry", "serve", str(path)], self._folder / "registry.log")
        wait_until("a registry on loopback", self._answers, 20)

    def _answers(self) -> bool:
        try:
            return self.call("GET", "/v2/")[0] == 200
        except OSError:
            return False

    def stop(self) -> None:
        """Stop it; what was pushed stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def freeze(self) -> None:
        """Make it accept and not answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def call(self, method: str, path: str, body: bytes = b"", kind: str = _BLOB) -> tuple[int, dict[str, str]]:
        """Make one request and return its status and headers."""
        headers = {"Content-Type": kind}
        if self._login:
            headers["Authorization"] = _basic(*REGISTRY_USER)
        connection = http.client.HTTPConnection(self.address, timeout=10)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()

    def push(self, name: str, image: Image) -> str:
        """Push an image for one platform as "web:v1" and return its whole name."""
        repository, _, tag = name.rpartition(":")
        self._push_manifest(repository, tag, _MANIFEST, self._manifest(repository, image))
        return f"{self.address}/{name}"

    def push_list(self, name: str, *images: Image) -> str:
        """Push images as the platforms of one tag, as registries of mixed fleets hold them."""
        repository, _, tag = name.rpartition(":")
        entries = [self._entry(repository, image) for image in images]
        listed = {"schemaVersion": 2, "mediaType": _MANIFEST_LIST, "manifests": entries}
        self._push_manifest(repository, tag, _MANIFEST_LIST, json.dumps(listed).encode())
        return f"{self.address}/{name}"

    def _entry(self, repository: str, image: Image) -> dict[str, Any]:
        body = self._manifest(repository, image)
        self._push_manifest(repository, digest(body), _MANIFEST, body)
        platform = {"architecture": json.loads(image.config)["architecture"], "os": "linux"}
        return {"mediaType": _MANIFEST, "size": len(body), "digest": digest(body), "platform": platform}

    def _manifest(self, repository: str, image: Image) -> bytes:
        zipped = [gzip.compress(layer, 1, mtime=0) for layer in image.layers]
        layers = [
            {"mediaType": _DOCKER + "image.rootfs.diff.tar.gzip", "size": len(z), "digest": digest(z)} for z in zipped
        ]
        for blob in (*zipped, image.config):
            self._push_blob(repository, blob)
        config = {"mediaType": _DOCKER + "container.image.v1+json", "size": len(image.config), "digest": image.id}
        return json.dumps({"schemaVersion": 2, "mediaType": _MANIFEST, "config": config, "layers": layers}).encode()

    def _push_manifest(self, repository: str, reference: str, kind: str, body: bytes) -> None:
        status, _ = self.call("PUT", f"/v2/{repository}/manifests/{reference}", body, kind)
        assert status == 201, f"manifest of {repository}: HTTP {status}"

    def _push_blob(self, repository: str, blob: bytes) -> None:
        status, headers = self.call("POST", f"/v2/{repository}/blobs/uploads/")
        assert status == 202, f"upload to {repository}: HTTP {status}"
        where = headers["location"].partition(self.address)[2]
        status, _ = self.call("PUT", f"{where}&digest={digest(blob)}", blob)
        assert status == 201, f"blob of {repository}: HTTP {status}"

    def blobs(self) -> list[Path]:
        """Return the files in which the blobs lie."""
        return sorted((self._folder / "blobs").glob("docker/registry/v2/blobs/sha256/*/*/data"))


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@contextmanager
def registry(folder: Path, *, login: bool = False) -> Iterator[Registry]:
    """Yield a registry that is up; skips where none can be."""
    if why := obstacle("docker-registry", "setpriv"):
        unavailable(why)
    folder.mkdir(parents=True, exist_ok=True)
    found = Registry(folder, login=login)
    try:
        found.start()
        yield found
    finally:
        found.stop()
