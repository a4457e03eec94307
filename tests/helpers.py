"""What tests of every kind need: a free port, and waiting for a condition instead of for a time."""

from __future__ import annotations

import asyncio
import inspect
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")

WAIT_S = 10.0
"""How long a condition may take by default: some five times what it takes on a busy machine."""

LOOK_S = 0.01
"""How long is waited between two looks."""


def free_port(address: str = "127.0.0.1") -> int:
    """Return a TCP port of the address that nobody listens on now; the system hands the same one out again only much later."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(what: str, look: Callable[[], T], within_s: float = WAIT_S) -> T:
    """Return what `look` returns as soon as that is true.

    A look that fails its own assertion counts as not yet:

        eventually("orion is healthy", lambda: health("orion") == "healthy")

    Raises:
        AssertionError: it was not so within `within_s` seconds; the text says what the last look saw.
    """
    end_s = time.monotonic() + within_s
    while True:
        try:
            seen: Any = look()
        except AssertionError as error:
            seen = error
        if seen and not isinstance(seen, AssertionError):
            return seen  # type: ignore[no-any-return]
        if time.monotonic() > end_s:
            raise _never(what, within_s, seen)
        time.sleep(LOOK_S)


@overload
async def soon(what: str, look: Callable[[], Awaitable[T]], within_s: float = WAIT_S) -> T: ...
@overload
async def soon(what: str, look: Callable[[], T], within_s: float = WAIT_S) -> T: ...
async def soon(what: str, look: Callable[[], Any], within_s: float = WAIT_S) -> Any:
    """Do as `eventually` does and let the event loop run meanwhile; the look may be a coroutine function.

    A look that hangs ends with the time as well.
    """
    seen: Any = "nothing: the first look did not end"
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    seen = await _result(look)
                except AssertionError as error:
                    seen = error
                if seen and not isinstance(seen, AssertionError):
                    return seen
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        raise _never(what, within_s, seen) from None


async def _result(look: Callable[[], Any]) -> Any:
    seen = look()
    return await seen if inspect.isawaitable(seen) else seen


def _never(what: str, within_s: float, seen: object) -> AssertionError:
    return AssertionError(f"not within {within_s:g} s: {what}; last seen: {seen!r}")
