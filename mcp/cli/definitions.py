"""Finds and reads the service definitions that a command names."""

from __future__ import annotations

from pathlib import Path

from mcp.cli.exits import Usage
from mcp.cli.settings import config_folder
from mcp.model.definition import parse_service
from mcp.model.errors import BadDefinition
from mcp.model.names import is_service_name
from mcp.model.spec import ServiceSpec
from mcp.model.values import frozen

MAX_FILE_BYTES = 100_000
"""More than a message may hold is no service definition."""

HINT = "Give a file that says what the service is: `mcp deploy ./web.toml`; docs/service-definition.md has every key."


@frozen(kw_only=True)
class Definition:
    """A definition and where it was found."""

    argument: str
    file: str
    spec: ServiceSpec

    @property
    def has_secrets(self) -> bool:
        """Whether its environment may hold some: then it travels on the sealed lane."""
        return any(component.env for component in self.spec.components)


def services_folder(configured: str) -> Path:
    """Return the folder of definitions."""
    return Path(configured).expanduser() if configured else config_folder() / "services"


def read_definitions(arguments: tuple[str, ...], folder: Path) -> list[Definition]:
    """Read them all, before anything is sent.

    Raises:
        BadDefinition: one is not there or wrong, with file and line.
        Usage: none is named, or one twice.
    """
    if not arguments:
        raise Usage("no service is named", hint=f"Name a service of {folder}, or a file: `mcp deploy ./web.toml`.")
    found = [read_definition(argument, folder) for argument in arguments]
    names = [definition.spec.name for definition in found]
    for name in names:
        if names.count(name) > 1:
            raise Usage(f"{name} is named twice")
    return found


def read_definition(argument: str, folder: Path) -> Definition:
    """Read one.

    Raises:
        BadDefinition: it is not there, or wrong.
    """
    path = _find(argument, folder)
    text = _text(path)
    return Definition(argument=argument, file=str(path), spec=parse_service(text, file=str(path)))


def _find(argument: str, folder: Path) -> Path:
    if not argument or "\0" in argument:
        raise Usage(f"{argument!r} names no service and no file")
    by_name = folder / f"{argument}.toml"
    if is_service_name(argument) and _is_file(by_name):
        return by_name
    path = Path(argument)
    if _is_file(path):
        return path
    if is_service_name(argument):
        raise BadDefinition(
            f"is not there, nor a file {argument} in this folder",
            file=str(by_name),
            hint=_known(folder) or f"Write it there, or give a path: `mcp deploy ./{argument}.toml`.",
        )
    raise BadDefinition("is not there", file=str(path)[:200], hint=_known(folder) or HINT)


def _is_file(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or not to be encoded
        return False


def _known(folder: Path) -> str:
    try:
        names = sorted(path.stem for path in folder.glob("*.toml"))
    except OSError:
        names = []
    return f"There are: {', '.join(names)}." if names else ""


def _text(path: Path) -> str:
    if path.is_dir():
        raise BadDefinition("is a folder", file=str(path), hint=HINT)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadDefinition(f"cannot be read: {(error.strerror or str(error)).lower()}", file=str(path)) from error
    if not data.strip():
        raise BadDefinition("is empty", file=str(path), hint=HINT)
    if len(data) > MAX_FILE_BYTES:
        raise BadDefinition(f"is larger than {MAX_FILE_BYTES} bytes", file=str(path))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadDefinition("is not UTF-8 text", file=str(path)) from error
