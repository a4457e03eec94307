"""The tests' own tools: waiting ends as soon as it can, and what may not be skipped fails."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import eventually, soon

ROOT = Path(__file__).resolve().parents[2]


def test_waiting_returns_what_was_seen_as_soon_as_it_is_true() -> None:
    looks = iter([0, None, "", 7, 8])
    assert eventually("a number", lambda: next(looks)) == 7
    assert next(looks) == 8


def test_waiting_in_vain_says_what_was_seen_last() -> None:
    with pytest.raises(AssertionError, match=r"not within 0 s: two nodes; last seen: \[\]"):
        eventually("two nodes", list, within_s=0)


def test_an_assertion_that_fails_in_a_look_counts_as_not_yet() -> None:
    seen: list[int] = []

    def look() -> bool:
        seen.append(0)
        assert len(seen) == 3
        return True

    assert eventually("three looks", look)


async def test_a_condition_may_come_true_by_what_the_loop_does_meanwhile() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, event.set)
    assert await soon("the event", event.is_set)


async def test_a_look_that_hangs_ends_with_the_time() -> None:
    with pytest.raises(AssertionError, match="the first look did not end"):
        await soon("an answer", asyncio.Event().wait, within_s=0.05)


SKIPPING = {
    "test_in_the_test": "def test_engine(): pytest.skip('no engine')",
    "test_by_a_mark": "@pytest.mark.skipif(True, reason='no engine')\ndef test_engine(): pass",
    "test_in_a_fixture": "@pytest.fixture\ndef engine(): pytest.skip('no engine')\ndef test_engine(engine): pass",
    "test_as_a_module": "pytest.skip('no engine', allow_module_level=True)",
}
EXPECTED_TO_FAIL = "@pytest.mark.xfail\ndef test_it(): assert False"


def report_of_skips(folder: Path, *, is_live_required: bool) -> str:
    """Run every way to skip, and one test that is expected to fail, under the conftest.py of this project."""
    (folder / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    for name, text in (SKIPPING | {"test_expected": EXPECTED_TO_FAIL}).items():
        (folder / f"{name}.py").write_text(f"import pytest\n{text}")
    alone = ("-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider")
    command = (sys.executable, "-m", "pytest", "--continue-on-collection-errors", *alone)
    environment = os.environ | {"MCP_REQUIRE_LIVE": str(int(is_live_required)), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ran = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, check=False)
    return ran.stdout


def test_what_may_not_be_skipped_fails_and_says_why(tmp_path: Path) -> None:
    report = report_of_skips(tmp_path, is_live_required=True)
    assert "1 failed, 1 xfailed, 3 errors" in report, report  # an error is a failure before the test began
    told, _summary = report.split("short test summary info")
    assert told.count("no engine\nNothing may be skipped here (MCP_REQUIRE_LIVE=1)") == len(SKIPPING), report


def test_a_developer_may_skip(tmp_path: Path) -> None:
    report = report_of_skips(tmp_path, is_live_required=False)
    assert "4 skipped, 1 xfailed" in report, report
