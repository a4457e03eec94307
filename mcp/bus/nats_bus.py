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
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import attrs

from mcp.bus.keys import raw_seed
from mcp.bus.nats_client import STATUS, StrictClient
from mcp.bus.subjects import ConnectionRole
from mcp.bus.transport import Frame, LinkState, OnFrame, check_frame
from mcp.model.errors import BusUnreachable, NotPermitted

import nats.errors  # isort: skip - after nats_client, which imports nats without what it would drag in

log = logging.getLogger(__name__)

PING_S = 5
PINGS_OUT = 2
"""A silent link is noticed after 10 to 15 s on both sides."""

CLI_TIMEOUT_S = 2
DAEMON_TIMEOUT_S = 5
GOODBYE_S = 1.0
"""How long a close waits for the server to take what was said last."""

LOOK_S = 0.5
"""How often the supervisor looks whether its client is still alive, in case no callback tells it."""

FIRST_WAITS_S = (0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 1.0)
LONGEST_WAIT_S = 30.0
CLOSED_PORT_WAIT_S = 2.0
"""Waits between attempts, growing, half of each at random. Where nothing listens, asking costs nobody anything: a bus that
comes back after ten minutes has everybody back in 2 s. A bus that is silent or refuses us is asked less and less."""

REFUSALS = 10
REFUSED_FOR_S = 10.0
"""So many authorization errors in a row, over so long: then the credential counts as refused. One alone happens in a reload
(docs/bus.md, Joining), a few when a server starts before its configuration is whole."""

PENDING_MESSAGES = 8192
PENDING_BYTES = 16 * 1024 * 1024
"""What may wait for the handler of one subscription; beyond it messages are dropped and counted (nats-py's own: 128 MiB)."""


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
    address: BusAddress,
    credential: Credential,
    *,
    forever: bool,
    name: str,
    refusals: int = REFUSALS,
    refused_for_s: float = REFUSED_FOR_S,
) -> NatsTransport:
    """Connect and return the transport.

    With `forever` (daemons) it tries until it succeeds, and again whenever the connection is lost. Without (a command) it
    tries once, for at most 2 s, and a lost connection is closed.

    Raises:
        BusUnreachable: nobody answers there, or not the bus that was expected.
        NotPermitted: the bus does not accept the credential (with `forever`: `refusals` times in a row, and for at least
            `refused_for_s`).
    """
    transport = NatsTransport(
        address, credential, forever=forever, name=name, refusals=refusals, refused_for_s=refused_for_s
    )
    await transport.open()
    return transport


# ------------------------------------------------------------------------- TLS


def tls_context(address: BusAddress) -> ssl.SSLContext:
    """Return a context that accepts the one bus that is expected, TLS 1.3 only."""
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)
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


class _Context(ssl.SSLContext):
    """Takes the server's name as it is: Python's rules for international names are 0.3 MiB and 5 ms of tables."""

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002 - as it is declared
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        if isinstance(server_hostname, str) and server_hostname.isascii():
            server_hostname = server_hostname.encode("ascii")
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)


def _pinned(fingerprint: str) -> type[ssl.SSLObject]:
    class Pinned(ssl.SSLObject):
        """Ends the handshake unless the certificate is the very one that the token names."""

        def do_handshake(self) -> None:
            super().do_handshake()
            shown = hashlib.sha256(self.getpeercert(binary_form=True) or b"").hexdigest()
            if not hmac.compare_digest(shown, fingerprint.lower()):
                raise ssl.SSLCertVerificationError("the certificate is not the one that the token was made for")

    return Pinned


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
        headers = msg.headers or {}
        status = headers.pop(STATUS, "")
        frame = Frame(subject=msg.subject, body=msg.data, headers=headers, reply=msg.reply, status=status)
        try:
            self.on_frame(frame)
        except (Exception, asyncio.CancelledError):
            # What escapes here ends the subscription without a word (docs/bus.md). Nothing is awaited, so a CancelledError is
            # no cancellation of ours but the result of some future that the handler looked at.
            log.exception("a frame on %r could not be taken in", msg.subject)


