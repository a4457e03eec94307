"""A command's connection to its fleet: who we are, questions with limits, and what is said when nobody is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from ssl import CertificateError

from mcp.bus.nats_bus import BusAddress, Credential, NatsTransport, connect
from mcp.bus.plain import Declined, OnPlain, Plain, PlainLink
from mcp.cli import exits
from mcp.cli.output import Output
from mcp.cli.settings import Settings
from mcp.config.cli import CliConfig, load_cli
from mcp.model.errors import BadDefinition, BusUnreachable, NoAnswer, NobodyListens, NotPermitted

CONNECT_S = 1.6
"""With the start of Python it stays below the 2 s in which an operator hears that there is no bus."""

QUESTION_S = 10.0
"""How long a question that the master answers from memory may take."""

SILENCE_S = 3.0
"""The master says every second that an operation lives; after this long without a word it is taken for gone."""

LEARNING_S = 5.0
"""A master that has just started asks its agents first; so long a command waits for it without a word."""

AGAIN_S = 0.2

HINT_OTHER = (
    "Your file is of another fleet, or the bus was set up anew. On the master's machine `mcp operator add NAME > NAME.mcp`"
    " makes a new one; then here: `mcp login NAME.mcp --force`."
)

# What the bus layer logs is for daemons; a command says itself what went wrong.
logging.getLogger().addHandler(logging.NullHandler())


class Session:
    """One connection of one operator; made by `run`."""

    def __init__(self, settings: Settings, config: CliConfig, out: Output) -> None:
        self.settings = settings
        self.config = config
        self.out = out
        self._link: PlainLink | None = None

    @property
    def user(self) -> str:
        """The operator we are."""
        return self.config.operator

    @property
    def where(self) -> str:
        """The bus we mean, for people."""
        return f"{self.config.bus.address}:{self.config.bus.port}"

    def limit_s(self, default_s: float) -> float:
        """Return how long to wait: --timeout, else [defaults] timeout_s, else this."""
        return self.settings.timeout_s or self.config.timeout_s or default_s

    async def open(self) -> None:
        """Connect, or connect again.

        Raises:
            BusUnreachable: there is no bus; within 2 s.
            NotPermitted: it does not know us.
        """
        await self.close()
        transport = await self._connected()
        link = PlainLink(transport, self.user)
        await link.start()
        self._link = link

    async def _connected(self) -> NatsTransport:
        try:
            async with asyncio.timeout(CONNECT_S):
                try:
                    return await self._attempt()
                except (NotPermitted, BusUnreachable) as error:
                    # Whoever is in mid-handshake while the bus reads its configuration anew is refused, or cut off, once.
                    if isinstance(error.__cause__, ConnectionRefusedError | CertificateError):
                        raise
                    await asyncio.sleep(AGAIN_S)
                return await self._attempt()
        except TimeoutError as error:
            reason = f"cannot connect to the bus at {self.where}: no answer within {CONNECT_S:g} s"
            raise BusUnreachable(reason, hint=self._hint_no_bus()) from error
        except BusUnreachable as error:
            is_other = isinstance(error.__cause__, CertificateError)
            error.hint = HINT_OTHER if is_other else error.hint or self._hint_no_bus()
            raise
        except NotPermitted as error:
            error.code = "wrong_credential"
            error.hint = (
                "It was removed, or is of another fleet. On the master's machine"
                f" `mcp operator add {self.user} > {self.user}.mcp` makes a new one; then here: `mcp login {self.user}.mcp`."
            )
            raise

    async def _attempt(self) -> NatsTransport:
        bus = self.config.bus
        address = BusAddress(host=bus.address, port=bus.port, tls_name=bus.tls_name, ca_pem=authority_of(self.config))
        credential = Credential(role="operator", name=self.user, seed=self.config.seed)
        return await connect(address, credential, forever=False, name=f"mcp {self.user}")

    def _hint_no_bus(self) -> str:
        return (
            "Is the mesh up here, and the bus running there? On the master's machine: `systemctl status mcp-bus`"
            " (or start it: `mcp bus run`)."
        )

    async def question(
        self, kind: str, body: Plain, *, timeout_s: float = QUESTION_S, on_frame: OnPlain | None = None
    ) -> Plain:
        """Ask for something that changes nothing; a master that is still learning is asked again for a while.

        Raises:
            Unanswered: the master does not answer; nothing was started.
            McpError: see PlainLink.ask.
        """
        limit_s = self.limit_s(timeout_s)
        try:
            return await self.patiently(
                lambda: self.ask(kind, body, timeout_s=limit_s, idle_s=min(limit_s, SILENCE_S), on_frame=on_frame)
            )
        except NoAnswer as error:
            raise exits.Unanswered(
                f"the master does not answer ({kind.replace('_', ' ')}, {min(limit_s, SILENCE_S):g} s): nothing was started",
                hint="On the master's machine: `systemctl status mcp-master`.",
            ) from error

    async def change(self, kind: str, body: Plain, *, timeout_s: float) -> Plain:
        """Ask for a change that has no steps to follow."""
        limit_s = self.limit_s(timeout_s)
        return await self.patiently(lambda: self.ask(kind, body, timeout_s=limit_s, idle_s=limit_s))

    async def ask(
        self,
        kind: str,
        body: Plain,
        *,
        timeout_s: float,
        idle_s: float,
        on_frame: OnPlain | None = None,
        is_sealed: bool = False,
    ) -> Plain:
        """Ask once (see PlainLink.ask); that there is no master is said in full."""
        link = self._link
        if link is None:
            raise BusUnreachable(f"the connection to the bus at {self.where} is lost", hint=self._hint_no_bus())
        try:
            return await link.ask(
                kind, body, timeout_s=timeout_s, idle_s=idle_s, on_frame=on_frame, is_sealed=is_sealed
            )
        except NobodyListens as error:
            raise NobodyListens(
                f"the bus at {self.where} is there, but no master listens: nothing was started",
                hint="On the master's machine: `systemctl status mcp-master` (or start it: `mcp-master`).",
                code="no_master",
            ) from error

    async def tell(self, kind: str, body: Plain) -> None:
        """Say something whose answer nobody waits for; a lost bus is met by whatever is asked next."""
        if self._link is not None:
            with suppress(BusUnreachable):
                await self._link.tell(kind, body)

    async def patiently(self, ask: Callable[[], Awaitable[Plain]]) -> Plain:
        """Ask again, quietly, while the master is still learning what its agents have."""
        give_up_s = time.monotonic() + LEARNING_S
        while True:
            try:
                return await ask()
            except Declined as error:
                if error.code != "still_learning" or time.monotonic() > give_up_s:
                    raise
            await asyncio.sleep(AGAIN_S)

    async def status(self, *, service: str = "", node: str = "") -> Plain:
        """Return the fleet's status, whole: its parts put together."""
        parts: list[Plain] = []

        def keep(kind: str, body: Plain) -> None:
            if kind == "fleet_status":
                parts.append(body)

        last = await self.question("get_status", {"service": service, "node": node}, on_frame=keep)
        lists = ("services", "nodes", "operations", "problems")
        return last | {name: [row for part in (*parts, last) for row in part.get(name, ())] for name in lists}

    async def close(self) -> None:
        """Leave; not connected is fine."""
        link, self._link = self._link, None
        if link is not None:
            with suppress(Exception):  # what was asked has been answered; how the connection ends changes nothing
                await link.close()


