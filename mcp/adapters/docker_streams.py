"""What comes from the engine in pieces: lines of JSON, the multiplexed log, the progress of a pull; no I/O."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Mapping
from typing import Any

from mcp.model.messages import LogLine

MAX_LINE_BYTES = 32 * 1024
"""A longer line of output is handed on in pieces of about this size: half of what a message of the bus may have."""

_HEAD = struct.Struct(">BxxxL")
_STDERR = 2


async def json_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of a stream whose pieces end anywhere."""
    begun = b""
    async for chunk in chunks:
        *lines, begun = (begun + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
    if begun.strip():
        yield begun


class LogSplitter:
    """Makes lines of the log of one container.

    The log comes in frames: a head of 8 bytes (which stream, how long), then a piece of at most 16 KiB with a time
    stamp of its own. A long line is several pieces, and pieces of both streams may come in turns.
    """

    def __init__(self, component: str, container: str) -> None:
        self._component = component
        self._container = container
        self._buffer = bytearray()
        self._begun: dict[int, tuple[str, bytes]] = {}

    def feed(self, chunk: bytes) -> list[LogLine]:
        """Take bytes in and return the lines that they complete."""
        self._buffer += chunk
        lines: list[LogLine] = []
        at = 0
        while len(self._buffer) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._buffer, at)
            end = at + _HEAD.size + length
            if len(self._buffer) < end:
                break
            lines += self._take(kind, bytes(self._buffer[at + _HEAD.size : end]))
            at = end
        del self._buffer[:at]
        return lines

    def rest(self) -> list[LogLine]:
        """Return what was begun and never ended with a line break."""
        begun, self._begun = self._begun, {}
        return [self._line(kind, at, text) for kind, (at, text) in begun.items()]

    def _take(self, kind: int, piece: bytes) -> list[LogLine]:
        stamp, _, text = piece.partition(b" ")
        at, before = self._begun.pop(kind, (stamp.decode(errors="replace"), b""))
        whole = before + text
        if not whole.endswith(b"\n") and len(whole) < MAX_LINE_BYTES:
            self._begun[kind] = (at, whole)
            return []
        return [self._line(kind, at, whole.rstrip(b"\r\n"))]

    def _line(self, kind: int, at: str, text: bytes) -> LogLine:
        return LogLine(
            at=at,
            component=self._component,
            container=self._container,
            stream="stderr" if kind == _STDERR else "stdout",
            text=text.decode(errors="replace"),
        )


class PullProgress:
    """Adds up the bytes of all layers of a pull, from the lines that the engine sends for each.

    Only downloads count: unpacking is reported in bytes too, of the same layers, and the sum would run backwards.
    """

    def __init__(self) -> None:
        self._layers: dict[str, tuple[int, int]] = {}
        self.status = ""

    def take(self, said: Mapping[str, Any]) -> None:
        """Take one line in."""
        self.status = str(said.get("status", self.status)).lower()
        layer, sizes = str(said.get("id", "")), said.get("progressDetail") or {}
        if self.status == "downloading" and sizes.get("total"):
            self._layers[layer] = (int(sizes.get("current", 0)), int(sizes["total"]))
        elif self.status in ("download complete", "pull complete") and layer in self._layers:
            total = self._layers[layer][1]
            self._layers[layer] = (total, total)

    @property
    def bytes(self) -> tuple[int, int]:
        """How many bytes are here, and how many there are as far as is known."""
        return sum(done for done, _ in self._layers.values()), sum(total for _, total in self._layers.values())


def stream_error(line: bytes) -> tuple[dict[str, Any], str]:
    """Return a line of a progress stream, and the error it tells of ("" when none): such streams are HTTP 200 to the end."""
    said = json.loads(line)
    detail = said.get("errorDetail")
    text = (detail.get("message") if isinstance(detail, dict) else "") or said.get("error") or ""
    return said, str(text)
