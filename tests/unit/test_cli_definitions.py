"""Where definitions are found, and what is said when they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcp.cli.definitions import MAX_FILE_BYTES, read_definitions
from mcp.cli.exits import Usage
from mcp.model.errors import BadDefinition

WEB = 'name = "NAME"\n[[components]]\nname = "web"\nimage = "localhost/web:v1"\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    services = tmp_path / "services"
    services.mkdir()
    (services / "web.toml").write_text(WEB.replace("NAME", "web"))
    monkeypatch.chdir(tmp_path)
    return services


def test_a_name_is_looked_up_in_the_folder_of_services(folder: Path) -> None:
    (found,) = read_definitions(("web",), folder)
    assert (found.spec.name, found.file) == ("web", str(folder / "web.toml"))
    assert not found.has_secrets


def test_a_path_is_a_path(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "api.toml").write_text(WEB.replace("NAME", "api") + 'env = ["TOKEN=x"]\n')
    for argument in ("api.toml", "./api.toml", str(tmp_path / "api.toml")):
        (found,) = read_definitions((argument,), folder)
        assert found.spec.name == "api"
        assert found.has_secrets


@pytest.mark.parametrize("argument", ["nosuch", "./nosuch.toml", "services", "a" * 300, "x/\udcff"])
def test_what_is_not_there_is_named_with_where_it_was_looked_for(argument: str, folder: Path) -> None:
    with pytest.raises(BadDefinition):
        read_definitions((argument,), folder)


def test_a_missing_name_is_answered_with_those_that_are_there(folder: Path) -> None:
    with pytest.raises(BadDefinition) as caught:
        read_definitions(("nosuch",), folder)
    assert caught.value.hint == "There are: web."


@pytest.mark.parametrize("arguments", [(), ("",), ("a\0b",), ("web", "web"), ("web", "services/web.toml")])
def test_nothing_and_the_same_twice_cannot_be_meant(arguments: tuple[str, ...], folder: Path) -> None:
    with pytest.raises(Usage):
        read_definitions(arguments, folder)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * (MAX_FILE_BYTES + 1), b"", b"name = ", b"\0"])
def test_a_file_that_is_no_definition_is_a_bad_definition(content: bytes, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.toml").write_bytes(content)
    with pytest.raises(BadDefinition) as caught:
        read_definitions(("odd.toml",), folder)
    assert "odd.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "reason"), [("/dev/null", "is empty"), (".", "is a folder"), ("missing.toml", "is not there")]
)
def test_what_cannot_be_a_definition_is_answered_with_what_to_give(argument: str, reason: str, folder: Path) -> None:
    with pytest.raises(BadDefinition) as caught:
        read_definitions((argument,), folder)
    assert reason in str(caught.value)
    assert caught.value.hint
