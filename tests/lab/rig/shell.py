"""Running commands and waiting for conditions: what every part of the rig does all day."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LOOK_EVERY_S = 0.03


class LabError(Exception):
    """Something of the rig could not be done; the text is for the person who runs it."""


class NotRunning(LabError):
    """The node is off, so waiting for it is in vain."""


def sh(*cmd: object, check: bool = True, stdin: str | None = None, timeout_s: float = 60) -> str:
    """Run a command and return its output, stderr mixed in.

    Raises:
        LabError: it failed and `check` is on.
        subprocess.TimeoutExpired: it did not end in time.
    """
    words = [str(word) for word in cmd]
    done = subprocess.run(
        words, input=stdin, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, check=False
    )
    if check and done.returncode:
        raise LabError(f"{' '.join(words)}: {done.stdout.strip()}")
    return done.stdout


def wait_for(what: str, probe: Callable[[], T], within_s: float) -> T:
    """Return the first true answer of `probe`; the errors of a thing that is still starting count as "not yet".

    Raises:
        LabError: there was none in time.
        NotRunning: the node is off.
    """
    end_s = time.monotonic() + within_s
    while True:
        trouble: Exception | None = None
        try:
            if got := probe():
                return got
        except NotRunning:
            raise
        except (OSError, subprocess.SubprocessError, LabError) as error:
            trouble = error
        if time.monotonic() > end_s:
            raise LabError(f"gave up waiting for {what} after {within_s:g} s" + (f": {trouble}" if trouble else ""))
        time.sleep(LOOK_EVERY_S)


def start_ticks(pid: int) -> int | None:
    """Return when a living process started: tells it from a later one that got the same number. None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
