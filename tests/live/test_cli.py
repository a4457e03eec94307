"""The commands as processes of their own, on a fleet of real processes without container engines."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcp.demo.fleet import NODES, DemoFleet, resolved
from mcp.demo.processes import wait_until

WEB = 'name = "web"\n[[components]]\nname = "web"\nimage = "localhost/web:v1"\n'

SOON_S = 4.0
"""The promise is 2 s on a machine with nothing else to do; tests run on busy ones."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoFleet]:
    with DemoFleet(tmp_path_factory.mktemp("fleet")) as made:
        (made.folder / "web.toml").write_text(WEB)
        yield made


def operator(fleet: DemoFleet, name: str, role: str) -> str:
    return str(fleet.log_in(name, role, fleet.folder / f"{name}.toml"))


def test_four_nodes_have_joined_with_their_roles(fleet: DemoFleet) -> None:
    rows = {row["name"]: (row["role"], row["health"], row["address"]) for row in fleet.json("node", "list")["nodes"]}
    assert rows == {node.name: (node.role, "healthy", node.address) for node in NODES}


def test_an_invitation_is_one_line_on_stdout_and_works_once(fleet: DemoFleet, tmp_path: Path) -> None:
    invited = fleet.mcp("node", "invite", "extra")
    assert invited.stdout.count("\n") == 1
    line = [*invited.stdout.split(), "--home", str(tmp_path / "one"), "--address", "127.0.1.9", "--no-systemd"]
    assert fleet.run(line).returncode == 0
    again = subprocess.run(
        resolved([*line[:3], "--home", str(tmp_path / "two"), "--no-systemd"]),
        capture_output=True, text=True, env=fleet.env(), timeout=30, check=False,
    )  # fmt: skip
    assert again.returncode == 3
    assert "Traceback" not in again.stderr
    assert "mcp node invite" in again.stderr
    assert stat.S_IMODE((tmp_path / "one" / "keys" / "agent.nkey").stat().st_mode) == 0o600
    removed = fleet.mcp("node", "remove", "extra", "--force")
    assert removed.returncode == 0
    assert "extra" not in [row["name"] for row in fleet.json("node", "list")["nodes"]]


@pytest.mark.parametrize(
    "token", ["", "x", "mcpj1_", "mcpj9_100.64.0.1:4222_AAAA", "mcpj1_100.64.0.1:4222_AAAA", "\u202e"]
)
def test_a_damaged_token_is_refused_in_words(token: str, fleet: DemoFleet, tmp_path: Path) -> None:
    done = subprocess.run(
        resolved(["mcp-agent", "join", token, "--home", str(tmp_path)]),
        capture_output=True, text=True, env=fleet.env(), timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "keys").exists()


def test_a_second_init_refuses_and_changes_nothing(fleet: DemoFleet) -> None:
    home = fleet.home("rift")
    before = {path: path.read_bytes() for path in home.rglob("*.toml")}
    done = fleet.mcp("init", "--name", "rift", "--address", "127.0.1.1", "--home", str(home), "--no-systemd")
    assert done.returncode == 3
    assert {path: path.read_bytes() for path in home.rglob("*.toml")} == before


@pytest.mark.parametrize(
    ("name", "address", "code"),
    [("Rift", "127.0.1.1", 3), ("master", "127.0.1.1", 3), ("rift", "0.0.0.0", 2), ("rift", "x", 2)],
)
def test_init_checks_name_and_address_before_it_writes(
    name: str, address: str, code: int, fleet: DemoFleet, tmp_path: Path
) -> None:
    done = fleet.mcp("init", "--name", name, "--address", address, "--home", str(tmp_path / "new"), "--no-systemd")
    assert done.returncode == code
    assert not (tmp_path / "new").exists()


