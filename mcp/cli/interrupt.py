"""Ctrl-C is answered at once and in one line, whatever the command is at; an operation that has begun goes on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

EXIT_INTERRUPTED = 130

NOTHING = "interrupted: nothing was started"


class _Now:
    """What a Ctrl-C does at this moment: there is one process, one terminal, one signal."""

    says = NOTHING
    as_json = False
    instead: Callable[[], None] | None = None


def listen(*, as_json: bool) -> None:
    """From now on Ctrl-C prints what `on_interrupt` said last and leaves with 130."""
    _Now.as_json = as_json
    on_interrupt(NOTHING)
    signal.signal(signal.SIGINT, _interrupted)


def on_interrupt(says: str, instead: Callable[[], None] | None = None) -> None:
    """Set what a Ctrl-C tells; with `instead`, the first one calls that (and must end in 0.2 s), the next one leaves."""
    _Now.says, _Now.instead = says, instead


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, for work that has to tidy up."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(*_: object) -> None:
    if (first := _Now.instead) is not None:
        _Now.instead = None
        first()
        return
    leave_now()


def leave_now() -> None:
    """Print what is to be said and end the process without waiting for anything."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, full, or in a write that this signal cut into: leaving matters more
            stream.flush()
    if _Now.says:
        is_terminal = os.isatty(2)
        _write(2, ("\r\x1b[K" if is_terminal else "") + _Now.says + "\n")
        if _Now.as_json:
            import json

            reason, _, hint = _Now.says.partition("; ")
            _write(1, json.dumps({"error": {"code": "interrupted", "reason": reason, "hint": hint}}) + "\n")
    os._exit(EXIT_INTERRUPTED)


def _write(handle: int, text: str) -> None:
    with suppress(OSError):  # nobody reads any more
        os.write(handle, text.encode(errors="backslashreplace"))
