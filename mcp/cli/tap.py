"""The decoded bus: every message as one line, orders paired with their answers and how long they took, secrets masked."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import click

from mcp.cli import exits, interrupt
from mcp.cli.app import command, settings_of
from mcp.cli.unpack import shown

if TYPE_CHECKING:
    from mcp.bus.transport import Frame
    from mcp.cli.output import Output

MOST_OPEN = 1000
"""Orders that are remembered until they are answered."""

BODY_COLUMNS = 100


@command(
    "tap", examples=("mcp tap --config watch.toml", "mcp tap 'mcp.work.orion.>' --config watch.toml", "mcp tap --json")
)
@click.argument("subject", default="mcp.>")
@click.option(
    "--for", "seconds", type=click.FloatRange(min=0.1), default=None, metavar="SECONDS", help="Stop after so long."
)
@click.pass_context
def tap(ctx: click.Context, subject: str, seconds: float | None) -> int:
    """Watch the decoded bus: orders paired with their answers, with times.

    Needs the file of an operator whose role is debug (`mcp operator add watch --role debug`): such a one hears everything on
    `mcp.>` and can say nothing. What carries secrets travels elsewhere, so it is not seen here.
    """
    from mcp.cli import session
    from mcp.cli.output import Output

    settings = settings_of(ctx)
    if not subject or any(c.isspace() or c == "\0" for c in subject):
        raise exits.Usage(f"{subject[:40]!r} is no subject", hint="Like mcp.> or mcp.node.orion.>")
    config = session.configured(settings)
    interrupt.on_interrupt("")
    return asyncio.run(_watch(Output(settings), config, subject, seconds))


async def _watch(out: Output, config: Any, subject: str, seconds: float | None) -> int:
    from mcp.bus.nats_bus import BusAddress, Credential, connect
    from mcp.cli.session import authority_of

    address = BusAddress(
        host=config.bus.address, port=config.bus.port, tls_name=config.bus.tls_name, ca_pem=authority_of(config)
    )
    credential = Credential(role="debug", name=config.operator, seed=config.seed)
    transport = await connect(address, credential, forever=False, name=f"mcp tap {config.operator}")
    pairs = Pairs()
    denied = asyncio.Event()
    transport.on_denied = lambda *_: denied.set()

    def on_frame(frame: Frame) -> None:
        line = pairs.line(frame.subject, frame.body, frame.headers, time.monotonic())
        if out.settings.is_json:
            out.row(line)
        else:
            out.say(as_text(line))

    await transport.subscribe(subject, on_frame)
    try:
        async with asyncio.timeout(seconds):
            await denied.wait()
    except TimeoutError:
        return exits.DONE
    finally:
        await transport.close()
    from mcp.model.errors import NotPermitted

    raise NotPermitted(
        f"operator {config.operator} may not watch {subject}",
        subject=subject,
        hint=(
            "On the master's machine: `mcp operator add watch --role debug > watch.mcp`;"
            " here: `mcp --config watch.toml login watch.mcp`."
        ),
    )


class Pairs:
    """Remembers orders until they are answered, to say what an answer answers."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str, float]] = {}
        self._begun_s: float | None = None

    def line(self, subject: str, body: bytes, headers: Any, now_s: float) -> dict[str, Any]:
        """Return a message as plain values: when, subject, kind, frame, op, answer to, took, body."""
        self._begun_s = now_s if self._begun_s is None else self._begun_s
        kind = str(headers.get("Mcp-Kind", "")).partition("/")[0]
        made: dict[str, Any] = {"at_s": round(now_s - self._begun_s, 4), "subject": subject, "kind": kind}
        for key, header in (("op", "Mcp-Op"), ("frame", "Mcp-Frame")):
            if header in headers:
                made[key] = headers[header]
        tokens = subject.split(".")
        if tokens[1:2] == ["work"] and len(tokens) == 4 and "op" in made:
            while len(self._open) >= MOST_OPEN:
                del self._open[next(iter(self._open))]
            self._open[f"{tokens[2]}/{made['op']}"] = (kind, now_s)
        elif tokens[1:2] == ["node"] and tokens[3:4] == ["reply"]:
            self._pair(made, f"{tokens[2]}/{headers.get('Mcp-Op', '')}", now_s)
        made["body"] = shown(subject, body)
        return made

    def _pair(self, made: dict[str, Any], key: str, now_s: float) -> None:
        if key in self._open:
            asked, at_s = self._open[key]
            made |= {"answers": asked, "took_s": round(now_s - at_s, 4)}
            if made.get("frame") in ("final", "error"):
                del self._open[key]


def as_text(line: dict[str, Any]) -> str:
    """Return a line for people."""
    from mcp.cli.output import cut, safe

    frame = f" {line['frame']}" if line.get("frame") else ""
    answer = f"  <- {safe(line['answers'])} {line['took_s'] * 1000:.1f} ms" if "answers" in line else ""
    body = cut(safe(json.dumps(line["body"], ensure_ascii=True)), BODY_COLUMNS)
    return f"{line['at_s']:9.4f}  {safe(line['subject'])}{safe(frame)}{answer}  {body}"
