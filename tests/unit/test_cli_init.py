"""Parts of setting up that need no bus."""

from __future__ import annotations

import stat
from pathlib import Path

from mcp.cli.daemons import _remove_empty
from mcp.cli.init import _back_up


def test_a_login_that_is_replaced_is_kept_beside_it_and_private(tmp_path: Path) -> None:
    file = tmp_path / "mcp.toml"
    assert _back_up(file, "new") == ""
    file.write_text("old\n")
    assert _back_up(file, "old") == ""
    backup = Path(_back_up(file, "new"))
    assert (backup.name, backup.read_text()) == ("mcp.toml.bak", "old\n")
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600


def test_a_join_in_vain_removes_its_folders_unless_something_lies_there(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "keys").mkdir(parents=True)
    _remove_empty([home / "keys", home])
    assert not home.exists()
    (home / "keys").mkdir(parents=True)
    (home / "keys" / "agent.nkey").touch()
    _remove_empty([home / "keys", home])
    assert (home / "keys" / "agent.nkey").exists()
