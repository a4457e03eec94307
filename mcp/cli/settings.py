"""What the global options and the environment say; they count wherever on the command line they stand."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path  # loading it takes 10 ms, and `mcp --help` needs none


class Settings:
    """The global options; a command reads them, the command line fills them in."""

    def __init__(self) -> None:
        self.config = ""
        """--config; empty: the default of the command."""
        self.is_json = False
        self.is_quiet = False
        self.has_colour = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.timeout_s = 0.0
        """--timeout; 0: not given."""

    @property
    def config_file(self) -> Path:
        """The operator's own file."""
        from pathlib import Path

        if self.config:
            return Path(self.config)
        return config_folder() / "mcp.toml"


def config_folder() -> Path:
    """Return ~/.config/mcp, or where XDG_CONFIG_HOME says."""
    from pathlib import Path

    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not base.startswith("/"):
        base = str(Path("~/.config").expanduser())
    return Path(base) / "mcp"


def home_folder() -> Path:
    """Return where everything of a node lies: MCP_HOME, else /srv/mcp."""
    from pathlib import Path

    return Path(os.environ.get("MCP_HOME") or "/srv/mcp")
