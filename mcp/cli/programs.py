"""Where our own programs are, for units, for the demo's child processes, and for the lines that are printed to be typed."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

MODULES = {"mcp": "mcp.cli.main", "mcp-master": "mcp.cli.daemons master", "mcp-agent": "mcp.cli.daemons agent"}
"""What runs a program where no script of it is installed (a checkout that was never installed)."""


def program(name: str) -> list[str]:
    """Return the words that run one of our programs, with absolute paths."""
    for folder in (Path(sys.argv[0]).parent, Path(sys.executable).parent):
        script = folder.absolute() / name
        if script.is_file() and os.access(script, os.X_OK):
            return [str(script)]
    return [sys.executable, "-m", *MODULES[name].split()]


def line(words: list[str]) -> str:
    """Return a command line to be typed."""
    return shlex.join(words)
