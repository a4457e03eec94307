"""The demo, act by act: every act prints the command that an operator would type, and runs exactly that."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mcp.cli import exits
from mcp.cli.output import Output, safe
from mcp.cli.programs import program
from mcp.cli.settings import Settings
from mcp.cli.tap import as_text
from mcp.demo import engine
from mcp.demo.fleet import NODES, DemoFleet, default_engine_url, resolved
from mcp.demo.image import load, web_image
from mcp.demo.processes import LOOK_EVERY_S
from mcp.model.errors import AdapterError, Refused

DEFINITION = """\
name = "web"
tier = "worker"                  # the fleet chooses the node

[[components]]
name = "web"
image = "localhost/web:{version}"
memory = "32M"

[components.health]
path = "/healthz"
interval = "100ms"

[[components.routes]]
port = 8443
"""

ANSWER_TIMEOUT_S = 10.0
MOST_TRAFFIC = 24
TOKEN_SHOWN = 30


class Show:
    """One showing; `keep` leaves the fleet running at its end."""

    def __init__(self, settings: Settings, *, keep: bool) -> None:
        self._out = Output(settings)
        self._is_json = settings.is_json
        self._keep = keep
        self._engine_url = default_engine_url()
        self._begun_s = time.monotonic()
        self._acts: list[dict[str, Any]] = []
        folder = kept_folder() if keep else Path(tempfile.gettempdir()) / f"mcp-demo-{os.getpid()}"
        self._fleet = DemoFleet(folder, engine_url=self._engine_url, is_tied=not keep, tell=self._command)

    def run(self) -> None:
        """Show everything.

        Raises:
            McpError: something is missing, with its remedy; or an act failed. Everything that was made is removed.
        """
        with only_one():
            is_done = False
            try:
                self._acts_in_order()
                is_done = True
            finally:
                if not (self._keep and is_done):
                    self._remove()
        seconds = time.monotonic() - self._begun_s
        if self._is_json:
            self._out.result({"seconds": round(seconds, 1), "kept": self._keep, "acts": self._acts})
        elif self._keep:
            self._say_how_to_go_on()
        else:
            self._out.say(
                f"\nShown in {seconds:.0f} s; everything it made is gone again. Yours begins with `mcp init`.", "bold"
            )

    def _acts_in_order(self) -> None:
        self._title("What is needed")
        version = asyncio.run(engine.check(self._engine_url))
        images = [web_image("v1"), web_image("v2")]
        self._say(f"container engine {version} at {self._engine_url}; two versions of a small web image")
        self._title("A fleet of four nodes: init, and one line for each further node")
        self._fleet.start()
        asyncio.run(load(self._engine_url, images))
        self._type("mcp node list")
        self._title("A service: what would happen, then make it so")
        self._write_definition("v1")
        self._type("cat web.toml")
        self._type("mcp plan web.toml", exits.CHANGES)
        self._type("mcp deploy web.toml")
        self._fetch()
        self._type("mcp status")
        self._title("A new version: healthy beside the old one before that one goes; and the bus as it happens")
        self._write_definition("v2")
        with self._watched() as traffic:
            self._type("mcp deploy web.toml")
        self._fetch()
        self._show_traffic(traffic)
        self._type("mcp deploy web.toml")
        self._type("mcp logs web")
        if not self._keep:
            self._title("And away")
            self._type("mcp undeploy web")

    # ------------------------------------------------------------------ telling

    def _title(self, text: str) -> None:
        self._say(f"\n{text}", "bold")

    def _say(self, text: str, *styles: str) -> None:
        if not self._is_json:
            self._out.say(text, *styles)

    def _command(self, line: str) -> None:
        words = [w if len(w) <= 60 or not w.startswith("mcpj1_") else w[:TOKEN_SHOWN] + "..." for w in line.split(" ")]
        shown = " ".join(words).replace(str(self._fleet.folder), "~")
        self._acts.append({"at_s": round(time.monotonic() - self._begun_s, 1), "command": shown})
        self._say(f"$ {shown}", "cyan")

    def _say_how_to_go_on(self) -> None:
        runs_on = next((str(row["node"]) for row in self._fleet.json("ps")["containers"]), "")
        self._out.say("\nThe fleet is left running. Go on with:", "bold")
        for line in how_to_go_on(self._fleet.folder, runs_on):
            self._out.say(f"  {line}")
        self._out.say("Logs of its parts: logs/. To end it and remove everything: mcp demo --stop")

    # ------------------------------------------------------------------- acting

    def _type(self, line: str, *other_codes: int) -> None:
        """Run a command as typed, in sight."""
        self._command(line)
        quiet: dict[str, Any] = {"capture_output": True} if self._is_json else {}
        done = subprocess.run(
            resolved(shlex.split(line)),
            cwd=self._fleet.folder,
            env=self._fleet.env(),
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
            **quiet,
        )
        if done.returncode not in (exits.DONE, *other_codes):
            raise AdapterError(f"the demo stops here: `{line}` ended with {done.returncode}", code="demo_failed")

    def _write_definition(self, version: str) -> None:
        (self._fleet.folder / "web.toml").write_text(DEFINITION.format(version=version), encoding="utf-8")

    def _fetch(self) -> None:
        rows = self._fleet.json("ps")["containers"]
        where = next((str(next(iter(row["ports"].values()))) for row in rows if row["ports"]), "")
        if not where:
            raise AdapterError("the demo stops here: the service has no port", code="demo_failed")
        self._command(f"curl http://{where}/")
        self._say(safe(_page(f"http://{where}/")).rstrip("\\n"), "green")

    @contextmanager
    def _watched(self) -> Iterator[list[dict[str, Any]]]:
        """Watch the bus as a debug operator, who hears everything and can say nothing."""
        config = self._fleet.folder / "watch.toml"
        self._fleet.log_in("watch", "debug", config)
        seen: list[dict[str, Any]] = []
        words = resolved(["mcp", "--config", str(config), "tap", "--json"])
        self._command(f"mcp --config {config} tap &")
        watching = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self._fleet.env(), start_new_session=True
        )
        try:
            # The first heartbeat or answer that it hears would tell that it listens; a question makes sure of one.
            _wait_for_connection(self._fleet, "watch", watching)
            yield seen
        finally:
            watching.send_signal(signal.SIGINT)
            text, _ = watching.communicate(timeout=10)
            seen += _lines(text)

    def _show_traffic(self, traffic: Sequence[dict[str, Any]]) -> None:
        wanted = [line for line in traffic if _is_of_deploy(line)]
        begun_s = wanted[0]["at_s"] if wanted else 0.0
        for line in wanted[:MOST_TRAFFIC]:
            self._say(as_text(line | {"at_s": line["at_s"] - begun_s}), "dim")

    def _remove(self) -> None:
        """Remove all that was made, even when it is interrupted once more."""
        self._say("\nremoving containers, network, processes and files ...", "dim")
        held = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._fleet.close()
        finally:
            signal.signal(signal.SIGINT, held)


def _is_of_deploy(line: dict[str, Any]) -> bool:
    subject = str(line.get("subject", ""))
    return subject.startswith(("mcp.cmd.", "mcp.work.", "mcp.event.")) or ".reply." in subject or ".event." in subject


def _lines(text: bytes) -> list[dict[str, Any]]:
    found = []
    for line in text.decode(errors="replace").splitlines():
        with suppress(ValueError):  # a line that was cut off by the signal
            found.append(json.loads(line))
    return found


def _wait_for_connection(fleet: DemoFleet, name: str, watching: subprocess.Popen[bytes]) -> None:
    """Return when the watcher has heard something; a status question gives it something to hear."""
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    import select

    while watching.poll() is None and time.monotonic() < deadline_s:
        fleet.mcp("status", "--json")
        if watching.stdout and select.select([watching.stdout], [], [], LOOK_EVERY_S)[0]:
            return
    raise AdapterError(f"the demo stops here: {name} hears nothing on the bus", code="demo_failed")


def _page(url: str) -> str:
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2.0) as answer:  # noqa: S310 - an address of our own container
                text: str = answer.read(1000).decode(errors="replace")
                return text
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise AdapterError(
                    f"the demo stops here: nothing answers at {url}: {error}", code="demo_failed"
                ) from error
        time.sleep(LOOK_EVERY_S)


def how_to_go_on(folder: Path, runs_on: str) -> list[str]:
    """Return lines for a shell, as they can be pasted: the service moves away from the node where it runs now."""
    others = [node.name for node in NODES if node.role == "worker" and node.name != runs_on]
    words = program("mcp")
    is_script = len(words) == 1
    first = f"export PATH={shlex.quote(str(Path(words[0]).parent))}:$PATH" if is_script else _function(words)
    lines = [first, f"export XDG_CONFIG_HOME={shlex.quote(str(folder / 'config'))}", f"cd {shlex.quote(str(folder))}"]
    return [*lines, "mcp status", f"mcp deploy web.toml --node {others[0]}", "mcp logs web -f"]


def _function(words: list[str]) -> str:
    """Return what lets a shell know a checkout's `mcp` that was never installed."""
    where = Path(__file__).resolve().parents[2]
    return f'mcp() {{ PYTHONPATH={shlex.quote(str(where))} {shlex.join(words)} "$@"; }}'


