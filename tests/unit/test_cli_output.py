"""What is printed: nothing that a terminal obeys, tables that fit, figures for people."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.cli import exits, output
from mcp.cli.deploy import is_first
from mcp.cli.output import Output, Progress, age, cut, safe, safe_lines, size, took, width_of
from mcp.cli.settings import Settings
from mcp.model import errors


@given(st.text())
def test_text_from_elsewhere_becomes_one_line_without_control_characters(text: str) -> None:
    shown = safe(text)
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in shown)
    assert not set(shown) & set("\u202e\u202d\u2066\u2067\u2068\u2069\u200f\u200e\u2028\u2029")


@given(st.text())
def test_lines_keep_their_breaks_and_nothing_else(text: str) -> None:
    assert not any((ord(c) < 0x20 and c != "\n") or 0x7F <= ord(c) < 0xA0 for c in safe_lines(text))


@given(st.text(), st.integers(min_value=1, max_value=40))
def test_a_cut_text_is_never_wider_than_asked_for(text: str, columns: int) -> None:
    assert width_of(cut(safe(text), columns)) <= columns


def test_figures_are_for_people() -> None:
    assert [age(s) for s in (None, 0.4, 119, 120, 7200, 200_000)] == ["never", "0 s", "119 s", "2 min", "2 h", "2 d"]
    assert [size(b) for b in (None, 5 << 20, 3 << 29)] == ["?", "5 MiB", "1.5 GiB"]
    assert [took(s) for s in (0.31, 125)] == ["0.3 s", "2 min 5 s"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called by the test itself: pytest sets its own streams between a fixture and its test."""
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return made


def test_a_table_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    Output(Settings()).table(("NODE", "WHY"), [("orion", "because " * 20), ("svc", "x")])
    rows = terminal.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()
    assert len(rows) == 3
    for row in rows:
        assert width_of(row) <= 40


def test_no_color_means_no_codes_but_the_words_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    Output(Settings()).say("running", "green")
    assert terminal.getvalue() == "\x1b[32mrunning\x1b[0m\n"
    terminal.truncate(0)
    terminal.seek(0)
    monkeypatch.setenv("NO_COLOR", "1")
    Output(Settings()).say("running", "green")
    assert terminal.getvalue() == "running\n"


def step(state: str, detail: str = "") -> dict[str, Any]:
    return {"step": "run", "node": "orion", "state": state, "seconds": 0.25, "detail": detail}


def test_progress_moves_on_a_terminal_and_leaves_one_line_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    progress = Progress(Output(Settings()), "deploying web")
    progress.step(step("running", "pulling\x1b[2J"))
    progress.turn()
    progress.step(step("done"))
    progress.end()
    said = terminal.getvalue()
    assert "\x1b[2J" not in said
    assert said.count("✓ run") == 1
    assert "⠙" in said


def test_progress_without_a_terminal_is_one_plain_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(Output(Settings()), "deploying web")
    for state in ("running", "running", "done", "done"):
        progress.step(step(state))
        progress.turn()
    progress.end()
    said = capsys.readouterr()
    assert said.out == ""
    assert "\r" not in said.err
    assert len(said.err.splitlines()) == 2


def test_quiet_keeps_progress_and_notes_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings()
    settings.is_quiet = True
    out = Output(settings)
    Progress(out, "deploying web").step(step("done"))
    out.note("by the way")
    out.complain("cannot", "do this")
    assert capsys.readouterr().err == "cannot\ndo this\n"


def test_a_closed_stdout_swallows_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    Output(Settings()).say("hello")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BadDefinition("x", file="a"), 2),
        (exits.Usage("x"), 2),
        (errors.Refused("busy", "x"), 3),
        (errors.NotPermitted("x", subject="s"), 3),
        (errors.BusUnreachable("x"), 4),
        (errors.NobodyListens("x"), 4),
        (exits.Unanswered("x"), 4),
        (errors.NoAnswer("x"), 5),
        (errors.AdapterError("x"), 1),
        (errors.McpError("x"), 1),
        (errors.Refused("internal", "x"), 1),
    ],
)
def test_each_error_has_its_exit_code(error: errors.McpError, code: int) -> None:
    assert exits.code_of(error) == code
    assert code in exits.MEANINGS


def test_every_outcome_a_master_may_tell_has_an_exit_code() -> None:
    from typing import get_args

    from mcp.model.operator_messages import Outcome

    assert set(exits.OUTCOMES) == set(get_args(Outcome))


def test_facts_stand_in_one_column() -> None:
    assert output.facts({"a": 1, "long": "x\n"}) == "a:    1\nlong: x\\n"


def test_columns_that_can_be_spared_go_before_anything_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    Output(Settings()).table(
        ("NODE", "HEALTH", "LOAD", "SEEN"), [("hyperborea", "healthy", "x" * 20, "4 s ago")], spare=("LOAD",)
    )
    assert [row.split() for row in terminal.getvalue().splitlines()] == [
        ["NODE", "HEALTH", "SEEN"],
        ["hyperborea", "healthy", "4", "s", "ago"],
    ]


def test_a_plan_for_a_first_generation_is_known_from_its_steps() -> None:
    def plan(generation: int, *differences: str) -> dict[str, Any]:
        steps = [{"step": "pull", "detail": ""}, {"step": "run", "detail": f"generation {generation}: web"}]
        return {"steps": steps, "differences": differences}

    assert is_first(plan(1))
    assert not is_first(plan(2))
    assert not is_first(plan(1, "components[0].image: web:v1 -> web:v2"))
    assert not is_first({"steps": ()})
