"""The demo itself: it shows everything and leaves nothing, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcp.demo.fleet import resolved
from mcp.demo.processes import wait_until
from tests.live.engine import PrivateEngine, private_engine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def engine() -> Iterator[PrivateEngine]:
    with private_engine() as made:
        yield made


def env_for(engine: PrivateEngine, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "DOCKER_HOST": engine.url,
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }


def is_clean(engine: PrivateEngine, tmp_path: Path) -> bool:
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    ours = [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in _command_line(p)]
    networks = engine.docker("network", "ls", "--format", "{{.Name}}").split()
    return not left and not ours and "mcpdemo" not in networks and engine.docker("ps", "--all", "--quiet") == ""


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_the_demo_shows_everything_and_leaves_nothing(engine: PrivateEngine, tmp_path: Path) -> None:
    done = subprocess.run(
        resolved(["mcp", "demo"]),
        capture_output=True,
        text=True,
        env=env_for(engine, tmp_path),
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for shown in (
        "$ mcp init",
        "$ mcp plan web.toml",
        "web v1, service web",
        "web v2, service web",
        "web unchanged",
        "mcp.work.",
    ):
        assert shown in done.stdout
    assert is_clean(engine, tmp_path)


def test_ctrl_c_in_the_demo_leaves_nothing(engine: PrivateEngine, tmp_path: Path) -> None:
    demo = subprocess.Popen(
        resolved(["mcp", "demo"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env_for(engine, tmp_path),
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if "web deployed" in line:
            break
    demo.send_signal(signal.SIGINT)
    out, _ = demo.communicate(timeout=60)
    assert (demo.returncode, "Traceback" in out) == (130, False)
    wait_until("nothing is left", lambda: is_clean(engine, tmp_path), timeout_s=20)


def test_a_demo_that_was_kept_can_be_used_and_ended(engine: PrivateEngine, tmp_path: Path) -> None:
    env = env_for(engine, tmp_path)

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(resolved(words), capture_output=True, text=True, env=env | more, timeout=200, check=False)

    kept = run("mcp", "demo", "--keep")
    assert kept.returncode == 0, kept.stderr
    assert run("mcp", "demo").returncode == 3
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    status = run("mcp", "status", "--json", XDG_CONFIG_HOME=str(folder / "config"))
    assert [row["state"] for row in json.loads(status.stdout)["services"]] == ["running"]
    assert run("mcp", "demo", "--stop").returncode == 0
    assert is_clean(engine, tmp_path)
    assert run("mcp", "demo", "--stop").returncode == 3


def test_without_an_engine_the_demo_names_the_remedy(tmp_path: Path) -> None:
    env = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock", "TMPDIR": str(tmp_path)}
    done = subprocess.run(resolved(["mcp", "demo"]), capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 1
    assert "apt-get install docker.io" in done.stderr
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
