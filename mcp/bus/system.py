"""The system account: have the server read its configuration again, see who is connected, hear who comes and goes."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mcp.bus.server_config import ACCOUNT
from mcp.bus.subjects import grant
from mcp.bus.transport import Frame, Transport
from mcp.model.errors import AdapterError, BusUnreachable, NoAnswer
from mcp.model.values import frozen

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0
"""A reload with 1000 users took 73 ms (docs/bus.md)."""

_CONNECTIONS_AT_ONCE = 256

OnChange = Callable[[str, int, str], None]
"""Told the public key, the server's id of the connection, and the server's reason (or the client's name). Never raises."""


@frozen(kw_only=True)
class Running:
    """What the server says of itself."""

    server_id: str
    version: str
    digest: str
    """Of the configuration it runs on, as `nats-server -t` prints it."""


def _ignore(public_key: str, client_id: int, reason: str) -> None:
    pass


class System:
    """One connection of the system user, over a transport of its own (role "system").

    `on_gone` hears of every connection of the fleet's account that ended; `on_here` of every one that began, and again of
    all that live through a reload; `on_refused` of keys that were not let in (anybody can cause those: log, do not act).
    A report is a reason to probe, not a proof: a new connection may already stand (compare the ids).
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        # Two connections of this user may live at once (the master's and a command's): each hears only its own answers.
        self._inbox = f"_INBOX.system.{secrets.token_hex(8)}"
        self._asked: dict[str, asyncio.Future[Frame]] = {}
        self._serial = 0
        self.on_gone: OnChange = _ignore
        self.on_here: OnChange = _ignore
        self.on_refused: OnChange = _ignore

    async def start(self, *, watch: bool = True) -> None:
        """Begin to hear answers and, with `watch`, who comes and goes.

        Raises:
            BusUnreachable: not connected.
        """
        await self._transport.subscribe(f"{self._inbox}.>", self._on_answer)
        if watch:
            for pattern in grant("system").subscribe[1:]:
                await self._transport.subscribe(pattern, self._on_event)
        await self._transport.flush()

    async def close(self) -> None:
        """Leave."""
        await self._transport.close()

    # ------------------------------------------------------------- questions

    async def running(self) -> Running:
        """Ask the server who it is and which configuration it runs on.

        Raises:
            BusUnreachable: no connection.
            NoAnswer: it does not answer.
        """
        said = await self._ask("$SYS.REQ.SERVER.PING.VARZ")
        server, data = said.get("server", {}), said.get("data", {})
        return Running(
            server_id=server.get("id", ""), version=server.get("ver", ""), digest=data.get("config_digest", "")
        )

    async def reload(self, digest: str, *, only_if_other: bool = False) -> None:
        """Have the server read its configuration file, which must have this digest; nobody else is disconnected.

        With `only_if_other`, not when it runs on this digest already.

        Raises:
            BusUnreachable: no connection; it will read the file when it starts.
            NoAnswer: it may have read it.
            AdapterError: code bad_bus_config: it refused the file and runs on as before, or it runs on another one.
        """
        before = await self.running()
        if only_if_other and before.digest == digest:
            return
        said = await self._ask(f"$SYS.REQ.SERVER.{before.server_id}.RELOAD")
        if "error" in said:
            reason = " ".join(str(said["error"].get("description", said["error"])).split())
            raise AdapterError(f"the bus refused its new configuration: {reason}", code="bad_bus_config")
        now = await self.running()
        if now.digest != digest:
            raise AdapterError(
                "the bus runs on another configuration than the one just written", code="bad_bus_config", retryable=True
            )

    async def connections(self) -> dict[str, list[int]]:
        """Return the ids of the live connections of each public key in the fleet's account."""
        server_id = (await self.running()).server_id
        found: dict[str, list[int]] = {}
        offset = 0
        while True:
            options = {"auth": True, "acc": ACCOUNT, "limit": _CONNECTIONS_AT_ONCE, "offset": offset}
            said = (await self._ask(f"$SYS.REQ.SERVER.{server_id}.CONNZ", options)).get("data", {})
            rows = said.get("connections") or []
            for row in rows:
                found.setdefault(row.get("authorized_user", ""), []).append(row["cid"])
            offset += len(rows)
            if not rows or offset >= said.get("total", 0):
                return found

    async def _ask(self, subject: str, options: Mapping[str, object] | None = None) -> dict[str, Any]:
        self._serial += 1
        reply = f"{self._inbox}.{self._serial}"
        answer = self._asked[reply] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                body = json.dumps(options).encode() if options else b""
                await self._transport.publish(Frame(subject, body, reply=reply))
                frame = await answer
        except TimeoutError as error:
            raise NoAnswer(f"the bus does not answer {subject} (waited {ANSWER_TIMEOUT_S:.0f} s)") from error
        finally:
            del self._asked[reply]
        if frame.status:
            raise NoAnswer(f"the bus does not know {subject} (status {frame.status})")
        return _table(frame.body)

    def _on_answer(self, frame: Frame) -> None:
        waiting = self._asked.get(frame.subject)
        if waiting is not None and not waiting.done():
            waiting.set_result(frame)

    # ---------------------------------------------------------------- events

    def _on_event(self, frame: Frame) -> None:
        said = _table(frame.body)
        client = said.get("client", {})
        key, client_id, reason = str(client.get("user", "")), int(client.get("id", 0)), str(said.get("reason", ""))
        match frame.subject.rpartition(".")[2]:
            case "DISCONNECT":
                self.on_gone(key, client_id, reason)
            case "CONNECT":
                self.on_here(key, client_id, str(client.get("name", "")))
            case _:
                self.on_refused(key, client_id, reason)


def _table(body: bytes) -> dict[str, Any]:
    """Read what the server wrote; nonsense is nothing."""
    try:
        said = json.loads(body)
    except ValueError:
        log.warning("unreadable answer of the bus server")
        return {}
    return said if isinstance(said, dict) else {}


class OnDemand:
    """Reload through a connection that lives for one reload: for commands, which have no connection of their own."""

    def __init__(self, connect: Callable[[], Awaitable[Transport]]) -> None:
        self._connect = connect

    async def reload(self, digest: str, *, only_if_other: bool = False) -> None:
        """Do what `System.reload` does.

        Raises:
            BusUnreachable: no bus runs.
        """
        system = System(await self._connect())
        try:
            await system.start(watch=False)
            await system.reload(digest, only_if_other=only_if_other)
        finally:
            await system.close()


class NoBus:
    """For when the bus is known not to run: what is written is read when it starts."""

    async def reload(self, digest: str, *, only_if_other: bool = False) -> None:
        """Raise BusUnreachable."""
        raise BusUnreachable(f"the bus does not run; it will start on configuration {digest}")
