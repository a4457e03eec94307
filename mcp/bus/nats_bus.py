"""The real bus: NATS over TLS, one nats-py client for each connection that lives, and a supervisor that makes the next one.

nats-py's own reconnecting is off. It waits for a dead TLS link to close politely (nats.py#671), gives up for good after
some errors, has no jitter, and buffers what a caller has long given up on. Here a client lives as long as its connection;
when that ends, for whatever reason, the supervisor drops it and makes a new one, with the same subscriptions.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import random
import socket
import ssl
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import attrs

from mcp.bus.subjects import ConnectionRole
from mcp.bus.transport import MAX_BODY_BYTES, Frame, LinkState, OnFrame
from mcp.model.errors import BusUnreachable, MalformedMessage, NotPermitted

# nats-py imports aiohttp where it finds it, for WebSockets that we never use: 140 ms and 9 MiB (BUS.md, nats-py rules), and
# its JetStream client, which is off: 40 ms of 90. Neither is looked at before a method that we never call.
_hidden: dict[str, Any] = {"aiohttp": None, "nats.js": types.ModuleType("nats.js")}
_hidden = {name: stand_in for name, stand_in in _hidden.items() if name not in sys.modules}
sys.modules.update(_hidden)
try:
    import nats.errors
    from nats.aio.client import Client
    from nats.aio.transport import TcpTransport
finally:
    for _name in _hidden:
        del sys.modules[_name]

log = logging.getLogger(__name__)

PING_S = 5
PINGS_OUT = 2
"""A silent link is noticed after 10 to 15 s on both sides."""

CLI_TIMEOUT_S = 2
DAEMON_TIMEOUT_S = 5
TCP_USER_TIMEOUT_MS = 10_000
"""The kernel gives up on unacknowledged bytes after this; its default is a quarter of an hour."""

LOOK_S = 0.5
"""How often the supervisor looks whether its client is still alive, in case no callback tells it."""

FIRST_WAITS_S = (0.05, 0.1, 0.2, 0.2, 0.3, 0.3, 0.5, 0.5, 1.0)
LONGEST_WAIT_S = 30.0
"""Waits between attempts: a bus that restarts has everybody back within a second, a dead one is not hammered."""

REFUSALS = 10
"""Authorization errors in a row before a credential counts as refused: one alone happens in a reload (BUS.md, Joining)."""


@attrs.frozen(kw_only=True)
class BusAddress:
    """Where the bus is and how to know it: by the fleet's CA, or (when joining) by its certificate's fingerprint."""

    host: str
    port: int
    tls_name: str = "mcp-bus"
    ca_pem: str = ""
    fingerprint: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@attrs.frozen(kw_only=True)
class Credential:
    """Who connects: a role, a name and the seed of its nkey."""

    role: ConnectionRole
    name: str
    seed: str = attrs.field(repr=False)


async def connect(
    address: BusAddress, credential: Credential, *, forever: bool, name: str, refusals: int = REFUSALS
) -> NatsTransport:
    """Connect and return the transport.

    With `forever` (daemons) it tries until it succeeds, and again whenever the connection is lost. Without (a command) it
    tries once, for at most 2 s, and a lost connection is closed.

    Raises:
        BusUnreachable: nobody answers there, or not the bus that was expected.
        NotPermitted: the bus does not accept the credential (with `forever`: several times in a row).
    """
    transport = NatsTransport(address, credential, forever=forever, name=name, refusals=refusals)
    await transport.open()
    return transport


# ------------------------------------------------------------------------- TLS


def tls_context(address: BusAddress) -> ssl.SSLContext:
    """Return a context that accepts the one bus that is expected, TLS 1.3 only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if address.ca_pem:
        context.load_verify_locations(cadata=address.ca_pem)
        return context
    if not address.fingerprint:
        raise BusUnreachable(f"cannot connect to the bus at {address}: neither its CA nor its certificate is known")
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the pin below is stricter than any chain
    context.sslobject_class = _pinned(address.fingerprint)
    return context


def _pinned(fingerprint: str) -> type[ssl.SSLObject]:
    class Pinned(ssl.SSLObject):
        """Ends the handshake unless the certificate is the very one that the token names."""

        def do_handshake(self) -> None:
            super().do_handshake()
            shown = hashlib.sha256(self.getpeercert(binary_form=True) or b"").hexdigest()
            if not hmac.compare_digest(shown, fingerprint.lower()):
                raise ssl.SSLCertVerificationError("the certificate is not the one that the token was made for")

    return Pinned


class _AbortingTransport(TcpTransport):  # type: ignore[misc]
    """A TCP transport that never waits for a dead peer to say goodbye, and that the kernel gives up on in time."""

    def __bool__(self) -> bool:
        return True  # or nats-py replaces a transport that is not connected yet

    async def connect(self, uri: Any, buffer_size: int, connect_timeout: int) -> None:
        await super().connect(uri, buffer_size, connect_timeout)
        raw = self._io_writer.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        if self._io_writer is not None:
            self._io_writer.transport.abort()

    async def wait_closed(self) -> None:
        """Nothing to wait for: it was aborted."""


