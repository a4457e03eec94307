"""Follows one operation from the question to its end, whatever happens to the master in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from mcp.bus.plain import Declined, Plain
from mcp.cli import exits, interrupt
from mcp.cli.output import Output, Progress, safe, took
from mcp.cli.session import AGAIN_S, SILENCE_S, Session
from mcp.model.errors import BusUnreachable, McpError, NoAnswer, NobodyListens, NotPermitted

LOST_S = 10.0
"""How long an operation whose master went away is asked for: a new master hears of it from the agents."""

FORGOTTEN_S = 3.0
"""How long a master that knows its whole fleet may say that there is no such operation before it is believed."""

FOREVER_S = 24 * 3600.0

TURN_S = 0.1

DOING = {
    "deploy": "deploying",
    "undeploy": "undeploying",
    "start": "starting",
    "stop": "stopping",
    "restart": "restarting",
}
DONE = {
    "deploy": "deployed",
    "undeploy": "undeployed",
    "start": "started",
    "stop": "stopped",
    "restart": "restarted",
}


class Operation:
    """One operation as this terminal sees it."""

    def __init__(self, session: Session, kind: str, service: str) -> None:
        self._session = session
        self.kind = kind
        self.service = service
        self.op = ""
        self.accepted = asyncio.Event()
        self._steps: dict[str, Plain] = {}
        self._progress: Progress | None = None
        self._heard_s = time.monotonic()
        self._give_up_s = time.monotonic() + session.limit_s(FOREVER_S)

    @classmethod
    def known(cls, session: Session, op: str, kind: str, service: str) -> Operation:
        """Return an operation that runs already."""
        made = cls(session, kind, service)
        made._accept(op)
        return made

    async def carry_out(self, body: Plain, *, title: str, is_detached: bool = False, is_sealed: bool = False) -> Plain:
        """Have the master do it and return how it ended; detached: that it was taken on.

        Raises:
            BusUnreachable, NobodyListens, NotPermitted: nothing was started.
        """
        interrupt.on_interrupt("interrupted; whether the master has taken it on, `mcp op list` shows")
        async with self._shown(title):
            asked = asyncio.create_task(self._session.patiently(lambda: self._ask(body, is_sealed=is_sealed)))
            taken = asyncio.create_task(self.accepted.wait())
            await asyncio.wait({asked, taken} if is_detached else {asked}, return_when=asyncio.FIRST_COMPLETED)
            taken.cancel()
            if is_detached and not asked.done():
                asked.cancel()
                with suppress(asyncio.CancelledError):
                    await asked
                return self._unfinished("running", "")
            try:
                return await asked
            except Declined as error:
                return self._declined(error)
            except NoAnswer as error:
                return await self._lost(error)

    async def follow(self, title: str) -> Plain:
        """Follow an operation that is known to run, to its end."""
        async with self._shown(title):
            return await self._found_again(NoAnswer("it was not followed yet"), say=False)

    async def _ask(self, body: Plain, *, is_sealed: bool) -> Plain:
        left_s = max(self._give_up_s - time.monotonic(), 0.1)
        kind = f"{self.kind}_service"
        return await self._session.ask(
            kind, body, timeout_s=left_s, idle_s=min(SILENCE_S, left_s), on_frame=self._heard, is_sealed=is_sealed
        )

    # ------------------------------------------------------------------ hearing

    def _heard(self, kind: str, body: Plain) -> None:
        self._heard_s = time.monotonic()
        if kind == "operation_accepted":
            self._accept(str(body.get("op", "")))
        step = body.get("step")
        if kind == "operation_progress" and isinstance(step, dict):
            self._steps[str(step.get("step"))] = step
            if self._progress:
                self._progress.step(step)

    def _accept(self, op: str) -> None:
        self.op = op
        self.accepted.set()
        word = safe(op)
        interrupt.on_interrupt(
            f"still running as op {word}; `mcp op cancel {word}` stops it, `mcp op show {word}` shows it"
        )

    @asynccontextmanager
    async def _shown(self, title: str) -> AsyncIterator[None]:
        self._progress = Progress(self._session.out, title)
        turning = asyncio.create_task(self._turn()) if self._session.out.is_live else None
        try:
            yield
        finally:
            if turning:
                turning.cancel()
            self._progress.end()

    async def _turn(self) -> None:
        while self._progress:
            self._progress.turn()
            await asyncio.sleep(TURN_S)

    # --------------------------------------------------------------- bad news

    def _declined(self, error: Declined) -> Plain:
        outcome = "unknown" if error.code == "internal" else "refused"
        return self._unfinished(outcome, error.reason) | {"code": error.code, "hint": error.hint}

    async def _lost(self, error: NoAnswer) -> Plain:
        if not self.op:
            hint = "`mcp op list` and `mcp status` show whether it was taken on."
            return self._unfinished("unknown", error.reason) | {"code": "no_answer", "hint": hint}
        return await self._found_again(error, say=True)

    async def _found_again(self, error: NoAnswer, *, say: bool) -> Plain:
        """Ask whoever is master now, until it tells, or for `LOST_S` without a word."""
        if say and time.monotonic() < self._give_up_s and self._progress:
            self._progress.line("  the master is silent; the operation is asked for again")
        reason = error.reason
        self._heard_s = lost_s = time.monotonic()
        while time.monotonic() < min(self._give_up_s, self._heard_s + LOST_S):
            try:
                return await self._ask_for_it()
            except Declined as declined:
                reason = declined.reason
                if declined.code != "still_learning" and time.monotonic() > lost_s + FORGOTTEN_S:
                    break
            except NotPermitted as denied:
                reason = denied.reason
                break
            except (BusUnreachable, NobodyListens, NoAnswer) as silence:
                reason = silence.reason.removesuffix(": nothing was started")
                await self._reconnect()
            await asyncio.sleep(AGAIN_S)
        if time.monotonic() >= self._give_up_s:
            reason = "it had not ended when the time given with --timeout was over"
        hint = f"`mcp op show {self.op}` tells how it ended, once the master answers."
        return self._unfinished("unknown", reason) | {"code": "no_answer", "hint": hint}

    async def _ask_for_it(self) -> Plain:
        left_s = max(self._give_up_s - time.monotonic(), 0.1)
        body = {"op": self.op, "wait": True}
        return await self._session.ask(
            "follow_operation", body, timeout_s=left_s, idle_s=min(SILENCE_S, left_s), on_frame=self._heard
        )

    async def _reconnect(self) -> None:
        with suppress(McpError):  # the next question meets it again
            await self._session.open()

    def _unfinished(self, outcome: str, reason: str) -> Plain:
        steps = list(self._steps.values())
        node = next((str(step.get("node", "")) for step in reversed(steps)), "")
        return {
            "op": self.op,
            "service": self.service,
            "kind": self.kind,
            "node": node,
            "outcome": outcome,
            "reason": reason,
            "steps": steps,
        }


# ------------------------------------------------------------------------ telling


def tell(out: Output, ended: Plain) -> None:
    """Print how an operation ended, for people."""
    kind, service = str(ended.get("kind", "")), safe(ended.get("service", ""))
    outcome = ended.get("outcome")
    for warning in ended.get("warnings", ()):
        out.warn(f"warning: {safe(warning)}")
    if outcome in ("deployed", "done", "unchanged"):
        word = "unchanged" if outcome == "unchanged" else DONE.get(kind, "done")
        where = f" on {safe(ended['node'])}" if ended.get("node") else ""
        time_taken = f" in {took(ended['seconds'])}" if ended.get("seconds") and outcome != "unchanged" else ""
        op = out.paint(f"  (op {safe(ended.get('op'))})", "dim") if ended.get("op") and outcome != "unchanged" else ""
        out.say(
            f"{service} {out.by_word(word) if word == 'unchanged' else out.paint(word, 'green')}{where}{time_taken}{op}"
        )
    elif outcome == "running":
        op = safe(ended.get("op"))
        out.say(f"{service}: {DOING.get(kind, kind)} as op {op}; `mcp op show {op}` tells how it ends")
    else:
        _tell_failure(out, ended, kind, service)
    for leftover in ended.get("leftovers", ()):
        out.warn(f"left: {safe(leftover)}")


def _tell_failure(out: Output, ended: Plain, kind: str, service: str) -> None:
    outcome, reason = ended.get("outcome"), str(ended.get("reason", "")) or "no reason was given"
    verb = kind or "finish"
    if outcome == "unknown":
        op = f" (op {ended['op']})" if ended.get("op") else ""
        reason = f"how the {verb} of {service}{op} ended is not known: {reason}"
    elif not reason.startswith(("cannot ", "operation ")):
        reason = f"cannot {verb} {service}: {reason}"
    hint = str(ended.get("hint", ""))
    if not hint and outcome == "unknown" and ended.get("op"):
        hint = f"`mcp op show {ended['op']}` tells more."
    out.complain(reason, hint)
    for log in ended.get("logs", ()):
        tell_log(out, log)
    if outcome == "undone":
        out.warn("Undone: everything is as it was before.")


def tell_log(out: Output, log: Plain) -> None:
    """Print the last lines of a container that failed."""
    how = []
    if log.get("exit_code") is not None:
        how.append(f"exit code {log['exit_code']}")
    if log.get("out_of_memory"):
        how.append("out of memory")
    ending = f" ({', '.join(how)})" if how else ""
    lines = log.get("lines") or ()
    component = safe(log.get("component", ""))
    out.warn(f"last lines of {component}{ending}:" if lines else f"{component} printed nothing{ending}")
    for line in lines:
        out.warn(f"  | {safe(line)}")


def exit_code(ended: Plain) -> int:
    """Return the exit code for how an operation ended; something left over makes a good end an unknown one."""
    if ended.get("outcome") == "running":
        return exits.DONE
    return exits.OUTCOMES.get(str(ended.get("outcome")), exits.UNKNOWN)
