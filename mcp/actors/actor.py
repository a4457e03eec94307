"""The actor kernel: one bounded mailbox, handlers chosen by the class of the message, an answer for everybody who asked."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from types import UnionType
from typing import Any, ClassVar, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs

from mcp.model.errors import McpError, Refused
from mcp.model.messages import Done, Failed

log = logging.getLogger(__name__)

MAILBOX_LIMIT = 1000
"""Letters that may wait; whoever comes after them is refused, so a flood costs no memory."""

FAREWELL_S = 1.0
"""How long a stopping actor takes at most to answer the letters it leaves."""


class Reply(Protocol):
    """Where the answer to a letter goes: an order of the bus (mcp/bus/links.py), somebody who waits, or nobody."""

    op: str

    async def progress(self, message: Any) -> None:
        """Say how far it is."""

    async def final(self, message: Any) -> None:
        """Say how it ended."""

    async def failed(self, failed: Failed) -> None:
        """Say no, or that it failed."""


class Unheard:
    """The reply of a letter that nobody waits for; a failure is told to the log."""

    def __init__(self, op: str = "") -> None:
        self.op = op

    async def progress(self, message: Any) -> None:
        """Say nothing."""

    async def final(self, message: Any) -> None:
        """Say nothing."""

    async def failed(self, failed: Failed) -> None:
        """Leave a line, for nobody else will."""
        if failed.code != "stopping":
            log.warning("%s: %s", self.op or failed.code, failed.reason)


class Awaited:
    """The reply of a letter whose sender waits in this process."""

    def __init__(self, op: str = "", on_progress: Callable[[Any], None] | None = None) -> None:
        self.op = op
        self._on_progress = on_progress
        self._end: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def progress(self, message: Any) -> None:
        """Tell the sender how far it is."""
        if self._on_progress:
            self._on_progress(message)

    async def final(self, message: Any) -> None:
        """End the wait."""
        if not self._end.done():
            self._end.set_result(message)

    async def failed(self, failed: Failed) -> None:
        """End the wait with an error."""
        if not self._end.done():
            self._end.set_exception(Failure(failed))

    async def end(self) -> Any:
        """Wait for the answer.

        Raises:
            Failure: the answer is a failure.
        """
        return await self._end


class Failure(Refused):
    """A failure with all that is told of it; `failed` is the frame that travels, logs included."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.code, failed.reason, hint=failed.hint)
        self.failed = failed


@attrs.frozen(eq=False)
class Envelope:
    """One letter: a message and where its answer goes."""

    message: Any
    reply: Reply

    @property
    def op(self) -> str:
        """The operation this belongs to, "" when it is nobody's."""
        return self.reply.op

    @property
    def is_expired(self) -> bool:
        """Whether whoever asked has given up by now: then nothing is begun any more."""
        return bool(getattr(self.reply, "is_expired", False))


class _Later:
    """See LATER."""


LATER = _Later()
"""What a handler returns when somebody else gives the answer."""

Handler = Callable[..., Awaitable[Any]]
HANDLER_MARK = "_is_handler_of_an_actor"
H = TypeVar("H", bound=Handler)
T = TypeVar("T")


def handles(method: H) -> H:
    """Mark a method as the handler of the messages that its first parameter is annotated with."""
    setattr(method, HANDLER_MARK, True)
    return method