def authority_of(config: CliConfig) -> str:
    """Return the certificate that the bus is known by.

    Raises:
        BadDefinition: it cannot be read.
    """
    if config.bus.ca_pem:
        return config.bus.ca_pem
    try:
        return Path(config.bus.ca_file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", "") or "is not text").lower()
        raise BadDefinition(
            f"cannot be read: {reason}", file=config.bus.ca_file, hint="`mcp login FILE` sets it up."
        ) from error


def configured(settings: Settings) -> CliConfig:
    """Return the operator's configuration.

    Raises:
        BadDefinition: there is none, with the way to one; or a mistake in it.
    """
    path = settings.config_file
    if "\0" in str(path):
        raise exits.Usage("a file name holds a NUL character")
    if not settings.config and not path.exists():
        raise BadDefinition(
            "is not there: this machine does not know a fleet yet",
            file=str(path),
            hint="`mcp login FILE` with a file from `mcp operator add NAME` (on the master's machine); or `mcp demo`.",
        )
    return load_cli(path)


def run(settings: Settings, work: Callable[[Session], Awaitable[int]]) -> int:
    """Connect, do the work, leave, and return its exit code.

    Raises:
        McpError: whatever ended it.
    """
    config = configured(settings)
    return asyncio.run(_run(Session(settings, config, Output(settings)), work))


async def _run(session: Session, work: Callable[[Session], Awaitable[int]]) -> int:
    await session.open()
    try:
        return await work(session)
    finally:
        await session.close()