def test_a_file_with_an_operators_key_is_private_although_a_shell_made_it(fleet: DemoFleet, tmp_path: Path) -> None:
    file = tmp_path / "eve.mcp"
    with file.open("wb") as out:
        words = resolved(["mcp", "operator", "add", "eve", "--home", str(fleet.home("rift"))])
        subprocess.run(words, stdout=out, stderr=subprocess.DEVNULL, env=fleet.env(), timeout=30, check=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    config = tmp_path / "eve.toml"
    assert fleet.mcp("--config", str(config), "login", str(file)).returncode == 0
    assert stat.S_IMODE(config.stat().st_mode) == 0o600


def on_terminal(words: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Run a command on a terminal and return its exit code and all that it showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(resolved(words), stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    try:
        while select.select([ours], [], [], 30)[0]:
            shown += os.read(ours, 4096)
    except OSError:
        pass  # the other end is closed
    os.close(ours)
    return process.wait(30), shown.decode(errors="replace")


def test_a_secret_is_not_printed_to_a_terminal(fleet: DemoFleet) -> None:
    code, shown = on_terminal(["mcp", "operator", "add", "mallory", "--home", str(fleet.home("rift"))], fleet.env())
    assert code == 2
    assert "seed" not in shown
    listed = fleet.json("operator", "list", "--home", str(fleet.home("rift")))
    assert "mallory" not in [row["name"] for row in listed["operators"]]


def test_a_terminal_gets_colours_unless_it_wants_none(fleet: DemoFleet) -> None:
    env = fleet.env() | {"TERM": "xterm"}
    env.pop("NO_COLOR", None)
    assert "\x1b[32mhealthy\x1b[0m" in on_terminal(["mcp", "node", "list"], env)[1]
    assert "\x1b[" not in on_terminal(["mcp", "node", "list", "--no-color"], env)[1]
    assert "\x1b[" not in on_terminal(["mcp", "node", "list"], env | {"NO_COLOR": "1"})[1]


def test_logging_in_to_another_fleet_wants_force(fleet: DemoFleet, tmp_path: Path) -> None:
    file = tmp_path / "other.mcp"
    text = (fleet.folder / "kyle.mcp").read_text()
    file.write_text(re.sub(r"BEGIN CERTIFICATE-----\n.", "BEGIN CERTIFICATE-----\nX", text))
    file.chmod(0o600)
    before = fleet.config.read_text()
    refused = fleet.mcp("login", str(file))
    assert (refused.returncode, fleet.config.read_text()) == (3, before)
    assert "--force" in refused.stderr


def test_a_viewer_may_look_and_not_touch(fleet: DemoFleet) -> None:
    config = operator(fleet, "viewer", "viewer")
    assert fleet.mcp("--config", config, "status").returncode == 0
    done = fleet.mcp("--config", config, "stop", "web", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["code"] == "not_permitted"


def test_a_deploy_that_no_node_can_take_tells_of_each_node(fleet: DemoFleet) -> None:
    file = str(fleet.folder / "web.toml")
    for command in ("plan", "deploy"):
        done = fleet.mcp(command, file)
        assert done.returncode == 3, done.stderr
        assert all(node.name in done.stderr for node in NODES)


def test_the_tap_shows_orders_and_answers_to_a_debug_operator_only(fleet: DemoFleet) -> None:
    config = operator(fleet, "watch", "debug")
    words = resolved(["mcp", "--config", config, "tap", "--json", "--for", "60"])
    tap = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=fleet.env(), text=True)
    assert tap.stdout is not None
    try:
        seen = False
        while not seen:
            fleet.mcp("status")
            while select.select([tap.stdout], [], [], 0.05)[0]:
                line = json.loads(tap.stdout.readline())
                seen = seen or line["subject"] == "mcp.cmd.kyle.get_status"
    finally:
        tap.send_signal(signal.SIGINT)
        tap.communicate(timeout=10)
    assert tap.returncode == 130
    assert fleet.mcp("tap", "--for", "5").returncode == 3


def test_completion_knows_the_nodes_and_never_hangs(fleet: DemoFleet) -> None:
    env = fleet.env() | {"COMP_WORDS": "mcp node show ", "COMP_CWORD": "3", "_MCP_COMPLETE": "bash_complete"}
    done = subprocess.run(resolved(["mcp"]), capture_output=True, text=True, env=env, timeout=20, check=False)
    assert {line.split(",")[1] for line in done.stdout.split()} == {node.name for node in NODES}
    fleet.bus.freeze()
    try:
        (next((fleet.folder / "cache" / "mcp").glob("names-*.json"))).unlink()
        begun_s = time.monotonic()
        done = subprocess.run(resolved(["mcp"]), capture_output=True, text=True, env=env, timeout=20, check=False)
        assert time.monotonic() - begun_s < SOON_S
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
    finally:
        fleet.bus.thaw()
    fleet.wait_until_healthy()


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_ctrl_c_ends_a_command_at_any_moment_in_one_line(delay_s: float, fleet: DemoFleet) -> None:
    fleet.master.freeze()
    try:
        process = subprocess.Popen(
            resolved(["mcp", "status"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=fleet.env(), text=True
        )
        # Until our first lines run, a Ctrl-C is Python's own; what follows them brings the first library that is loaded at run time.
        maps = Path(f"/proc/{process.pid}/maps")
        wait_until("the command is loading", lambda: "lib-dynload" in maps.read_text(), timeout_s=10)
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        begun_s = time.monotonic()
        out, err = process.communicate(timeout=10)
        took_s = time.monotonic() - begun_s
    finally:
        fleet.master.thaw()
    assert (process.returncode, out) == (130, "")
    assert took_s < 1.0, "the promise is 0.2 s, on a quiet machine"
    assert err.splitlines() == ["interrupted: nothing was started"]


def test_no_master_is_told_at_once_and_a_frozen_one_after_a_moment(fleet: DemoFleet) -> None:
    fleet.master.stop()
    try:
        begun_s = time.monotonic()
        done = fleet.mcp("status", "--json")
        assert time.monotonic() - begun_s < SOON_S
        assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (4, "no_master")
        stopped = fleet.mcp("stop", "web")
        assert (stopped.returncode, "mcp-master" in stopped.stderr) == (4, True)
    finally:
        fleet.start_master()
    fleet.wait_until_healthy()
    fleet.master.freeze()
    try:
        done = fleet.mcp("status", "--json")
        assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (4, "no_answer")
    finally:
        fleet.master.thaw()
    fleet.wait_until_healthy()


def test_a_bus_that_is_away_mute_or_another_is_told_within_two_seconds(fleet: DemoFleet, tmp_path: Path) -> None:
    text = fleet.config.read_text()
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        for port, word in ((1, "nothing listens there"), (mute.getsockname()[1], "no answer")):
            config = tmp_path / f"{port}.toml"
            config.write_text(re.sub(r"port = \d+", f"port = {port}", text).replace('"127.0.1.1"', '"127.0.0.1"'))
            config.chmod(0o600)
            begun_s = time.monotonic()
            done = fleet.mcp("--config", str(config), "status")
            assert time.monotonic() - begun_s < SOON_S
            assert (done.returncode, word in done.stderr) == (4, True), done.stderr


def test_a_removed_operator_is_told_that_the_credential_is_wrong(fleet: DemoFleet) -> None:
    config = operator(fleet, "gone", "admin")
    assert fleet.mcp("--config", config, "status").returncode == 0
    removed = fleet.mcp("operator", "remove", "gone", "--home", str(fleet.home("rift")))
    assert removed.returncode == 0
    begun_s = time.monotonic()
    done = fleet.mcp("--config", config, "status")
    assert time.monotonic() - begun_s < SOON_S
    assert done.returncode == 3
    assert "mcp login" in done.stderr


def test_a_daemon_without_its_configuration_says_so_in_a_line(fleet: DemoFleet, tmp_path: Path) -> None:
    for words in (["mcp-master"], ["mcp-agent"], ["mcp", "bus", "run"]):
        done = subprocess.run(
            resolved([*words, "--config", str(tmp_path / "none.toml")]),
            capture_output=True, text=True, env=fleet.env(), timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "none.toml" in done.stderr
        assert len(done.stderr.splitlines()) <= 3


def test_everything_ends_when_all_is_told_to_at_once_with_the_bus(fleet: DemoFleet) -> None:
    children = list(fleet.children.values())
    for child in children:
        os.kill(child.pid, signal.SIGTERM)
    wait_until("all have ended", lambda: all(child.exit_code is not None for child in children), timeout_s=15)
    assert {child.name: child.exit_code for child in children if child.name != "bus"} == {
        child.name: 0 for child in children if child.name != "bus"
    }
    fleet.start_bus()
    fleet.start_master()
    for node in NODES:
        fleet.start_agent(node.name)
    fleet.wait_until_healthy()