class NatsTransport:
    """One connection to nats-server (see Transport)."""

    def __init__(
        self,
        address: BusAddress,
        credential: Credential,
        *,
        forever: bool,
        name: str,
        refusals: int = REFUSALS,
        refused_for_s: float = REFUSED_FOR_S,
    ) -> None:
        self.on_state: Callable[[LinkState], None] = _no_state
        self.on_denied: Callable[[str, str], None] = _no_denial
        self.address = address
        self._credential = credential
        self._forever = forever
        self._name = name
        self._refusals = refusals
        self._refused_for_s = refused_for_s
        self._client: StrictClient | None = None
        self._subscriptions: list[NatsSubscription] = []
        self._is_closed = False
        self._said: LinkState = "lost"
        self._supervisor: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self.closed_because = ""
        """Why the connection is closed although nobody here asked for it; empty as long as it is not."""
        self.overruns = 0
        """Messages dropped because a handler did not keep up."""

    async def open(self) -> None:
        """Make the first connection and begin to watch it (see connect)."""
        try:
            raw_seed(self._credential.seed)
        except ValueError as error:
            who = f"{self._credential.role} {self._credential.name}"
            raise NotPermitted(f"cannot connect to the bus as {who}: its key is {error}", subject="") from error
        self._client = await self._first()
        self._say("connected")
        self._supervisor = asyncio.create_task(self._supervise(), name=f"bus {self._name}")

    @property
    def is_connected(self) -> bool:
        """Whether a publish would leave now."""
        return self._client is not None and self._client.is_connected and self._said == "connected"

    async def publish(self, frame: Frame) -> None:
        """Send a frame (see Transport)."""
        check_frame(frame)
        client = self._living()
        try:
            await client.settle(PING_S * PINGS_OUT)
            await client.publish(frame.subject, frame.body, reply=frame.reply, headers=dict(frame.headers) or None)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise BusUnreachable(f"the connection to the bus at {self.address} is lost: nothing was sent") from error

    async def subscribe(self, pattern: str, on_frame: OnFrame) -> NatsSubscription:
        """Hear a pattern (see Transport)."""
        client = self._living()
        subscription = NatsSubscription(self, pattern, on_frame)
        self._subscriptions.append(subscription)
        try:
            await self._revive(client, subscription)
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
            await client.all_taken(timeout_s)
        except (nats.errors.Error, OSError, TimeoutError, AttributeError) as error:
            raise BusUnreachable(f"the bus at {self.address} does not answer") from error

    async def close(self) -> None:
        """Leave; closing twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._supervisor:
            await _end(self._supervisor)
        client, self._client = self._client, None
        if client is not None:
            with suppress(nats.errors.Error, OSError, TimeoutError):
                await client.all_taken(GOODBYE_S)
            await client.discard()
        self._say("closed")

    # ---------------------------------------------------------------- internals

    def _living(self) -> StrictClient:
        if self._is_closed:
            raise BusUnreachable(
                f"the connection to the bus is closed{self.closed_because and ': '}{self.closed_because}"
            )
        if not self.is_connected or self._client is None:
            raise BusUnreachable(f"the connection to the bus at {self.address} is lost: nothing was sent")
        return self._client

    def _say(self, state: LinkState) -> None:
        if state != self._said:
            self._said = state
            self.on_state(state)

    async def _first(self) -> StrictClient:
        if not self._forever:
            return await self._attempt()
        return await self._until_connected()

    async def _until_connected(self) -> StrictClient:
        """Try again and again, with growing waits; a credential refused often enough and long enough ends it."""
        loop = asyncio.get_running_loop()
        attempt = refused = 0
        refused_since_s = 0.0
        while True:
            longest_s = LONGEST_WAIT_S
            try:
                return await self._attempt()
            except NotPermitted:
                refused += 1
                refused_since_s = refused_since_s if refused > 1 else loop.time()
                if refused >= self._refusals and loop.time() - refused_since_s >= self._refused_for_s:
                    raise
            except BusUnreachable as error:
                refused = 0
                longest_s = CLOSED_PORT_WAIT_S if _is_closed_port(error.__cause__) else LONGEST_WAIT_S
                if attempt in (5, 20) or (attempt and attempt % 100 == 0):
                    log.warning("still no bus after %d attempts: %s", attempt + 1, error.reason)
            await asyncio.sleep(_wait_s(attempt, longest_s))
            attempt += 1

    async def _attempt(self) -> StrictClient:
        timeout_s = DAEMON_TIMEOUT_S if self._forever else CLI_TIMEOUT_S
        client = StrictClient()
        said: list[Exception] = []

        async def on_error(error: Exception) -> None:
            said.append(error)
            del said[:-1]
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
            await client.discard()
            shown = said[-1] if said and not isinstance(error, TimeoutError) else error
            raise self._cannot_connect(shown) from shown
        except BaseException:
            await client.discard()  # cancelled in the middle: the socket must not stay behind
            raise
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
            why = (
                f"it shows another certificate than expected ({getattr(error, 'verify_message', '') or error.args[-1]})"
            )
        elif isinstance(error, ssl.SSLError):
            why = "it does not speak TLS as the bus does"
        elif isinstance(error, ConnectionRefusedError):
            why = "nothing listens there"
        elif isinstance(error, TimeoutError):
            why = "no answer in time"
        elif isinstance(error, ConnectionError):
            # A server that reads its configuration anew does this to whoever is just coming in: worth a second try.
            why = "it hung up in the middle of the greeting: is it a bus, with TLS 1.3?"
            return BusUnreachable(f"cannot connect to the bus at {self.address}: {why}", code="hung_up")
        else:
            why = text or type(error).__name__
        return BusUnreachable(f"cannot connect to the bus at {self.address}: {why}")

    def _heard_error(self, error: Exception) -> None:
        """nats-py's error callback must never raise (#854); a refusal surfaces here only."""
        text = str(error)
        lowered = text.lower()
        if isinstance(error, nats.errors.SlowConsumerError):
            self.overruns += 1
            if self.overruns in (1, 1000) or self.overruns % 100_000 == 0:
                log.warning("messages come faster than they are handled: %d dropped so far", self.overruns)
        if "permissions violation for" not in lowered:
            return
        verb = "subscribe" if "subscription" in lowered else "publish"
        subject = lowered.split('"')[1] if lowered.count('"') >= 2 else ""
        log.error("the bus refused us to %s %s", verb, subject)
        try:
            self.on_denied(verb, subject)
        except Exception:
            log.exception("a refusal of the bus could not be handled")  # nats-py's read loop would die silently of it

    async def _supervise(self) -> None:
        try:
            await self._keep()
        except Exception:
            # Nobody awaits this task: an error of ours must not look like a bus that never comes back.
            log.exception("the connection to the bus cannot be kept up")
            self._end("the connection to the bus failed for a reason of its own; the log has the details")

    async def _keep(self) -> None:
        """Watch the client; when its connection is over, make the next one."""
        while self._client is not None:
            client = self._client
            await self._until_over(client)
            self._say("lost")
            await client.discard()
            if not self._forever:
                self._end("it was lost")
                return
            try:
                self._client = await self._again()
            except NotPermitted as error:
                self._end(error.reason)
                return

    async def _until_over(self, client: StrictClient) -> None:
        self._ended.clear()
        while client.is_reading and not self._ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._ended.wait()

    async def _again(self) -> StrictClient:
        """Connect again and bring the subscriptions back before anybody is told."""
        while True:
            client = await self._until_connected()
            try:
                for subscription in list(self._subscriptions):
                    await self._revive(client, subscription)
                await client.all_taken(DAEMON_TIMEOUT_S)
            except (nats.errors.Error, OSError, TimeoutError):
                await client.discard()
                continue
            except BaseException:
                await client.discard()
                raise
            self._client = client
            self._say("connected")
            return client

    async def _revive(self, client: StrictClient, subscription: NatsSubscription) -> None:
        live = await client.subscribe(
            subscription.pattern,
            cb=subscription.hear,
            pending_msgs_limit=PENDING_MESSAGES,
            pending_bytes_limit=PENDING_BYTES,
        )
        if subscription in self._subscriptions:
            subscription.live = live
        else:
            await live.unsubscribe()  # it was closed in the meantime

    def _end(self, reason: str) -> None:
        self._is_closed = True
        self.closed_because = reason
        self._say("closed")


def _is_closed_port(error: BaseException | None) -> bool:
    """Say whether the answer was immediate: nothing listens there, or this machine has no way there."""
    return isinstance(error, OSError) and not isinstance(error, (TimeoutError, ssl.SSLError))


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task until it has ended: in the middle of a connect a cancellation gets lost now and then (seen)."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=LOOK_S)


def _wait_s(attempt: int, longest_s: float) -> float:
    """Return how long to wait after a failed attempt: quick at first, then doubling, with half of it at random."""
    if attempt < len(FIRST_WAITS_S):
        base = FIRST_WAITS_S[attempt]
    else:
        base = min(LONGEST_WAIT_S, 2.0 ** min(attempt - len(FIRST_WAITS_S) + 1, 10))
    return min(base, longest_s) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