# ------------------------------------------------------------------- one at a time


def kept_folder() -> Path:
    """Return where a demo that was left running lies."""
    return Path(tempfile.gettempdir()) / f"mcp-demo-kept-{os.getuid()}"


@contextmanager
def only_one() -> Iterator[None]:
    """Hold the demo for us: two at once would clear away each other's containers.

    Raises:
        Refused: another one runs, or was left running.
    """
    if kept_folder().exists():
        raise Refused("demo_runs", "a demo was left running here", hint="End it and remove everything: mcp demo --stop")
    path = Path(tempfile.gettempdir()) / f"mcp-demo-{os.getuid()}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused("demo_runs", "another demo is running on this machine", hint="Wait for its end.") from error
        yield
    finally:
        os.close(handle)


def stop_kept(out: Output) -> None:
    """End a demo that was left running, and remove everything of it.

    Raises:
        Refused: there is none.
    """
    folder = kept_folder()
    if not folder.exists():
        raise Refused("no_demo", "no demo was left running here")
    for process in Path("/proc").glob("[0-9]*"):
        if _is_of(process, folder):
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGTERM)
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    while any(_is_of(process, folder) for process in Path("/proc").glob("[0-9]*")) and time.monotonic() < deadline_s:
        time.sleep(LOOK_EVERY_S)
    asyncio.run(engine.clean(default_engine_url(), DemoFleet(folder).network, remove_network=True))
    shutil.rmtree(folder, ignore_errors=True)
    if not out.settings.is_json:
        out.say("The demo is ended, and everything it made is gone.")


def _is_of(process: Path, folder: Path) -> bool:
    """Say whether a process is one of the demo's: its command line names a file of the demo's folder."""
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
        is_ours = process.stat().st_uid == os.getuid() and int(process.name) != os.getpid()
    except OSError:
        return False
    inside = os.fsencode(str(folder)) + b"/"
    return is_ours and any(word.startswith(inside) for word in words)


__all__ = ["NODES", "Show", "kept_folder", "stop_kept"]
