"""Child processes that die with us, whatever becomes of us, and that are stopped, killed, frozen and thawed by name."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mcp.model.errors import AdapterError

STOP_TIMEOUT_S = 10.0
LOOK_EVERY_S = 0.02

_PR_SET_PDEATHSIG = 1


class Child:
    """One program of ours as a child process; its output goes to a file. It ends with us, unless `is_tied` is False."""

    def __init__(
        self, name: str, words: Sequence[str], log_file: Path, env: Mapping[str, str], *, is_tied: bool = True
    ) -> None:
        self.name = name
        self.words = list(words)
        self.log_file = log_file
        self._env = dict(env)
        self._is_tied = is_tied
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id; 0 when it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs, or when it never did."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start it; running already is fine."""
        if self.pid:
            return
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self._env,
                start_new_session=True,  # Ctrl-C is for the one who watches
                preexec_fn=_tied_to_us() if self._is_tied else None,  # noqa: PLW1509 - one prctl, no lock taken; there is no other way
            )

    def stop(self) -> None:
        """End it in an orderly way, with force after 10 s; not running is fine."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        self._wait()

    def kill(self) -> None:
        """End it as kill -9 does."""
        self._signal(signal.SIGKILL)
        self._wait()

    def freeze(self) -> None:
        """Make it deaf and mute (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def log(self) -> str:
        """Return all that it has said."""
        try:
            return self.log_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def last_words(self, lines: int = 5) -> str:
        """Return the last lines it said."""
        return "\n".join(self.log().splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.pid:
            self._process.send_signal(number)

    def _wait(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _tied_to_us() -> Callable[[], None]:
    """Return what a child does before it becomes the program: it asks the kernel to end it when we end."""
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)  # found before the fork: afterwards only plain calls are safe

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # we were gone before it was tied
            os._exit(1)

    return tie


def wait_until(what: str, is_so: Callable[[], bool], *, timeout_s: float, child: Child | None = None) -> None:
    """Wait for a condition.

    Raises:
        AdapterError: it did not come true in time, or the child ended; with the child's last words.
    """
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if child is not None and child.exit_code is not None:
            raise AdapterError(f"{child.name} ended with {child.exit_code}:\n{child.last_words()}", code="child_ended")
        if time.monotonic() > deadline_s:
            said = f"; {child.name} said:\n{child.last_words()}" if child is not None else ""
            raise AdapterError(f"waited {timeout_s:g} s in vain: {what}{said}", code="timeout")
        time.sleep(LOOK_EVERY_S)
