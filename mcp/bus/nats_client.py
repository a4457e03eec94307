"""nats-py with its edges taken off: it loads what we use, takes nothing for what it is not, and lets go of a dead link.

What a peer sends is never trusted here: any client of the bus chooses the bytes of its subjects, replies and headers.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import base64
import math
import re
import socket
import ssl
import sys
import types
from contextlib import suppress
from typing import Any

from mcp.bus.keys import key_of, sign

# nats-py imports aiohttp where it finds it, for WebSockets that we never use: 140 ms and 9 MiB (docs/bus.md, nats-py rules), and
# its JetStream client, which is off: 40 ms of 90. Nothing that is left in use below looks at either.
# importlib.metadata only tells it its own version: 15 ms.
_hidden: dict[str, Any] = {"aiohttp": None, "nats.js": types.ModuleType("nats.js"), "importlib.metadata": None}
_hidden = {name: stand_in for name, stand_in in _hidden.items() if name not in sys.modules}
sys.modules.update(_hidden)
try:
    import nats.protocol.parser
    from nats.aio.client import Client
    from nats.aio.transport import TcpTransport
finally:
    for _name in _hidden:
        del sys.modules[_name]

# asyncio gives each TLS connection a buffer of 256 KiB to read into; a record of TLS has at most 16 KiB.
asyncio.sslproto.SSLProtocol.max_size = 32 * 1024

TCP_USER_TIMEOUT_MS = 10_000
"""The kernel gives up on unacknowledged bytes after this; its default is a quarter of an hour."""

MAX_HEADER_BYTES = 8 * 1024
"""Headers of one message; ours have some 200 bytes. Larger ones are not looked at."""

MAX_UNSENT_BYTES = 2 * 1024 * 1024
"""What may lie here unsent before whoever publishes has to wait."""

STATUS = " status"
"""The key under which the server's own status stands among the headers: with a space, so that no client can send it."""

# nats-py splits a line at any white space, the server at blanks and tabs only. A client may put a vertical tab into its
# subject, and nats-py would read what follows as the number of the subscription: a message of one node handed to another
# node's handler, or a protocol error that ends the connection (both seen with nats-py 2.16.0).
_WORD, _GAP = rb"([^ \t\r\n]+)", rb"[ \t]+"
nats.protocol.parser.MSG_RE = re.compile(
    rb"\AMSG" + _GAP + _WORD + _GAP + _WORD + _GAP + rb"(" + _WORD + _GAP + rb")?(\d+)\r\n"
)
nats.protocol.parser.HMSG_RE = re.compile(
    rb"\AHMSG" + _GAP + _WORD + _GAP + _WORD + _GAP + rb"(" + _WORD + _GAP + rb")?(\d+)" + _GAP + rb"(\d+)\r\n"
)


