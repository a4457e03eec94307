"""mcp-unpack: a payload as one line of JSON, secrets masked, rubbish described."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.cli.unpack import MASK, line, shown

ROOT = Path(__file__).resolve().parents[2]


@given(
    st.binary(max_size=200), st.sampled_from(["mcp.node.orion.heartbeat", "sealed.work.orion.run_workload", "", "x"])
)
def test_any_bytes_are_one_line_of_json(payload: bytes, subject: str) -> None:
    text = line(subject, payload)
    assert "\n" not in text
    json.loads(text)


def test_a_message_is_shown_as_it_is() -> None:
    assert shown("mcp.node.orion.heartbeat", msgpack.packb({"sequence": 3, "problems": []})) == {
        "sequence": 3,
        "problems": [],
    }


def test_on_a_sealed_lane_only_what_is_known_to_be_harmless_is_shown() -> None:
    spec = {
        "name": "web",
        "components": [{"image": "web:v1", "env": {"PASSWORD": "hunter2", "LEVEL": "info"}, "cmd": ["--key=hunter2"]}],
    }
    text = line("sealed.work.orion.run_workload", msgpack.packb({"service": "web", "spec": spec}))
    assert "hunter2" not in text
    assert "info" not in text
    assert json.loads(text)["spec"]["components"][0]["image"] == "web:v1"


def test_a_key_that_sounds_like_a_secret_is_masked_everywhere() -> None:
    assert shown("mcp.x", msgpack.packb({"token": "mcpj1_x", "valid_s": 300.0})) == {"token": MASK, "valid_s": 300.0}


def test_nothing_is_null() -> None:
    assert line("mcp.x", b"") == "null"


def run(payload: bytes, *args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "mcp.cli.unpack", *args],
        input=payload,
        cwd=ROOT,
        capture_output=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("payload", [b"\xc1", b"\x93", b"\x81\x01\x02", b"\xff" * 50, b"\x91" * 5000, b"\xc7\x00\x05"])
def test_the_program_describes_rubbish_and_exits_0(payload: bytes) -> None:
    done = run(payload, "mcp.x")
    assert (done.returncode, done.stderr) == (0, b"")
    json.loads(done.stdout)


def test_the_program_loads_little() -> None:
    script = "import sys; import mcp.cli.unpack; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert not set(done.stdout.split()) & {"attr", "click", "asyncio", "nats", "mcp.model.messages", "mcp.cli.app"}
