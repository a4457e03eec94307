"""Commands against a fleet with a real engine: what an operator sees when things fail, end, or are interrupted."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from mcp.demo.fleet import DemoFleet, resolved
from mcp.demo.image import crasher_image, load, script_image, web_image
from mcp.demo.processes import wait_until
from tests.live.engine import PrivateEngine, private_engine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

SERVICE = """\
name = "{name}"
[[components]]
name = "{name}"
image = "{image}"
[components.health]
path = "/healthz"
interval = "100ms"
[[components.routes]]
port = 8443
"""
SLOW = """#!/bin/sh
i=0
while [ ! -e /tmp/go ] && [ $i -lt 40 ]; do i=$((i+1)); sleep 0.1; done
mkdir -p /www && echo ok >/www/healthz
httpd -f -p "$PORT" -h /www
"""
STUCK = """#!/bin/sh
exec sleep 600
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[PrivateEngine]:
    with private_engine() as made:
        yield made


@pytest.fixture(scope="module")
def fleet(engine: PrivateEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoFleet]:
    with DemoFleet(tmp_path_factory.mktemp("fleet"), engine_url=engine.url, network="mcptest") as made:
        images = [
            web_image("v1"),
            web_image("v2"),
            crasher_image(),
            script_image("localhost/slow:v1", SLOW),
            script_image("localhost/stuck:v1", STUCK),
        ]
        asyncio.run(load(engine.url, images))
        for name, image in (("web", "web:v1"), ("crash", "crasher:v1"), ("slow", "slow:v1"), ("stuck", "stuck:v1")):
            (made.folder / f"{name}.toml").write_text(SERVICE.format(name=name, image=f"localhost/{image}"))
        yield made


@pytest.fixture(autouse=True)
def nothing_is_deployed(fleet: DemoFleet) -> None:
    """What a test before has left, when it failed, is not this one's."""
    for row in fleet.json("status")["operations"]:
        fleet.mcp("op", "show", row["op"], "--follow")
    left = [row["name"] for row in fleet.json("status")["services"]]
    assert not left or fleet.mcp("undeploy", *left).returncode == 0


def file(fleet: DemoFleet, name: str) -> str:
    return str(fleet.folder / f"{name}.toml")


