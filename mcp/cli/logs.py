"""What a service's containers print: merged over components and nodes by their time stamps, with credit for what was printed."""

from __future__ import annotations

import asyncio
import heapq
import select
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

import click

from mcp.cli import exits, interrupt
from mcp.cli.app import command, settings_of
from mcp.cli.completion import complete_services
from mcp.model.errors import NoAnswer

if TYPE_CHECKING:
    from mcp.bus.plain import Plain
    from mcp.cli.output import Output
    from mcp.cli.session import Session

WINDOW_S = 0.3
"""How long a followed line waits for older ones from other containers."""

MOST_LINES = 50_000
"""So many lines are put in order at most; of more, the older half is printed first."""

FOREVER_S = 24 * 3600.0

LOST_S = 10.0
"""The master says every 2 s that a stream lives; after this long without a word it is taken for gone."""

CLOSED_EVERY_S = 0.5
"""How often it is looked whether anybody still reads the output: a quiet service prints nothing that would tell."""

ADVANCE = 8
"""Messages that are printed before the agents get credit for as many more (they begin with 16)."""

UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@command(
    "logs",
    examples=(
        "mcp logs web",
        "mcp logs web -f",
        "mcp logs web -n 100 --since 10m",
        "mcp logs web --component api --json",
    ),
)
@click.argument("service", shell_complete=complete_services)
@click.option("-f", "--follow", is_flag=True, help="Go on until the containers end, or Ctrl-C.")
@click.option(
    "-n", "--lines", type=click.IntRange(min=0), default=None, metavar="N", help="The last N lines of each container."
)
@click.option("--since", default="", metavar="TIME", help="Only younger lines: 10m, 2h, 3d, or 2026-01-02T03:04:05Z.")
@click.option("--component", default="", metavar="NAME", help="Only this component.")
@click.pass_context
def logs(ctx: click.Context, service: str, follow: bool, lines: int | None, since: str, component: str) -> int:
    """What a service's containers print, merged, wherever they run.

    It ends when the containers end, and says how. With --json: one object per line.
    """
    from mcp.cli import session
    from mcp.cli.deploy import check_service_name

    check_service_name(service)
    since_s = seconds_since(since, time.time()) if since else 0.0
    body = {
        "service": service,
        "component": component,
        "follow": follow,
        "tail": -1 if lines is None else lines,
        "since_s": since_s,
    }
    return session.run(settings_of(ctx), lambda connected: _read(connected, body))