# ------------------------------------------------------------------- transport


def _no_state(_: LinkState) -> None:
    """Nobody wants to know."""


def _no_denial(_: str, __: str) -> None:
    """Nobody wants to know."""


class NatsSubscription:
    """A pattern that lives through reconnects."""

    def __init__(self, owner: NatsTransport, pattern: str, on_frame: OnFrame) -> None:
        self._owner = owner
        self.pattern = pattern
        self.on_frame = on_frame
        self.live: Any = None

    async def close(self) -> None:
        """Hear no more; closing twice is fine."""
        await self._owner.forget(self)

    async def hear(self, msg: Any) -> None:
        """nats-py awaits this for one message after the other, so it only passes on."""
        headers = {str(key): str(value) for key, value in (msg.headers or {}).items()}
        frame = Frame(
            subject=msg.subject, body=msg.data, headers=headers, reply=msg.reply, status=headers.get("Status", "")
        )
        try:
            self.on_frame(frame)
        except Exception:
            # An error that escapes ends the subscription without a word (BUS.md, nats-py rules).
            log.exception("a frame on %s could not be taken in", msg.subject)


class NatsTransport:
    """One connection to nats-server (see Transport)."""

    def __init__(
        self, address: BusAddress, credential: Credential, *, forever: bool, name: str, refusals: int
    ) -> None:
        self.on_state: Callable[[LinkState], None] = _no_state
        self.on_denied: Callable[[str, str], None] = _no_denial
        self.address = address
        self._credential = credential
        self._forever = forever
        self._name = name
        self._refusals = refusals
        self._client: Client | None = None
        self._subscriptions: list[NatsSubscription] = []
        self._is_closed = False
        self._said: LinkState = "lost"
        self._supervisor: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self.closed_because = ""

    async def open(self) -> None:
        """Make the first connection and begin to watch it."""
        self._client = await self._first()
        self._say("connected")
        self._supervisor = asyncio.create_task(self._supervise(), name=f"bus {self._name}")

    @property
    def is_connected(self) -> bool:
        """Whether a publish would leave now."""
        return self._client is not None and self._client.is_connected and self._said == "connected"

    async def publish(self, frame: Frame) -> None:
        """Send a frame (see Transport)."""
        if len(frame.body) > MAX_BODY_BYTES:
            raise MalformedMessage(f"{len(frame.body)} bytes for {frame.subject}, the limit is {MAX_BODY_BYTES}")
        client = self._living()
        try:
            await client.publish(frame.subject, frame.body, reply=frame.reply, headers=dict(frame.headers) or None)
        except (nats.errors.Error, OSError) as error:
            raise BusUnreachable(f"the connection to the bus at {self.address} is lost: nothing was sent") from error

    async def subscribe(self, pattern: str, on_frame: OnFrame) -> NatsSubscription:
        """Hear a pattern (see Transport)."""
        client = self._living()
        subscription = NatsSubscription(self, pattern, on_frame)
        self._subscriptions.append(subscription)
        try:
            subscription.live = await client.subscribe(pattern, cb=subscription.hear)
        except (nats.errors.Error, OSError) as error:
            self._subscriptions.remove(subscription)
            raise BusUnreachable(f"the connection to the bus at {self.address} is lost") from error
        return subscription

    async def forget(self, subscription: NatsSubscription) -> None:
        """End a subscription."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
            live, subscription.live = subscription.live, None
            if live is not None:
                with suppress(nats.errors.Error, OSError):  # the connection is gone, and the subscription with it
                    await live.unsubscribe()

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Return when the server has taken all that was said before (see Transport)."""
        client = self._living()
        try:
            async with asyncio.timeout(timeout_s):
                await client.flush(timeout=max(1, int(timeout_s)))
        except (nats.errors.Error, OSError, TimeoutError, AttributeError) as error:
            raise BusUnreachable(f"the bus at {self.address} does not answer") from error

    async def close(self) -> None:
        """Leave; closing twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._supervisor:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
        client, self._client = self._client, None
        if client is not None:
            with suppress(nats.errors.Error, OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await client.flush(timeout=1)
            await _discard(client)
        self._say("closed")

    # ---------------------------------------------------------------- internals

    def _living(self) -> Client:
        if self._is_closed:
            raise BusUnreachable(f"the connection to the bus is closed{self.closed_because and ': '}{self.closed_because}")
        if not self.is_connected or self._client is None:
            raise BusUnreachable(f"the connection to the bus at {self.address} is lost: nothing was sent")
        return self._client

    def _say(self, state: LinkState) -> None:
        if state != self._said:
            self._said = state
            self.on_state(state)

    async def _first(self) -> Client:
        if not self._forever:
            return await self._attempt()
        return await self._until_connected()

    async def _until_connected(self) -> Client:
        """Try again and again, with growing waits; a credential refused several times in a row ends it."""
        attempt = refused = 0
        while True:
            try:
                return await self._attempt()
            except NotPermitted:
                refused += 1
                if refused >= self._refusals:
                    raise
            except BusUnreachable as error:
                refused = 0
                if attempt in (5, 20) or (attempt and attempt % 100 == 0):
                    log.warning("still no bus after %d attempts: %s", attempt + 1, error.reason)
            await asyncio.sleep(_wait_s(attempt))
            attempt += 1

    async def _attempt(self) -> Client:
        timeout_s = DAEMON_TIMEOUT_S if self._forever else CLI_TIMEOUT_S
        client = Client()
        client._transport = _AbortingTransport()  # noqa: SLF001 - the one way to give nats-py a transport (pinned by a test)
        said: list[Exception] = []

        async def on_error(error: Exception) -> None:
            said.append(error)
            self._heard_error(error)

        async def on_closed() -> None:
            self._ended.set()

        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(
                    servers=[f"tls://{self.address}"],
                    tls=tls_context(self.address),
                    tls_hostname=self.address.tls_name,
                    tls_handshake_first=True,
                    nkeys_seed_str=self._credential.seed,
                    name=self._name,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0.05,  # type: ignore[arg-type]
                    connect_timeout=timeout_s,
                    pending_size=0,
                    ping_interval=PING_S,
                    max_outstanding_pings=PINGS_OUT,
                    error_cb=on_error,
                    closed_cb=on_closed,
                )
        except (nats.errors.Error, OSError, TimeoutError, ValueError) as error:
            await _discard(client)
            raise self._cannot_connect(said[-1] if said else error) from error
        return client

    def _cannot_connect(self, error: Exception) -> BusUnreachable | NotPermitted:
        text = str(error)
        if "authorization violation" in text.lower() or isinstance(error, nats.errors.AuthorizationError):
            return NotPermitted(
                f"the bus at {self.address} does not accept the credential of {self._credential.role} {self._credential.name}",
                subject="",
                hint="It was removed, or belongs to another fleet.",
            )
        if isinstance(error, ssl.SSLCertVerificationError):
            why = f"it shows another certificate than expected ({getattr(error, 'verify_message', '') or error.args[-1]})"
        elif isinstance(error, ssl.SSLError):
            why = "it does not speak TLS as the bus does"
        elif isinstance(error, ConnectionRefusedError):
            why = "nothing listens there"
        elif isinstance(error, TimeoutError):
            why = "no answer in time"
        else:
            why = text or type(error).__name__
        return BusUnreachable(f"cannot connect to the bus at {self.address}: {why}")

    def _heard_error(self, error: Exception) -> None:
        """nats-py's error callback must never raise (#854); a refusal surfaces here only."""
        text = str(error)
        lowered = text.lower()
        if "permissions violation for" not in lowered:
            return
        verb = "subscribe" if "subscription" in lowered else "publish"
        subject = text.split('"')[1] if text.count('"') >= 2 else ""
        log.error("the bus refused us to %s %s", verb, subject)
        try:
            self.on_denied(verb, subject)
        except Exception:
            log.exception("a refusal of the bus could not be handled")  # nats-py's read loop would die silently of it

    async def _supervise(self) -> None:
        """Watch the client; when its connection is over, make the next one."""
        while True:
            client = self._client
            assert client is not None
            await self._until_over(client)
            self._say("lost")
            await _discard(client)
            if not self._forever:
                self._end("lost")
                return
            try:
                self._client = await self._again()
            except NotPermitted as error:
                self._end(error.reason)
                return

    async def _until_over(self, client: Client) -> None:
        self._ended.clear()
        while client.is_connected:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._ended.wait()
                    return

    async def _again(self) -> Client:
        """Connect again and bring the subscriptions back before anybody is told."""
        while True:
            client = await self._until_connected()
            try:
                for subscription in list(self._subscriptions):
                    subscription.live = await client.subscribe(subscription.pattern, cb=subscription.hear)
                await client.flush(timeout=DAEMON_TIMEOUT_S)
            except (nats.errors.Error, OSError, TimeoutError):
                await _discard(client)
                continue
            self._client = client
            self._say("connected")
            return client

    def _end(self, reason: str) -> None:
        self._is_closed = True
        self.closed_because = reason
        self._say("closed")


async def _discard(client: Client) -> None:
    """End a client without waiting for anything: its peer may be dead, its buffers full."""
    transport = client._transport  # noqa: SLF001
    if transport is not None:
        transport.close()
    with suppress(Exception):  # whatever nats-py meets while it ends, the connection is aborted already
        async with asyncio.timeout(1.0):
            await client._close(Client.CLOSED, do_cbs=False)  # noqa: SLF001
    with suppress(Exception):
        for task in (client._reading_task, client._ping_interval_task, client._flusher_task):  # noqa: SLF001
            if task is not None:
                task.cancel()


def _wait_s(attempt: int) -> float:
    """Return how long to wait after a failed attempt: quick at first, then doubling, with half of it at random."""
    if attempt < len(FIRST_WAITS_S):
        base = FIRST_WAITS_S[attempt]
    else:
        base = min(LONGEST_WAIT_S, 2.0 ** (attempt - len(FIRST_WAITS_S) + 1))
    return base * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