class StrictClient(Client):
    """A client whose reading cannot be ended by what other clients send."""

    def __init__(self) -> None:
        super().__init__()
        self._link = self._transport = _AbortingTransport()

    async def _process_headers(self, headers: bytes | None) -> dict[str, str] | None:
        """Read headers, whatever their bytes are; nats-py's own raises on some, which ends its read loop."""
        if not headers or len(headers) > MAX_HEADER_BYTES:
            return None
        first, _, rest = headers.partition(b"\r\n")
        found: dict[str, str] = self._parse_header_lines(rest)
        code = first.removeprefix(b"NATS/1.0").split(maxsplit=1)[:1]
        if code and code[0].isdigit():
            found[STATUS] = code[0].decode("ascii")
        return found or None

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Any:
        return self.msg_class(
            subject=subject.decode("utf-8", "backslashreplace"),
            reply=reply.decode("utf-8", "backslashreplace"),
            data=data,
            headers=headers,
            _client=self,
            _sid=sid,
        )

    def _setup_nkeys_seed_connect(self) -> None:
        """Sign the server's nonce with our own key; nats-py would load a library for it (see keys.py)."""
        seed = str(self._nkeys_seed_str)
        self._public_nkey = key_of(seed).public_key
        self._signature_cb = lambda nonce: base64.b64encode(sign(seed, nonce.encode()))

    async def _process_pong(self) -> None:
        """Take a pong; nats-py's own trips over one that comes after `flush` gave up, which ends its read loop."""
        self._pings_outstanding = 0
        self._pongs_received += 1
        if self._pongs:
            asked = self._pongs.pop(0)
            if not asked.done():
                asked.set_result(True)

    async def _flush_pending(self, force_flush: bool = False) -> Any:  # noqa: FBT001, FBT002 - nats-py's own signature
        """Queue what is unsent; nats-py's own takes a cancellation for nothing, and whoever was to end lives on."""
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        queued = await super()._flush_pending(force_flush)
        if task and task.cancelling() > before:
            raise asyncio.CancelledError
        return queued

    async def all_taken(self, timeout_s: float) -> None:
        """Return when the server has taken all that was said; `flush` lets its ping overtake what is still unsent.

        Raises:
            TimeoutError: it did not in time.
        """
        async with asyncio.timeout(timeout_s):
            await self._write_out(timeout_s)
            await self.flush(math.ceil(timeout_s))

    async def settle(self, timeout_s: float) -> None:
        """Wait while more is unsent than a link that lives would leave.

        Raises:
            TimeoutError: nothing moves.
        """
        if self._pending_data_size > MAX_UNSENT_BYTES:
            await self._write_out(timeout_s)

    async def _write_out(self, timeout_s: float) -> None:
        if self._pending_data_size and self._flush_queue is not None and self.is_reading:
            written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(timeout_s):
                await self._flush_queue.put(written)
                await written

    @property
    def is_reading(self) -> bool:
        """Whether it is connected and hears; nats-py may say that it is connected while its read loop is dead."""
        return self.is_connected and self._reading_task is not None and not self._reading_task.done()

    async def discard(self) -> None:
        """End it without waiting for anything: its peer may be dead, its buffers full."""
        self._link.close()
        with suppress(Exception):  # whatever nats-py meets while it ends, the connection is aborted already
            async with asyncio.timeout(1.0):
                await self._close(Client.CLOSED, do_cbs=False)
                await self._link.wait_closed()
        # When nats-py began to close by itself and was stuck, it never came to its subscriptions.
        hearing = [sub._wait_for_msgs_task for sub in self._subs.values()]  # noqa: SLF001
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task, *hearing):
            if task is not None:
                task.cancel()


_TURNS = 20
"""Of the loop; an aborted TLS connection is closed after three."""


class _AbortingTransport(TcpTransport):
    """A TCP transport that never waits for a dead peer to say goodbye (nats.py#671), and that the kernel gives up in time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._socket: Any = None

    def __bool__(self) -> bool:
        return True  # or nats-py replaces a transport that is not connected yet

    async def connect(self, uri: Any, buffer_size: int, connect_timeout: int) -> None:
        await super().connect(uri, buffer_size, connect_timeout)
        assert self._io_writer is not None
        self._socket = self._io_writer.get_extra_info("socket")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def connect_tls(self, uri: Any, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int) -> None:
        await super().connect_tls(uri, ssl_context, buffer_size, connect_timeout)
        # After start_tls asyncio's protocol does not know that it is over TLS, and warns whenever the server hangs up.
        self._io_writer.transport.get_protocol()._over_ssl = True  # type: ignore[union-attr]  # noqa: SLF001

    def close(self) -> None:
        if self._io_writer is not None:
            self._io_writer.transport.abort()

    async def wait_closed(self) -> None:
        """Let the loop close what was aborted: no peer is waited for."""
        for _ in range(_TURNS):
            if self._socket is None or self._socket.fileno() < 0:
                return
            await asyncio.sleep(0)