def seconds_since(text: str, now_s: float) -> float:
    """Return how many seconds ago a time was: "10m", "2h", or RFC 3339.

    Raises:
        Usage: it is neither, or in the future.
    """
    number, unit = text.rstrip("smindh"), text[len(text.rstrip("smindh")) :]
    if unit in UNITS_S:
        try:
            length = float(number) * UNITS_S[unit]
        except ValueError:
            length = -1.0
        if 0 < length < 1e10:
            return length
    try:
        at = datetime.fromisoformat(text)
        ago = now_s - (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        ago = None
    if ago is None:
        raise exits.Usage(f"--since {text[:40]!r} is no time", hint="Like 10m, 2h, 3d or 2026-01-02T03:04:05Z.")
    if ago <= 0:
        raise exits.Usage(f"--since {text[:40]!r} lies in the future")
    return ago


class Merger:
    """Lines of several containers, in the order of their time stamps as far as waiting a moment can give it."""

    def __init__(self, *, is_followed: bool, is_alone: bool) -> None:
        self._is_followed = is_followed
        self._is_alone = is_alone
        self._heap: list[tuple[str, int, float, Plain]] = []
        self._serial = 0

    def take(self, line: Plain, now_s: float) -> None:
        """A line has come."""
        self._serial += 1
        heapq.heappush(self._heap, (stamp(line), self._serial, now_s, line))

    def ready(self, now_s: float, *, is_over: bool = False) -> list[Plain]:
        """Return the lines that may be printed now, oldest first."""
        if is_over or self._is_alone:
            return self._first(len(self._heap))
        made: list[Plain] = []
        if len(self._heap) > MOST_LINES:
            made = self._first(MOST_LINES // 2)
        while self._is_followed and self._heap and now_s - self._heap[0][2] >= WINDOW_S:
            made += self._first(1)
        return made

    def _first(self, count: int) -> list[Plain]:
        return [heapq.heappop(self._heap)[-1] for _ in range(min(count, len(self._heap)))]


def stamp(line: Plain) -> str:
    """Return a line's time stamp in a form that sorts: its fraction filled up to nanoseconds."""
    at = str(line.get("at", "")).removesuffix("Z")
    whole, _, fraction = at.partition(".")
    return f"{whole}.{fraction:0<9}"


class _Reader:
    """One reading: frames in, lines out, credit back."""

    def __init__(self, session: Session, body: Plain, *, is_alone: bool, has_prefix: bool) -> None:
        self._session = session
        self._component = str(body["component"])
        self._service = str(body["service"])
        self._has_prefix = has_prefix
        self._is_followed = bool(body["follow"])
        self.merger = Merger(is_followed=self._is_followed, is_alone=is_alone)
        self.stream = ""
        self._unpaid = 0
        self._news = asyncio.Event()
        self.is_over = False

    def heard(self, kind: str, body: Plain) -> None:
        """Some lines have come."""
        if kind != "log_lines":
            return
        self.stream = str(body.get("stream", ""))
        now_s = time.monotonic()
        for line in body.get("lines", ()):
            if self._component in ("", line.get("component")):
                self.merger.take(line | {"node": body.get("node", "")}, now_s)
        self._unpaid += 1
        self._news.set()

    def end(self) -> None:
        """Nothing more will come."""
        self.is_over = True
        self._news.set()

    async def print_all(self) -> None:
        """Print until the end, and pay for what was printed.

        The printing itself runs in a thread: while a pager does not read, the connection must go on answering the bus.
        """
        while True:
            is_last = self.is_over
            lines = self.merger.ready(time.monotonic(), is_over=is_last)
            if lines:
                await asyncio.to_thread(self._print, lines)
            if is_last:
                return
            await self._pay()
            self._news.clear()
            try:
                async with asyncio.timeout(WINDOW_S / 3 if self._is_followed else 1.0):
                    await self._news.wait()
            except TimeoutError:
                continue

    async def _pay(self) -> None:
        if self._unpaid >= ADVANCE and self.stream:
            credit, self._unpaid = self._unpaid, 0
            await self._session.tell("grant_reader_credit", {"stream": self.stream, "credit": credit})

    async def stop(self) -> None:
        """Let the agents know that nobody reads any more."""
        if self.stream:
            await self._session.tell("grant_reader_credit", {"stream": self.stream, "credit": 0})

    def _print(self, lines: list[Plain]) -> None:
        out = self._session.out
        if self._session.settings.is_json:
            for line in lines:
                out.row({"service": self._service, **line})
            return
        out.raw("".join(self._shown(out, line) for line in lines))

    def _shown(self, out: Output, line: Plain) -> str:
        from mcp.cli.output import safe

        prefix = out.paint(f"{safe(line.get('component', ''))} | ", "cyan") if self._has_prefix else ""
        return f"{prefix}{safe(line.get('text', ''))}\n"


async def _read(session: Session, body: Plain) -> int:
    from mcp.cli.output import safe

    known = await session.status(service=str(body["service"]))
    components = {c["component"] for row in known["services"] for c in row.get("components", ())}
    if body["component"] and components and body["component"] not in components:
        raise exits.Usage(
            f"{body['service']} has no component {str(body['component'])[:40]!r}",
            hint=f"It has: {', '.join(sorted(components))}.",
        )
    containers = sum(len(row.get("components", ())) for row in known["services"])
    reader = _Reader(session, body, is_alone=containers == 1, has_prefix=len(components) > 1 and not body["component"])
    ended = await _until_the_end(session, reader, body)
    if ended is None:
        return exits.INTERRUPTED
    for note in ended.get("notes", ()):
        session.out.note(safe(note))
    return exits.UNREACHABLE if any(str(note).startswith("lost ") for note in ended.get("notes", ())) else exits.DONE


def is_closed(stream: TextIO | None) -> bool:
    """Say whether nobody can read any more what is written there: the other end of a pipe or of a connection is gone."""
    try:
        if stream is None:
            return False
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors and hang-ups are told always
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return False  # it has no file: nothing to look at


async def _nobody_reads() -> None:
    while not is_closed(sys.stdout):  # noqa: ASYNC110 - the kernel tells it to a poll only; asyncio has no event for it
        await asyncio.sleep(CLOSED_EVERY_S)


async def _until_the_end(session: Session, reader: _Reader, body: Plain) -> Plain | None:
    """Read and print; None: Ctrl-C."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    limit_s = session.limit_s(FOREVER_S)
    printing = asyncio.create_task(reader.print_all())
    asking = asyncio.create_task(
        session.patiently(
            lambda: session.ask(
                "follow_logs", body, timeout_s=limit_s, idle_s=min(limit_s, LOST_S), on_frame=reader.heard
            )
        )
    )
    stopping = asyncio.create_task(stopped.wait())
    closing = asyncio.create_task(_nobody_reads())

    def on_interrupt() -> None:
        loop.call_soon_threadsafe(stopped.set)
        loop.call_later(0.15, interrupt.leave_now)  # a full pipe may hold the printing thread

    interrupt.on_interrupt("", on_interrupt)
    try:
        await asyncio.wait({asking, stopping, printing, closing}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.is_set():
            await reader.stop()
            interrupt.leave_now()
        if closing.done():
            await reader.stop()
            raise BrokenPipeError
        if printing.done() and printing.exception():
            await reader.stop()
            raise printing.exception()  # type: ignore[misc]
        try:
            ended = await asking
        except NoAnswer as error:
            reader.end()
            await printing  # what has come is shown all the same
            reason = error.reason.removesuffix(": it may have been done")
            raise exits.Unanswered(
                f"the logs of {body['service']} end here: {reason}",
                hint="The service goes on; `mcp status` shows whether the master answers again.",
            ) from error
        reader.end()
        await printing
        return ended
    finally:
        for task in (asking, printing, stopping, closing):
            task.cancel()
