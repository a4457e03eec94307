"""Fixtures of the rig: one fresh fleet for each module, or the reason why this machine cannot have one."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # the rig is a program of its own, not part of any package

import fleet as fleets  # noqa: E402
from rig.binds import Bind, python_homes, with_python  # noqa: E402
from rig.lab import Lab  # noqa: E402
from rig.machine import obstacles  # noqa: E402

STATES = Path(os.environ.get("LAB_STATE", "/var/tmp/mcp-lab-tests"))
SLOTS = 4
"""So many runs of these tests may be under way on one machine."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, whatever the project's own list says."""
    config.addinivalue_line("markers", "lab: needs the four-node rig (docs/lab.md): root, minutes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the rig."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lab)


def unavailable(reason: str) -> None:
    """Skip, unless the run insists on the real thing."""
    if os.environ.get("MCP_REQUIRE_LIVE") == "1":
        pytest.fail(f"the rig cannot run here, and MCP_REQUIRE_LIVE=1: {reason}", pytrace=False)
    pytest.skip(f"the rig cannot run here: {reason}")


@contextmanager
def state_folder() -> Iterator[Path]:
    """Yield a state folder that no other run uses; what a killed run left in it is for us to clear away."""
    for slot in range(SLOTS):
        folder = STATES.with_name(f"{STATES.name}-{slot}")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield folder
            return
    unavailable(f"{SLOTS} other runs hold {STATES}-*")


def binds() -> list[Bind]:
    """The checkout, and the Python that runs these tests, wherever its parts lie."""
    found: list[Bind] = [(CHECKOUT, CHECKOUT)]
    prefix = Path(sys.prefix)
    if not prefix.is_relative_to(CHECKOUT) and not prefix.is_relative_to("/usr"):
        found.append((prefix.resolve(), prefix))
        found += [(home.resolve(), home) for home in python_homes(prefix)]
    return with_python(found)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A rig that nobody has broken yet; the checkout is in every node, the product's units wait for configuration."""
    if why := obstacles():
        unavailable("; ".join(why))
    with state_folder() as folder:
        rig = Lab(folder)
        rig.down()
        rig.binds = binds()
        rig.seed_trees = [fleets.write_seed_tree(tmp_path_factory.mktemp("seed"))]
        try:
            print(f"rig up in {rig.up():.1f} s")
            yield rig
        finally:
            print(f"rig down in {rig.down():.1f} s")


@pytest.fixture(scope="module")
def installed() -> None:
    """The console scripts are there; asked before the rig is started in vain."""
    if missing := fleets.missing_programs():
        unavailable(f"not installed beside {sys.executable}: {', '.join(missing)}; pip install -e .")


@pytest.fixture(scope="module")
def fleet(installed: None, lab: Lab) -> fleets.Fleet:
    """The product on the rig, set up as an operator would: a bus, a master, four agents, a workstation."""
    made = fleets.Fleet(lab)
    made.set_up()
    return made
