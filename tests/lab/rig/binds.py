"""Folders of this machine that every node shows, live: the code under test and the Python that its .venv is made of."""

from __future__ import annotations

from pathlib import Path

from rig.shell import LabError

Bind = tuple[Path, Path]
"""A folder here, and where it is in the nodes."""


def parse_bind(text: str) -> Bind:
    """Read DIR[:DIR].

    Raises:
        LabError: there is no such folder.
    """
    source, _, target = text.partition(":")
    if not Path(source).is_dir():
        raise LabError(f"cannot bind {source}: it is no folder")
    return Path(source).resolve(), Path(target or source).absolute()


def with_python(binds: list[Bind]) -> list[Bind]:
    """Add the Python of every bound .venv that the nodes would not see: pyenv and uv keep theirs in a home folder."""
    found = dict.fromkeys(binds)
    for source, _ in binds:
        for home in python_homes(source / ".venv"):
            found[home.resolve(), home] = None
    return list(found)


def python_homes(venv: Path) -> list[Path]:
    """Return the folders that a virtual environment's interpreter needs, as it names them; none for Debian's own."""
    try:
        lines = (venv / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return []
    named = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    if "home" not in named:
        return []
    homes = [Path(named["home"]).parent, (venv / "bin" / "python3").resolve().parent.parent]
    return [home for home in dict.fromkeys(homes) if home != Path("/") and not home.is_relative_to("/usr")]
