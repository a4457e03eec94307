"""What an agent loads: it is small, and starts quickly, because of what it leaves alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcp.bus.init import agent_toml
from mcp.bus.keys import new_key, write_key
from mcp.bus.tls import new_authority

ROOT = Path(__file__).resolve().parents[2]
START_S = 30.0

NEEDED_BY_OTHERS = {
    "aiodocker", "aiohttp", "argparse", "click", "cryptography", "difflib", "email", "encodings.idna", "importlib.metadata",
    "mcp.actors.master", "mcp.actors.workload", "mcp.adapters.docker", "mcp.bus.enrolment", "mcp.config.bus", "mcp.config.cli",
    "mcp.config.master", "mcp.model.definition", "mcp.model.fleet", "mcp.model.master", "mcp.model.operator_messages",
    "mcp.model.toml_lines", "mcp.model.views", "mcp.model.workload", "nacl.bindings", "nats.js", "nkeys", "tempfile", "zipfile",
}  # fmt: skip

AGENT = """
import sys
from mcp.cli.daemons import agent
try:
    agent()
finally:
    print(*sys.modules)
"""


@contextmanager
def agent_that_connects(home: Path) -> Iterator[subprocess.Popen[str]]:
    """Give an agent without an engine that has just begun to speak TLS with us, which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as bus:
        bus.settimeout(START_S)
        write_key(home / "keys" / "agent.nkey", new_key())
        (home / "keys" / "bus-ca.pem").write_text(new_authority("rift", 1_800_000_000.0).pem)
        file = home / "mcp-agent.toml"
        file.write_text(agent_toml(home, "svc", "edge", "127.0.0.1", bus=bus.getsockname()))
        words = [sys.executable, "-c", AGENT, "--config", str(file)]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ) as agent:
            try:
                connection, _ = bus.accept()
                with connection:
                    connection.settimeout(START_S)
                    assert connection.recv(1)
                    yield agent
            finally:
                agent.kill()


def test_an_agent_without_an_engine_loads_nothing_that_only_others_need(tmp_path: Path) -> None:
    with agent_that_connects(tmp_path) as agent:
        agent.send_signal(signal.SIGTERM)
        told, _ = agent.communicate(timeout=START_S)
    loaded = set(told.split())
    assert "mcp.actors.agent" in loaded
    assert not loaded & NEEDED_BY_OTHERS
