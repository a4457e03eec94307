"""Every command explains itself with an example, from tables that say what the commands say, and starts quickly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from mcp.cli import exits
from mcp.cli import run as cli
from mcp.cli.app import COMMANDS, SECTIONS, Command, mcp

ROOT = Path(__file__).resolve().parents[2]


def every_command() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    ctx = click.Context(mcp)
    for name in mcp.list_commands(ctx):
        command = mcp.get_command(ctx, name)
        assert command is not None
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {verb}": each for verb, each in command.commands.items()}
    return found


ALL = every_command()
LEAVES = {name: command for name, command in ALL.items() if not isinstance(command, click.Group)}


@pytest.mark.parametrize("name", LEAVES)
def test_the_help_of_every_command_has_an_example_that_begins_with_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert "Example:" in said
    command = LEAVES[name]
    assert isinstance(command, Command)
    assert f"mcp {name}" in command.examples[0]


@pytest.mark.parametrize("name", LEAVES)
def test_every_example_can_be_parsed(name: str) -> None:
    command = LEAVES[name]
    assert isinstance(command, Command)
    for example in command.examples:
        words = example.split("#")[0].split(" | ")[-1].split(" > ")[0].split()
        if "$(mcp" in example:
            continue
        words = words[words.index("mcp") + 1 + len(name.split()) :]
        command.make_context(name, words, parent=click.Context(mcp))


def test_the_table_of_commands_says_what_the_commands_say() -> None:
    for name, (_, line) in COMMANDS.items():
        assert (ALL[name].help or "").splitlines()[0].startswith(line.removesuffix(".")), name


def test_every_command_stands_in_one_section() -> None:
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(COMMANDS)


def test_every_command_takes_the_global_options() -> None:
    for name, command in ALL.items():
        options = {option for param in command.params for option in param.opts}
        assert options >= {"--config", "--json", "--quiet", "--no-color", "--timeout"}, name


def loaded_after(*args: str) -> set[str]:
    """Return the modules that a run of the program has loaded when it leaves."""
    script = (
        "import sys\n"
        "from mcp.cli import main, run\n"
        f"code = run.run({list(args)!r})\n"
        "sys.stderr.write(' '.join(sys.modules))\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_help_loads_nothing_that_it_does_not_need() -> None:
    loaded = loaded_after("--help")
    assert "click" in loaded
    assert not loaded & {
        "nats",
        "attr",
        "attrs",
        "msgpack",
        "cattrs",
        "asyncio",
        "rich",
        "mcp.model.messages",
        "aiohttp",
        "ssl",
    }


def test_a_command_speaks_to_the_master_without_the_message_classes() -> None:
    script = "import sys, mcp.cli.status, mcp.cli.session; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    loaded = set(done.stdout.split())
    assert "nats.aio.client" in loaded
    assert not loaded & {"mcp.model.messages", "cattrs", "aiohttp", "nats.js.client", "aiodocker", "cryptography"}


def test_the_page_on_commands_names_every_command_and_exit_code() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for name in LEAVES:
        assert f"`mcp {name}" in page, name
    for code in exits.MEANINGS:
        assert f"| {code} |" in page, code
