"""All printing: results to stdout, progress and errors to stderr; escaped, in tables that fit, coloured on terminals only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from mcp.cli.settings import Settings
from mcp.model.errors import McpError

Plain = dict[str, Any]

_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
_TRICKS = [0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
_ESCAPES: dict[int, str] = {code: f"\\x{code:02x}" for code in _CONTROLS} | {code: f"\\u{code:04x}" for code in _TRICKS}
_ESCAPES |= {10: "\\n", 13: "\\r", 9: " "}
_ESCAPES_IN_LINES = _ESCAPES | {10: "\n"}

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}

GOOD = {"healthy", "running", "deployed", "done", "unchanged", "up", "active"}
BAD = {
    "failed",
    "unreachable",
    "unhealthy",
    "engine-down",
    "down",
    "frozen",
    "dead",
    "missing",
    "leftover",
    "exited",
    "orphan",
}


def safe(text: object) -> str:
    """Return text that came from elsewhere as one line that no terminal obeys: control and direction characters are shown."""
    return str(text).translate(_ESCAPES)


def safe_lines(text: object) -> str:
    """Do the same and leave line breaks in."""
    return str(text).translate(_ESCAPES_IN_LINES)


def width_of(text: str) -> int:
    """Return how many columns a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def cut(text: str, columns: int) -> str:
    """Return a text that takes at most so many columns; what was cut off is shown by an ellipsis."""
    if width_of(text) <= columns:
        return text
    while text and width_of(text) > max(columns - 1, 0):
        text = text[:-1]
    return text + "…"


def age(seconds: float | None) -> str:
    """Write a duration for people: 4 s, 3 min, 2 h, 5 d."""
    if seconds is None:
        return "never"
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def size(amount: float | None) -> str:
    """Write bytes for people: 1.5 GiB, 256 MiB."""
    if amount is None:
        return "?"
    return f"{amount / 1024**3:.1f} GiB" if amount >= 1024**3 else f"{amount / 1024**2:.0f} MiB"


def took(seconds: float) -> str:
    """Write how long something took: 0.3 s, 2 min 5 s."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


class Output:
    """Where a command's words go."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.is_terminal = _is_terminal(sys.stdout)
        self.is_live = _is_terminal(sys.stderr) and not settings.is_quiet
        """Whether progress may move: stderr is a terminal."""

    # ----------------------------------------------------------------- results

    def result(self, plain: Any) -> None:
        """Print a result for scripts."""
        import json

        _write(sys.stdout, json.dumps(plain, ensure_ascii=True, indent=2) + "\n")

    def row(self, plain: Any) -> None:
        """Print one of many results for scripts, on a line of its own."""
        import json

        _write(sys.stdout, json.dumps(plain, ensure_ascii=True) + "\n")

    def say(self, text: str = "", *styles: str) -> None:
        """Print a line of the result; what came from elsewhere in it has passed `safe`."""
        _write(sys.stdout, self.paint(text, *styles) + "\n")

    def raw(self, text: str) -> None:
        """Print exactly this, e.g. a file; it must not come from elsewhere."""
        _write(sys.stdout, text)

    def table(
        self,
        heads: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        indent: str = "",
        paint: int = -1,
        spare: Sequence[str] = (),
    ) -> None:
        """Print a table that fits the terminal: columns that can be spared go, in this order, then the widest are cut.

        The first column is never cut. `paint` colours one column by its words; it stands before the spare ones.
        """
        cells = [[safe(cell) for cell in row] for row in rows]
        if self.is_terminal:
            heads, cells = _without_spare(heads, cells, spare, _columns() - width_of(indent))
        widths = [max([width_of(head), *(width_of(row[i]) for row in cells)]) for i, head in enumerate(heads)]
        if self.is_terminal:
            _shrink(widths, _columns() - width_of(indent) - 2 * (len(widths) - 1))
        self.say(indent + _line(heads, widths), "dim")
        for row in cells:
            self.say(indent + _line(row, widths, lambda i, text: self.by_word(text) if i == paint else text))

    def paint(self, text: str, *styles: str) -> str:
        """Return the text with styles, on a terminal."""
        if not (styles and text and self.is_terminal and self.settings.has_colour):
            return text
        return f"\x1b[{';'.join(_STYLES[style] for style in styles)}m{text}\x1b[0m"

    def by_word(self, text: str) -> str:
        """Colour a state by what it means."""
        word = text.strip()
        if word in GOOD:
            return self.paint(text, "green")
        if word in BAD:
            return self.paint(text, "red")
        return self.paint(text, "yellow")

    # ------------------------------------------------------- progress and errors

    def note(self, text: str) -> None:
        """Say something beside the result."""
        if not self.settings.is_quiet:
            _write(sys.stderr, text + "\n")

    def warn(self, text: str) -> None:
        """Say something beside the result that must be heard."""
        _write(sys.stderr, self._err(text, "yellow") + "\n")

    def error(self, error: McpError) -> None:
        """Print what could not be done, why, and what to do; for scripts as {"error": ...} on stdout."""
        if self.settings.is_json:
            self.result({"error": error_plain(error)})
            return
        self.complain(error.reason, error.hint)

    def complain(self, reason: str, hint: str = "") -> None:
        """Print a reason and the next thing to do."""
        first, _, rest = safe_lines(reason).partition("\n")
        _write(sys.stderr, self._err(first, "red") + (f"\n{rest}" if rest else "") + "\n")
        if hint:
            _write(sys.stderr, safe_lines(hint) + "\n")

    def _err(self, text: str, style: str) -> str:
        if not (self.settings.has_colour and _is_terminal(sys.stderr)):
            return text
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def error_plain(error: McpError) -> Plain:
    """Return what scripts get of an error."""
    return {"code": error.code, "reason": error.reason, "hint": error.hint}


