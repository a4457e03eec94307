"""Ctrl-C is answered at once and in one line, whatever the command is at; an operation that has begun goes on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

EXIT_INTERRUPTED = 130

NOTHING = "interrupted: nothing was started"

_says = NOTHING
_as_json = False
_instead: Callable[[], None] | None = None


def listen(*, as_json: bool) -> None:
    """From now on Ctrl-C prints what `on_interrupt` said last and leaves with 130."""
    global _as_json
    _as_json = as_json
    on_interrupt(NOTHING)
    signal.signal(signal.SIGINT, _interrupted)


def on_interrupt(says: str, instead: Callable[[], None] | None = None) -> None:
    """Set what a Ctrl-C tells; with `instead`, the first one calls that (and must end in 0.2 s), the next one leaves."""
    global _says, _instead
    _says, _instead = says, instead


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, for work that has to tidy up."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(*_: Any) -> None:
    global _instead
    if _instead is not None:
        first, _instead = _instead, None
        first()
        return
    leave_now()


def leave_now() -> None:
    """Print what is to be said and end the process without waiting for anything."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: S110
            pass  # closed, full, or in the middle of a write that this signal cut into: leaving matters more
    if _says:
        is_terminal = os.isatty(2)
        _write(2, ("\r\x1b[K" if is_terminal else "") + _says + "\n")
        if _as_json:
            import json

            reason, _, hint = _says.partition("; ")
            _write(1, json.dumps({"error": {"code": "interrupted", "reason": reason, "hint": hint}}) + "\n")
    os._exit(EXIT_INTERRUPTED)


def _write(handle: int, text: str) -> None:
    try:
        os.write(handle, text.encode(errors="backslashreplace"))
    except OSError:
        pass  # nobody reads any more
