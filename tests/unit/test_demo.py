"""Parts of the demo that need no fleet."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mcp.demo.fleet import NODES, _change_config, _with_key
from mcp.demo.processes import Child, wait_until
from mcp.demo.show import DEFINITION, how_to_go_on
from mcp.model.definition import parse_service
from mcp.model.errors import AdapterError


def test_the_demo_has_a_master_two_workers_and_an_edge() -> None:
    assert [node.role for node in NODES] == ["master", "worker", "worker", "edge"]


def test_its_definition_is_a_definition() -> None:
    assert parse_service(DEFINITION.format(version="v1"), file="web.toml").name == "web"


def test_a_key_is_set_where_it_belongs_and_only_there(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('# head\n[a]\nname = "x"\n[b]\nname = "y"\n')
    _change_config(file, {"a": {"name": "z", "beat_s": 0.5}, "c": {"is_new": True}})
    assert tomllib.loads(file.read_text()) == {
        "a": {"name": "z", "beat_s": 0.5},
        "b": {"name": "y"},
        "c": {"is_new": True},
    }
    assert _with_key("[a]\n", "a", "k", "1") == "[a]\nk = 1\n"


@pytest.mark.parametrize(("runs_on", "goes_to"), [("orion", "hyperborea"), ("hyperborea", "orion")])
def test_a_kept_demo_says_how_to_go_on_in_lines_that_a_shell_takes(runs_on: str, goes_to: str, tmp_path: Path) -> None:
    lines = how_to_go_on(tmp_path, runs_on)
    assert f"mcp deploy web.toml --node {goes_to}" in lines
    script = "\n".join([*lines[:3], "type mcp", "pwd", "mcp --help"])
    done = subprocess.run(
        ["/bin/sh", "-ec", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path) in done.stdout.splitlines()
    assert "mcp deploy" in done.stdout


@pytest.fixture
def child(tmp_path: Path) -> Child:
    script = "import time, sys; print('ready', flush=True); time.sleep(60)"
    return Child("child", [sys.executable, "-c", script], tmp_path / "log", os.environ)


def test_a_child_is_stopped_killed_and_started_again(child: Child) -> None:
    assert (child.pid, child.exit_code) == (0, None)
    for end in (child.stop, child.kill):
        child.start()
        before = child.pid
        child.start()
        assert child.pid == before > 0
        end()
        assert child.pid == 0
        assert child.exit_code is not None
    child.stop()


def test_a_frozen_child_can_be_stopped(child: Child) -> None:
    child.start()
    wait_until("it is there", lambda: "ready" in child.log(), timeout_s=10, child=child)
    child.freeze()
    child.stop()
    assert child.pid == 0


def test_waiting_ends_when_the_child_does_with_its_last_words(tmp_path: Path) -> None:
    child = Child("child", ["/bin/sh", "-c", "echo no such luck; exit 3"], tmp_path / "log", os.environ)
    child.start()
    with pytest.raises(AdapterError, match=r"ended with 3(.|\n)*no such luck"):
        wait_until("never", lambda: False, timeout_s=10, child=child)
    with pytest.raises(AdapterError, match="in vain: never"):
        wait_until("never", lambda: False, timeout_s=0.01)


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    log = tmp_path / "pid"
    script = (
        "import os, sys; from pathlib import Path; from mcp.demo.processes import Child;"
        "c = Child('c', ['/bin/sleep', '60'], Path(sys.argv[1] + '.log'), os.environ); c.start();"
        "Path(sys.argv[1]).write_text(str(c.pid)); os.kill(os.getpid(), 9)"
    )
    parent = Child(
        "parent",
        [sys.executable, "-c", script, str(log)],
        tmp_path / "log",
        {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    parent.start()
    wait_until("the parent is gone", lambda: parent.exit_code is not None, timeout_s=20)
    pid = int(log.read_text())
    wait_until("the child is gone", lambda: not _is_alive(pid), timeout_s=10)


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