def started(fleet: DemoFleet, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        resolved(["mcp", *args]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=fleet.env(), text=True
    )


def operation_of(fleet: DemoFleet, service: str) -> Any:
    rows = fleet.json("op", "list")["operations"]
    return next((row for row in rows if row["service"] == service), None)


def test_a_service_is_planned_deployed_unchanged_replaced_and_removed(fleet: DemoFleet, engine: PrivateEngine) -> None:
    plan = fleet.json("plan", file(fleet, "web"))
    assert plan["changes"] is True
    done = fleet.json("deploy", file(fleet, "web"), "--world", plan["world"])["results"][0]
    assert (done["outcome"], done["node"]) == ("deployed", plan["node"])
    assert fleet.json("deploy", file(fleet, "web"))["results"][0]["outcome"] == "unchanged"
    assert fleet.mcp("plan", file(fleet, "web")).returncode == 0
    stale = fleet.mcp("deploy", file(fleet, "web"), "--node", "rift", "--world", plan["world"])
    assert stale.returncode == 3
    (fleet.folder / "web2.toml").write_text(SERVICE.format(name="web", image="localhost/web:v2"))
    assert fleet.mcp("deploy", file(fleet, "web2")).returncode == 0
    (row,) = fleet.json("ps")["containers"]
    with urllib.request.urlopen(f"http://{row['ports']['']}/", timeout=5) as page:
        assert page.read().startswith(b"web v2")
    assert fleet.mcp("logs", "web", "-n", "1").stdout.startswith("web v2: listening")
    assert fleet.mcp("undeploy", "web").returncode == 0
    assert engine.docker("ps", "--all", "--quiet") == ""


def test_a_failed_deploy_shows_the_containers_last_words(fleet: DemoFleet) -> None:
    done = fleet.mcp("deploy", file(fleet, "crash"))
    assert done.returncode == 1
    assert "fatal: no database" in done.stderr
    assert "exit code 1" in done.stderr
    assert fleet.json("ps")["containers"] == []


@pytest.mark.parametrize("delay_s", [0.0, 0.3, 1.0])
def test_ctrl_c_leaves_the_operation_running_and_says_how_to_go_on(delay_s: float, fleet: DemoFleet) -> None:
    deploy = started(fleet, "deploy", file(fleet, "slow"))
    wait_until(
        "the deploy is taken on", lambda: (operation_of(fleet, "slow") or {}).get("state") == "running", timeout_s=20
    )
    time.sleep(delay_s)
    begun_s = time.monotonic()
    deploy.send_signal(signal.SIGINT)
    out, err = deploy.communicate(timeout=10)
    assert time.monotonic() - begun_s < 1.0
    op = operation_of(fleet, "slow")["op"]
    assert (deploy.returncode, out) == (130, "")
    assert f"still running as op {op}" in err
    followed = fleet.mcp("op", "show", op, "--follow", "--json")
    assert (followed.returncode, json.loads(followed.stdout)["outcome"]) == (0, "deployed")
    assert fleet.mcp("undeploy", "slow").returncode == 0


def test_a_cancelled_operation_is_undone_and_its_command_says_so(fleet: DemoFleet) -> None:
    deploy = started(fleet, "deploy", file(fleet, "stuck"))
    wait_until(
        "the deploy is taken on", lambda: (operation_of(fleet, "stuck") or {}).get("state") == "running", timeout_s=20
    )
    busy = fleet.mcp("deploy", file(fleet, "stuck"))
    op = operation_of(fleet, "stuck")["op"]
    assert (busy.returncode, op in busy.stderr) == (3, True)
    assert fleet.mcp("op", "cancel", op).returncode == 0
    _, err = deploy.communicate(timeout=60)
    assert (deploy.returncode, "cancelled" in err) == (1, True)
    assert fleet.json("ps")["containers"] == []


def test_a_deploy_survives_its_terminal(fleet: DemoFleet) -> None:
    deploy = started(fleet, "deploy", file(fleet, "slow"))
    wait_until(
        "the deploy is taken on", lambda: (operation_of(fleet, "slow") or {}).get("state") == "running", timeout_s=20
    )
    deploy.kill()
    deploy.communicate(timeout=10)
    wait_until("it ends by itself", lambda: operation_of(fleet, "slow")["outcome"] == "deployed", timeout_s=60)
    assert fleet.mcp("undeploy", "slow").returncode == 0


def test_a_deploy_finds_its_operation_again_after_the_master_was_killed(fleet: DemoFleet) -> None:
    deploy = started(fleet, "deploy", file(fleet, "slow"), "--json")
    wait_until("the container starts", lambda: "slow" in str(fleet.json("status")["services"]), timeout_s=20)
    fleet.master.kill()
    fleet.start_master()
    out, _ = deploy.communicate(timeout=90)
    assert json.loads(out)["results"][0]["outcome"] == "deployed"
    assert deploy.returncode == 0
    assert fleet.mcp("undeploy", "slow").returncode == 0


def test_followed_logs_end_with_ctrl_c_without_a_word(fleet: DemoFleet) -> None:
    assert fleet.mcp("deploy", file(fleet, "web")).returncode == 0
    logs = started(fleet, "logs", "web", "-f")
    assert logs.stdout is not None
    assert logs.stdout.readline().startswith("web v1")
    begun_s = time.monotonic()
    logs.send_signal(signal.SIGINT)
    _, err = logs.communicate(timeout=10)
    assert time.monotonic() - begun_s < 1.0
    assert (logs.returncode, err) == (130, "")


def test_followed_logs_end_when_the_containers_do(fleet: DemoFleet) -> None:
    assert fleet.mcp("deploy", file(fleet, "web")).returncode == 0
    logs = started(fleet, "logs", "web", "-f")
    assert logs.stdout is not None
    logs.stdout.readline()
    assert fleet.mcp("stop", "web").returncode == 0
    out, err = logs.communicate(timeout=20)
    assert "told to stop" in out
    assert (logs.returncode, "exit code 0" in err or "exited with code 0" in err) == (0, True), err
    assert fleet.mcp("undeploy", "web").returncode == 0
