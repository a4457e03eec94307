"""Times that people write, and lines put in order."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.cli.exits import Usage
from mcp.cli.logs import MOST_LINES, WINDOW_S, Merger, is_closed, seconds_since, stamp

NOW_S = datetime(2026, 1, 2, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172_800), ("5min", 300),
        ("2026-01-01T23:00:00Z", 3600), ("2026-01-01T23:00:00", 3600), ("2026-01-02T00:00:00+01:00", 3600), ("2026-01-01", 86_400),
    ],
)  # fmt: skip
def test_since_takes_lengths_and_points_in_time(text: str, seconds: float) -> None:
    assert seconds_since(text, NOW_S) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "10", "-5m", "0s", "nanm", "infd", "1e300d", "soon", "2027-01-01", "99999-01-01", "\0"]
)
def test_since_refuses_what_is_no_time_or_to_come(text: str) -> None:
    with pytest.raises(Usage):
        seconds_since(text, NOW_S)


@given(st.text(max_size=30))
def test_since_never_fails_in_another_way(text: str) -> None:
    with suppress(Usage):
        assert seconds_since(text, NOW_S) > 0


def line(at: str, text: str = "") -> dict[str, Any]:
    return {"at": at, "text": text or at}


def texts(lines: list[dict[str, Any]]) -> list[str]:
    return [each["text"] for each in lines]


def test_stamps_sort_whatever_the_length_of_their_fraction() -> None:
    written = ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00.1Z", "2026-01-01T00:00:00.25Z", "2026-01-01T00:00:01Z"]
    stamps = [stamp(line(each)) for each in written]
    assert sorted(stamps) == stamps


def test_what_was_printed_in_the_past_is_put_in_order_at_the_end() -> None:
    merger = Merger(is_followed=False, is_alone=False)
    for each in ("3", "1", "2"):
        merger.take(line(each), 0.0)
    assert merger.ready(100.0) == []
    assert texts(merger.ready(100.0, is_over=True)) == ["1", "2", "3"]


def test_a_followed_line_waits_a_moment_for_older_ones() -> None:
    merger = Merger(is_followed=True, is_alone=False)
    merger.take(line("2"), 0.0)
    merger.take(line("1"), 0.1)
    assert merger.ready(0.2) == []
    assert texts(merger.ready(0.1 + WINDOW_S)) == ["1", "2"]


def test_a_single_container_is_printed_at_once_in_its_own_order() -> None:
    merger = Merger(is_followed=True, is_alone=True)
    merger.take(line("1"), 0.0)
    assert texts(merger.ready(0.0)) == ["1"]


def test_of_very_many_lines_the_older_half_is_printed_first() -> None:
    merger = Merger(is_followed=False, is_alone=False)
    for i in range(MOST_LINES + 1):
        merger.take(line(f"{i:09d}"), 0.0)
    assert texts(merger.ready(0.0))[0] == "000000000"
    assert len(merger.ready(0.0, is_over=True)) == MOST_LINES // 2 + 1


@given(st.lists(st.integers(0, 99)))
def test_no_line_is_lost(numbers: list[int]) -> None:
    merger = Merger(is_followed=True, is_alone=False)
    got: list[dict[str, Any]] = []
    for i, number in enumerate(numbers):
        merger.take(line(f"{number:02d}"), i * 0.1)
        got += merger.ready(i * 0.1)
    got += merger.ready(0.0, is_over=True)
    assert sorted(texts(got)) == sorted(f"{number:02d}" for number in numbers)


def test_a_pipe_that_nobody_reads_any_more_is_noticed_without_writing_to_it() -> None:
    reads, writes = os.pipe()
    with os.fdopen(writes, "w") as stream:
        assert not is_closed(stream)
        os.close(reads)
        assert is_closed(stream)
    assert not is_closed(stream)
    assert not is_closed(None)
