"""What holds for every test: markers by folder, and no skipping where the real things are required."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

HERE = Path(__file__).resolve().parent

IS_LIVE_REQUIRED = os.environ.get("MCP_REQUIRE_LIVE") == "1"
"""Whether a test that finds no engine or server fails; `make test` and CI say so, a developer's own run need not."""

# A machine with other things to do is no counterexample, so hypothesis gives no single example a deadline.
hypothesis.settings.register_profile("mcp", deadline=None)
# `make test-fast` tries fewer examples of each property: what it may miss, `make test` finds.
hypothesis.settings.register_profile("fast", deadline=None, max_examples=15)
hypothesis.settings.load_profile(os.environ.get("MCP_HYPOTHESIS", "mcp"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with the folder it lies in."""
    for item in items:
        kind, *inside = item.path.relative_to(HERE).parts
        if inside:
            item.add_marker(kind)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make a skipped test a failed one where nothing may be skipped."""
    report = yield
    if IS_LIVE_REQUIRED and not hasattr(report, "wasxfail"):
        _refuse_to_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Do the same with a module that skips all its tests."""
    report = yield
    if IS_LIVE_REQUIRED:
        _refuse_to_skip(report)
    return report


def _refuse_to_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped:
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = (
        f"{reason}\nNothing may be skipped here (MCP_REQUIRE_LIVE=1): supply what is missing, or unset it."
    )
