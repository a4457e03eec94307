"""systemd units for bus, master and agent; where systemd does not run, or keeps its folder to itself, the commands instead."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from mcp.cli.programs import line, program
from mcp.model.errors import AdapterError

FOLDER = Path("/etc/systemd/system")
RUNNING = Path("/run/systemd/system")
"""Is there when systemd is this machine's init."""

SYSTEMCTL_TIMEOUT_S = 60.0

DESCRIPTIONS = {"mcp-bus": "MCP bus (nats-server)", "mcp-master": "MCP master", "mcp-agent": "MCP agent"}
AFTER = {
    "mcp-bus": ("network-online.target",),
    "mcp-master": ("network-online.target", "mcp-bus.service"),
    "mcp-agent": ("network-online.target", "mcp-bus.service", "docker.service"),
}
PROGRAMS = {"mcp-bus": ("mcp", "bus", "run"), "mcp-master": ("mcp-master",), "mcp-agent": ("mcp-agent",)}


def command_of(unit: str, home: Path) -> list[str]:
    """Return the words that run what a unit runs."""
    name, *words = PROGRAMS[unit]
    return [*program(name), *words, "--config", str(home / f"{unit}.toml")]


def unit_text(unit: str, home: Path) -> str:
    """Return a unit. It only wishes for its neighbours (Wants, After): when one of them dies, the others live on."""
    neighbours = [name for name in AFTER[unit] if name != "docker.service"]
    return f"""\
[Unit]
Description={DESCRIPTIONS[unit]}
Wants={" ".join(neighbours)}
After={" ".join(AFTER[unit])}
StartLimitIntervalSec=0

[Service]
ExecStart={" ".join(_quoted(word) for word in command_of(unit, home))}
Restart=always
RestartSec=1
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
"""


def _quoted(word: str) -> str:
    """Quote a word for ExecStart."""
    word = word.replace("%", "%%").replace("$", "$$")
    if any(c in word for c in " \t\"'\\;"):
        return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return word


def set_up(units: Sequence[str], home: Path, *, has_systemd: bool) -> list[str]:
    """Write and start the units; return what is left for the operator to do, line by line."""
    from mcp.bus.files import write_whole

    commands = [line(command_of(unit, home)) for unit in units]
    if not (has_systemd and RUNNING.is_dir()):
        return ["Start, each in its own terminal or under a supervisor of yours:", *_indented(commands)]
    try:
        for unit in units:
            write_whole(FOLDER / f"{unit}.service", unit_text(unit, home))
    except AdapterError as error:
        # NixOS keeps that folder to itself: the units lie in our own, to be named in its configuration.
        folder = home / "units"
        for unit in units:
            write_whole(folder / f"{unit}.service", unit_text(unit, home))
        return [
            f"{error.reason}. The units lie in {folder}; name them in this machine's own configuration. Until then:",
            *_indented(commands),
        ]
    return _start(units)


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {each}" for each in lines]


def _start(units: Sequence[str]) -> list[str]:
    enable = ["systemctl", "enable", "--now", *(f"{unit}.service" for unit in units)]
    try:
        for words in (["systemctl", "daemon-reload"], enable):
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SYSTEMCTL_TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()
                return [
                    f"systemd did not start them ({said[-1] if said else done.returncode}). Look, then:",
                    f"  {line(enable)}",
                ]
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"systemctl could not be run ({error}). Then:", f"  {line(enable)}"]
    return []