class Progress:
    """The steps of one operation: a moving line on a terminal, one plain line per step that ended otherwise."""

    FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
    PLAIN_FRAMES = "|/-\\"
    MARKS: Mapping[str, str] = {
        "done": "✓",
        "unchanged": "=",
        "failed": "✗",
        "undone": "↶",
        "leftover": "!",
        "unknown": "?",
    }
    PLAIN_MARKS: Mapping[str, str] = {
        "done": "ok",
        "unchanged": "==",
        "failed": "failed",
        "undone": "undone",
        "leftover": "left",
        "unknown": "?",
    }
    ENDED = frozenset(MARKS)

    def __init__(self, out: Output, title: str) -> None:
        self._out = out
        self._is_live = out.is_live
        self._has_signs = _speaks_unicode(sys.stderr)
        self._printed: set[tuple[str, str]] = set()
        self._moving: tuple[Plain, float] | None = None
        self._turns = 0
        if not out.settings.is_quiet:
            _write(sys.stderr, f"{title}\n")

    def step(self, step: Plain) -> None:
        """A step moved."""
        name, state = str(step.get("step", "")), str(step.get("state", ""))
        if state not in self.ENDED:
            begun = time.monotonic() - float(step.get("seconds") or 0.0)
            self._moving = (step, begun)
            self.turn()
            return
        self._moving = None
        if (name, state) not in self._printed:
            self._printed.add((name, state))
            self.line(self._words(step, state, float(step.get("seconds") or 0.0)))

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if not self._out.settings.is_quiet:
            _write(sys.stderr, ("\r\x1b[K" if self._is_live else "") + text + "\n")

    def turn(self) -> None:
        """Move the moving line; called some ten times a second."""
        if not (self._is_live and self._moving):
            return
        frames = self.FRAMES if self._has_signs else self.PLAIN_FRAMES
        self._turns += 1
        step, begun = self._moving
        sign = frames[self._turns % len(frames)]
        text = self._words(step, "", time.monotonic() - begun, sign=sign)
        _write(sys.stderr, "\r\x1b[K" + cut(text, _columns() - 1))

    def end(self) -> None:
        """Take the moving line away."""
        self._moving = None
        if self._is_live:
            _write(sys.stderr, "\r\x1b[K")

    def _words(self, step: Plain, state: str, seconds: float, *, sign: str = "") -> str:
        marks = self.MARKS if self._has_signs else self.PLAIN_MARKS
        mark = sign or marks.get(state, state)
        detail = safe(step.get("detail") or "")
        name = safe(step.get("step") or "")
        if step.get("state") == "undoing":
            detail = f"undoing: {detail}" if detail else "undoing"
        return f"  {mark} {name:<8} {safe(step.get('node') or '-'):<12} {took(seconds):>8}  {detail}".rstrip()


def _line(cells: Sequence[str], widths: Sequence[int], paint: Any = None) -> str:
    parts = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        shown = cut(cell, width)
        padding = " " * (width - width_of(shown)) if i < len(widths) - 1 else ""
        parts.append((paint(i, shown) if paint else shown) + padding)
    return "  ".join(parts).rstrip()


def _without_spare(
    heads: Sequence[str], rows: list[list[str]], spare: Sequence[str], room: int
) -> tuple[Sequence[str], list[list[str]]]:
    for name in spare:
        widths = [max([width_of(head), *(width_of(row[i]) for row in rows)]) for i, head in enumerate(heads)]
        if sum(widths) + 2 * (len(widths) - 1) <= room:
            break
        at = list(heads).index(name)
        heads = [*heads[:at], *heads[at + 1 :]]
        rows = [[*row[:at], *row[at + 1 :]] for row in rows]
    return heads, rows


def _shrink(widths: list[int], room: int) -> None:
    while sum(widths) > room and max(widths[1:], default=0) > 8:
        widest = widths.index(max(widths[1:]), 1)
        widths[widest] -= 1


def _columns() -> int:
    try:
        given = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        given = 0
    if given > 0:
        return given
    for handle in (2, 1):
        try:
            return os.get_terminal_size(handle).columns or 80
        except OSError:
            continue
    return 80


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def _speaks_unicode(stream: TextIO | None) -> bool:
    return (getattr(stream, "encoding", "") or "").lower().replace("-", "") == "utf8"


def _write(stream: TextIO | None, text: str) -> None:
    """Write at once; a stream that was closed before we began swallows it."""
    if stream is None:
        return
    stream.write(text)
    stream.flush()


def facts(pairs: Mapping[str, object]) -> str:
    """Write `name: value` lines with the names in one column."""
    width = max(map(len, pairs), default=0)
    return "\n".join(f"{name + ':':<{width + 2}}{safe(value)}" for name, value in pairs.items())