class Actor:
    """One mailbox, read by `run` letter by letter; a subclass has the handlers.

        @handles
        async def on_probe(self, order: Probe) -> ProbeAnswer: ...

    The return value is the reply (None: `Done()`); a second parameter, if there is one, gets the envelope. Our errors become
    failures with their code; any other exception is a bug: it is logged with its operation, answered, and the actor lives on.
    """

    handlers: ClassVar[Mapping[type, tuple[str, bool]]] = {}
    """Message class -> handler's name and whether it takes the envelope. What is not in here is refused."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Make the table of handlers, own ones over inherited ones."""
        super().__init_subclass__(**arguments)
        table = dict(cls.handlers)
        for name, member in vars(cls).items():
            if getattr(member, HANDLER_MARK, False):
                table.update(dict.fromkeys(_messages_of(member), (name, len(inspect.signature(member).parameters) > 2)))
        cls.handlers = table

    def __init__(self, name: str, *, limit: int = MAILBOX_LIMIT) -> None:
        self.name = name
        self._mailbox: asyncio.Queue[Envelope] = asyncio.Queue(limit)
        self._current: Envelope | None = None
        self._open: dict[int, Envelope] = {}
        self._tasks: asyncio.TaskGroup
        self._is_stopped = False

    @property
    def is_busy(self) -> bool:
        """Whether a letter is being handled right now."""
        return self._current is not None

    @property
    def waiting(self) -> int:
        """How many letters wait."""
        return self._mailbox.qsize()

    # ----------------------------------------------------------------- for senders

    def post(self, envelope: Envelope) -> None:
        """Put a letter into the mailbox; never waits.

        Raises:
            Refused: code busy (the mailbox is full) or stopping.
        """
        if self._is_stopped:
            raise Refused("stopping", f"{self.name} is stopping: nothing was done")
        try:
            self._mailbox.put_nowait(envelope)
        except asyncio.QueueFull:
            raise Refused("busy", f"{self.name} has too much to do: nothing was done", hint="Try again.") from None

    def tell(self, message: Any, *, op: str = "") -> bool:
        """Put a message into the mailbox that nobody waits for; False when there was no room."""
        try:
            self.post(Envelope(message, Unheard(op)))
        except Refused:
            return False
        return True

    async def ask(self, message: Any, *, op: str = "", on_progress: Callable[[Any], None] | None = None) -> Any:
        """Put a message into the mailbox and return its answer; how long to wait is the caller's business.

        Raises:
            Refused: busy, stopping, or what the handler raised (as Failure).
        """
        reply = Awaited(op, on_progress)
        self.post(Envelope(message, reply))
        return await reply.end()

    # ------------------------------------------------------------------------ life

    async def run(self) -> None:
        """Handle letters until cancelled; those that are left then are answered "stopping".

        Raises:
            McpError: it could not be started.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self.started()
                while True:
                    await self._take(await self._mailbox.get())
        except BaseExceptionGroup as group:
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from None
            raise
        finally:
            self._is_stopped = True
            await self._part()

    async def started(self) -> None:
        """Do what comes before the first letter; a subclass may have something."""

    async def stopped(self) -> None:
        """Do what comes after the last letter, within FAREWELL_S; a subclass may have something."""

    def spawn(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[None]:
        """Run something beside the mailbox; it ends with the actor, and its failure is logged and ends nothing else."""
        return _begin(self._tasks, self._guard(work, name), work, f"{self.name}: {name}")

    def later(self, envelope: Envelope, work: Coroutine[Any, Any, Any]) -> _Later:
        """Give a letter's answer from a task beside the mailbox: what the work returns or raises."""
        self._open[id(envelope)] = envelope
        _begin(self._tasks, self._answer_later(envelope, work), work, f"{self.name}: {type(envelope.message).__name__}")
        return LATER

    def hand_over(self, envelope: Envelope, other: Actor, reply: Reply | None = None) -> _Later:
        """Let another actor answer a letter, if need be through another reply.

        Raises:
            Refused: it cannot take it; then the letter is still ours.
        """
        other.post(Envelope(envelope.message, reply or envelope.reply))
        return LATER

    # --------------------------------------------------------------------- letters

    async def handle(self, envelope: Envelope) -> Any:
        """Find the handler of a letter and return its answer; a subclass may look at the letter first.

        Raises:
            Refused: code unknown_message.
        """
        found = self.handlers.get(type(envelope.message))
        if found is None:
            raise Refused(
                "unknown_message", f"{self.name} does not know {type(envelope.message).__name__}: nothing was done"
            )
        name, takes_envelope = found
        handler = getattr(self, name)
        return await (handler(envelope.message, envelope) if takes_envelope else handler(envelope.message))

    async def _take(self, envelope: Envelope) -> None:
        if envelope.is_expired:
            reason = f"{self.name} got to {type(envelope.message).__name__} after its deadline: nothing was done"
            await envelope.reply.failed(Failed(code="expired", reason=reason))
            return
        self._current = envelope
        await self._answer(envelope, self.handle(envelope))
        self._current = None  # not when cancelled: then it is answered at the end

    async def _answer_later(self, envelope: Envelope, work: Coroutine[Any, Any, Any]) -> None:
        await self._answer(envelope, work)
        del self._open[id(envelope)]

    async def _answer(self, envelope: Envelope, work: Coroutine[Any, Any, Any]) -> None:
        try:
            answer = await work
            if answer is not LATER:
                await envelope.reply.final(Done() if answer is None else answer)
        except McpError as error:
            await envelope.reply.failed(failed_from(error))
        except Exception as error:  # noqa: BLE001
            # A bug met by one letter must not end the actor: it is logged where its operation can be found, and told.
            await envelope.reply.failed(self._bug(envelope, error))

    def _bug(self, envelope: Envelope, error: Exception) -> Failed:
        what = type(envelope.message).__name__
        op = envelope.op or "(none)"
        facts = {"operation": op}
        log.error("%s failed on %s, operation %s: a bug", self.name, what, op, extra=facts, exc_info=error)
        return Failed(
            code="internal",
            reason=f"{self.name} failed on {what}, operation {op}: a bug; what was done so far stays until it is asked again",
            hint=f"Its log has the details: `journalctl -u mcp-agent -u mcp-master | grep {op}`.",
        )

    async def _guard(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        try:
            await work
        except McpError as error:
            log.warning("%s: %s: %s", self.name, name, error.reason)
        except Exception:
            # As above: what runs beside the mailbox must not end the actor either.
            log.exception("%s: %s failed: a bug", self.name, name)

    async def _part(self) -> None:
        """Answer whoever still waits, so that nobody does for ever."""
        left = list(self._open.values()) + ([self._current] if self._current else [])
        while not self._mailbox.empty():
            left.append(self._mailbox.get_nowait())
        failed = Failed(code="stopping", reason=f"{self.name} is stopping", retryable=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                for envelope in left:
                    await envelope.reply.failed(failed)
                await self.stopped()


class Alarm:
    """Cuts short whatever is awaited under it; a ring that comes before the wait counts too."""

    def __init__(self) -> None:
        self._scope: asyncio.Timeout | None = None
        self._has_rung = False

    async def unless_rung(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Wait for some work and return its result; None when the alarm cut it short (then the work was cancelled)."""
        result = None
        try:
            if not self._has_rung:
                async with asyncio.timeout(None) as self._scope:
                    result = await work
        except TimeoutError:
            if not self._has_rung:
                raise
        finally:
            work.close()
            self._scope, self._has_rung = None, False
        return result

    def ring(self) -> None:
        """End the wait, or the next one."""
        self._has_rung = True
        if self._scope and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())


def _begin(
    group: asyncio.TaskGroup, guarded: Coroutine[Any, Any, None], work: Coroutine[Any, Any, Any], name: str
) -> asyncio.Task[None]:
    task = group.create_task(guarded, name=name)
    # Cancelled before its first step, a task never gets to the work inside, which would then complain.
    task.add_done_callback(lambda _: work.close())
    return task


def failed_from(error: McpError) -> Failed:
    """Turn one of our errors into the frame that travels; one that has such a frame already passes it on, logs included."""
    failed = getattr(error, "failed", None)
    if isinstance(failed, Failed):
        return failed
    return Failed(
        code=error.code, reason=error.reason, hint=error.hint, retryable=bool(getattr(error, "retryable", False))
    )


def _messages_of(method: Any) -> tuple[type, ...]:
    """Return the classes that a handler's first parameter is annotated with."""
    parameter = list(inspect.signature(method).parameters)[1]
    annotation = get_type_hints(method)[parameter]
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
