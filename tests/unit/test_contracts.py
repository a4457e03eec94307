"""The import contracts of setup.cfg hold, and each of them bites."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WRONG = {
    "mcp/model/names.py": ("asyncio", "mcp.actors", "attrs", "msgpack"),
    "mcp/bus/files.py": ("mcp.actors.actor", "aiodocker", "cattrs"),
    "mcp/actors/actor.py": ("mcp.adapters.clock", "nats.aio.client", "aiohttp"),
    "mcp/adapters/clock.py": ("mcp.actors.actor", "mcp.bus.codec", "click"),
    "mcp/config/reading.py": ("mcp.wiring", "nacl.signing"),
    "mcp/cli/exits.py": ("cryptography.x509", "click", "mcp.wiring"),
}
"""Imports to add at the end of a file; those that are allowed after all are in RIGHT."""

RIGHT = {
    ("mcp/model/names.py", "attrs"),
    ("mcp/cli/exits.py", "click"),
    ("mcp/cli/exits.py", "mcp.wiring"),
}

ROWS = [(file, module) for file, modules in WRONG.items() for module in modules]


def lint_imports(folder: Path) -> tuple[bool, str]:
    """Check the package in a folder; return whether the contracts hold, and the report."""
    lint = str(Path(sys.executable).with_name("lint-imports"))
    command = [lint, str(ROOT / "setup.cfg"), "--no-cache", "--no-logo"]
    # One wide column: the report breaks its lines where a terminal would.
    environment = os.environ | {"COLUMNS": "400", "NO_COLOR": "1", "PYTHONPATH": str(folder)}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return ran.returncode == 0, ran.stdout + ran.stderr


def test_no_module_imports_what_its_part_may_not_know() -> None:
    holds, report = lint_imports(ROOT)
    assert holds, report


@pytest.fixture(scope="module")
def report_on_wrong_imports(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is said about a copy of the package to which every import of ROWS was added."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(ROOT / "mcp", folder / "mcp", ignore=shutil.ignore_patterns("__pycache__"))
    for file, modules in WRONG.items():
        with (folder / file).open("a", encoding="utf-8") as source:
            source.writelines(f"import {module}\n" for module in modules)
    holds, report = lint_imports(folder)
    assert not holds
    return report


def line_of(file: str, module: str) -> int:
    """Return where the import stands in the copy."""
    return len((ROOT / file).read_text(encoding="utf-8").splitlines()) + WRONG[file].index(module) + 1


@pytest.mark.parametrize(("file", "module"), ROWS)
def test_a_wrong_import_is_named_with_its_line(file: str, module: str, report_on_wrong_imports: str) -> None:
    importer = file.removesuffix(".py").replace("/", ".")
    words = (f"{importer} ", module.split(".", maxsplit=1)[0], f"(l.{line_of(file, module)})")
    is_reported = any(all(word in line for word in words) for line in report_on_wrong_imports.splitlines())
    assert is_reported is ((file, module) not in RIGHT), report_on_wrong_imports
