"""Units for systemd: wishing for their neighbours only, and never in the way where systemd keeps its folder to itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mcp.cli import units
from mcp.cli.init import UNITS
from mcp.cli.programs import MODULES, program


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "system"
    made.mkdir()
    monkeypatch.setattr(units, "FOLDER", made)
    monkeypatch.setattr(units, "RUNNING", tmp_path)
    return made


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that writes down what it is asked; it fails when there is a file named `fail` beside it."""
    said = tmp_path / "asked"
    script = tmp_path / "bin" / "systemctl"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\necho "$@" >>{said}\n[ ! -e {tmp_path}/fail ] || {{ echo "Job failed." >&2; exit 1; }}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    return said


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_wishes_for_its_neighbours_and_is_always_started_again(unit: str) -> None:
    text = units.unit_text(unit, Path("/srv/mcp"))
    assert not any(word in text for word in ("Requires", "PartOf", "BindsTo"))
    assert {"Restart=always", "RestartSec=1"} <= set(text.splitlines())
    start = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert start.startswith("ExecStart=/")
    assert start.endswith(f"--config /srv/mcp/{unit}.toml")


def test_a_home_with_odd_characters_survives_systemds_quoting() -> None:
    assert '"/srv/my 100%% $$HOME/mcp-agent.toml"' in units.unit_text("mcp-agent", Path("/srv/my 100% $HOME"))


def test_units_are_written_and_started(folder: Path, systemctl: Path, tmp_path: Path) -> None:
    assert units.set_up(UNITS, tmp_path / "home", has_systemd=True) == []
    assert sorted(path.name for path in folder.iterdir()) == [f"{unit}.service" for unit in sorted(UNITS)]
    assert systemctl.read_text().splitlines() == [
        "daemon-reload",
        "enable --now mcp-bus.service mcp-master.service mcp-agent.service",
    ]


def test_a_systemd_that_fails_is_told_with_the_command_to_repeat(folder: Path, systemctl: Path, tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    said = units.set_up(UNITS, tmp_path / "home", has_systemd=True)
    assert "Job failed." in said[0]
    assert said[1].strip().startswith("systemctl enable --now")


def is_commands(said: Sequence[str]) -> bool:
    return [line.split(" --config ")[0].split("/")[-1] for line in said[1:]] == [
        "mcp bus run",
        "mcp-master",
        "mcp-agent",
    ]


def test_a_folder_that_cannot_be_written_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "FOLDER", Path("/proc/mcp-read-only"))
    monkeypatch.setattr(units, "program", lambda name: [f"/bin/{name}"])
    home = tmp_path / "home"
    said = units.set_up(UNITS, home, has_systemd=True)
    assert str(home / "units") in said[0]
    assert is_commands(said)
    assert len(list((home / "units").iterdir())) == 3


def test_without_systemd_the_commands_are_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "program", lambda name: [f"/bin/{name}"])
    assert is_commands(units.set_up(UNITS, tmp_path / "home", has_systemd=False))
    monkeypatch.setattr(units, "RUNNING", tmp_path / "none")
    assert is_commands(units.set_up(UNITS, tmp_path / "home", has_systemd=True))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", MODULES)
def test_a_program_is_named_with_an_absolute_path(name: str) -> None:
    assert Path(program(name)[0]).is_absolute()
