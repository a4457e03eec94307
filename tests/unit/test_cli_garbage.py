"""Whatever is typed ends with an exit code of the table, in a few lines, and never with a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcp.cli import exits
from mcp.cli import run as cli
from mcp.cli.app import COMMANDS

ROOT = Path(__file__).resolve().parents[2]

NOUNS = {"node": ("list", "show", "why", "invite", "remove"), "op": ("list", "show", "cancel"), "bus": ("run",)}
"""Verbs worth fuzzing; what would set something up or print a secret is left out."""

LEFT_OUT = {"init", "operator", "login", "demo"}

ODD = st.sampled_from(
    [
        "", "-", "--", "---", "-x", "--x", "--json", "--timeout", "0", "-1", "nan", "1e999", "\n", "a\nb", "\t", "a\0b", "x" * 5000,
        "\udcff\udcfe", "ü", "..", "/", "/dev/null", "/proc/self/mem", ".toml", "web", "Web", "web!", "'", '"', "$(reboot)",
        "\x1b[2J", "\u202e", "--config", "--config=/nonexistent", "--node", "-f", "-n", "--since", "99999999999999999999d", "-h",
    ]
)  # fmt: skip
WORD = ODD | st.text(max_size=20)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    words: list[str] = []
    name = draw(st.sampled_from(sorted(set(COMMANDS) - LEFT_OUT)) | WORD)
    words.append(name)
    if name in NOUNS:
        words.append(draw(st.sampled_from(NOUNS[name]) | WORD))
    words += draw(st.lists(WORD, max_size=4))
    return draw(st.lists(ODD, max_size=1)) + words


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No fleet, no services, no bus to be run."""
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "MCP_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)


@given(command_lines())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_gives_an_exit_code_and_no_bug(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    if set(words) & LEFT_OUT:
        return
    capsys.readouterr()
    code = cli.run(words)
    said = capsys.readouterr()
    assert code in exits.MEANINGS
    assert "Traceback" not in said.out + said.err
    assert "this is a bug" not in said.out + said.err, words
    assert "\x1b" not in said.out + said.err
    assert said.out or said.err


@pytest.mark.parametrize(
    "words", [(b"status", b"\xff\xfe"), (b"deploy", b"\xff.toml"), (b"\xff",), (b"deploy", b"x" * 100_000)]
)
def test_bytes_that_are_no_text_are_an_argument_like_any_other(words: tuple[bytes, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"mcp.cli.main", *words],
        cwd=ROOT,
        env={"XDG_CONFIG_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == exits.USAGE
    assert b"Traceback" not in done.stderr
    assert done.stderr


def test_a_reader_that_has_gone_ends_the_command_quietly(tmp_path: Path) -> None:
    for stream in ("", " 2>&1"):
        done = subprocess.run(
            ["/bin/bash", "-c", f"{sys.executable} -m mcp.cli.main --help{stream} | true; exit ${{PIPESTATUS[0]}}"],
            cwd=ROOT,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode in (0, exits.OUTPUT_CLOSED)
        assert b"Traceback" not in done.stderr
        assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "> /dev/full", "> /dev/full 2>&1"])
def test_output_that_cannot_be_written_is_no_traceback(redirect: str) -> None:
    done = subprocess.run(
        ["/bin/bash", "-c", f"{sys.executable} -m mcp.cli.main --help {redirect}"],
        cwd=ROOT,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode in exits.MEANINGS
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("args", [["deplyo"], ["node", "lst"]])
def test_a_mistyped_word_is_answered_with_what_was_meant(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(args) == exits.USAGE
    assert "list" in capsys.readouterr().err or args[0] == "deplyo"
