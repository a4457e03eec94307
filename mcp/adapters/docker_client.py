"""One connection to a container engine: every wait on it is bounded, and every error of it becomes ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

import aiodocker
import aiohttp
import attrs

from mcp.adapters.docker_errors import translate
from mcp.model.errors import AdapterError

_TROUBLE = (aiodocker.DockerError, aiohttp.ClientError, OSError, TimeoutError, ValueError)


@attrs.define(eq=False)
class _Session:
    """A client of the library, and how many calls are using it; one that was given up is closed by its last user."""

    docker: aiodocker.Docker
    users: int = 0
    is_given_up: bool = False

    async def leave(self) -> None:
        self.users -= 1
        await self.close_if_idle()

    async def close_if_idle(self) -> None:
        if self.is_given_up and not self.users:
            # Not Docker.close(): it waits for the library's own event task and raises what that died of.
            await self.docker.session.close()


class EngineClient:
    """Gives the library's client for one call or one stream at a time.

    `timeout_s` is how long the engine may be silent: calls that take longer by nature, and streams, go on only while
    it answers a ping. `secrets` never show up in an error.
    """

    def __init__(self, url: str, timeout_s: float, secrets: Iterable[str] = ()) -> None:
        self.timeout_s = timeout_s
        self._url = url
        self._secrets = tuple(secret for secret in secrets if secret)
        self._session: _Session | None = None

    async def close(self) -> None:
        """Close the connections, those in use too."""
        session, self._session = self._session, None
        if session is not None:
            await session.docker.session.close()

    async def renew(self) -> None:
        """Begin anew: an engine that comes back may be another version, and the library asks for it once in its life.

        Calls under way keep the connection that they have.
        """
        session, self._session = self._session, None
        if session is not None:
            session.is_given_up = True
            await session.close_if_idle()

    @asynccontextmanager
    async def call(self, what: str, limit_s: float = 0.0, *, registry: bool = False) -> AsyncIterator[aiodocker.Docker]:
        """Give a client for one call that ends within `limit_s` seconds (0: `timeout_s`); `what` completes "cannot ...".

        `registry` says that errors may be a registry's. Do not yield to a caller inside: the deadline would strike the caller.

        Raises:
            AdapterError: whatever the engine, the connection or the clock said.
        """
        limit_s = limit_s or self.timeout_s
        is_long = limit_s > self.timeout_s
        tripped: list[AdapterError] = []
        session = self._enter()
        try:
            async with asyncio.timeout(limit_s) as deadline:
                watch = asyncio.create_task(self._watch(session, what, deadline, tripped)) if is_long else None
                try:
                    await _agree_on_version(session.docker)
                    yield session.docker
                finally:
                    if watch is not None:
                        watch.cancel()
        except _TROUBLE as error:
            if tripped:
                raise tripped[0] from error
            raise await self._told(session.docker, error, what, limit_s, registry=registry) from error
        finally:
            await session.leave()

    @asynccontextmanager
    async def stream(
        self,
        what: str,
        path: str,
        *,
        method: str = "GET",
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        silence_s: float = 0.0,
        registry: bool = False,
        outlives_freezing: bool = False,
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Give the bytes of an answer as they come; without end, as long as the engine lives.

        `silence_s` bounds how long nothing may come (0: for ever, while the engine answers a ping; with
        `outlives_freezing`, also while it accepts a ping and does not answer). No deadline is open
        while the caller has the bytes, so this may be used in generators.

        Raises:
            AdapterError: as `call`; also when the connection breaks in the middle.
        """
        session = self._enter()
        response: aiohttp.ClientResponse | None = None
        try:
            async with self.call(what, silence_s, registry=registry):
                # The library has no public way to the raw bytes of these answers.
                response = await session.docker._do_query(  # noqa: SLF001
                    path,
                    method,
                    params=dict(params or {}),
                    headers=dict(headers or {}),
                    timeout=aiohttp.ClientTimeout(),
                )
            yield self._chunks(session, response, what, silence_s, outlives_freezing=outlives_freezing)
        except _TROUBLE as error:
            raise await self._told(
                session.docker, error, what, silence_s or self.timeout_s, registry=registry
            ) from error
        finally:
            if response is not None:
                response.close()
            await session.leave()

    async def _chunks(
        self,
        session: _Session,
        response: aiohttp.ClientResponse,
        what: str,
        silence_s: float,
        *,
        outlives_freezing: bool,
    ) -> AsyncIterator[bytes]:
        silent_s = 0.0
        while True:
            try:
                async with asyncio.timeout(self.timeout_s):
                    chunk = await response.content.readany()
            except TimeoutError:
                try:
                    await self._ping(session.docker, what)
                except AdapterError as error:
                    if not (outlives_freezing and error.code == "engine_frozen"):
                        raise
                silent_s += self.timeout_s
                if silence_s and silent_s >= silence_s:
                    raise
                continue
            if not chunk:
                return
            silent_s = 0.0
            yield chunk

    async def _watch(
        self, session: _Session, what: str, deadline: asyncio.Timeout, tripped: list[AdapterError]
    ) -> None:
        """End a long call early when the engine stops answering at all."""
        while True:
            await asyncio.sleep(self.timeout_s)
            try:
                await self._ping(session.docker, what)
            except AdapterError as error:
                tripped.append(error)
                deadline.reschedule(asyncio.get_running_loop().time())
                return

    async def _ping(self, docker: aiodocker.Docker, what: str) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await docker._do_query("_ping", "GET", versioned_api=False)  # noqa: SLF001 - no public ping
                await response.read()
        except _TROUBLE as error:
            raise translate(error, what, self.timeout_s, self._secrets) from error

    async def _told(
        self, docker: aiodocker.Docker, error: Exception, what: str, limit_s: float, *, registry: bool
    ) -> AdapterError:
        if registry and isinstance(error, TimeoutError):
            try:
                await self._ping(docker, what)
            except AdapterError as of_engine:
                return of_engine
        told = translate(error, what, limit_s, self._secrets, registry=registry)
        if told.code == "engine_down":
            await self.renew()
        return told

    def _enter(self) -> _Session:
        if self._session is None:
            self._session = _Session(self._connect())
        self._session.users += 1
        return self._session

    def _connect(self) -> aiodocker.Docker:
        limits = aiohttp.ClientTimeout(sock_connect=self.timeout_s)
        scheme, _, path = self._url.partition("://")
        if scheme != "unix":
            return aiodocker.Docker(url=self._url, timeout=limits)
        # The usual connector allows a hundred connections: so many followed logs would lock everything else out.
        connector = aiohttp.UnixConnector(path, limit=0)
        session = aiohttp.ClientSession(connector=connector, timeout=limits)
        docker = aiodocker.Docker(url="unix://localhost", connector=connector, session=session, timeout=limits)
        docker._connection_info = self._url  # noqa: SLF001 - what its errors name
        return docker


async def _agree_on_version(docker: aiodocker.Docker) -> None:
    """Ask for the API version before a client's first call, as the library would, but doubt the answer.

    Raises:
        ValueError: what answers is no engine.
    """
    if docker.api_version != "auto":
        return
    response = await docker._do_query("version", "GET", versioned_api=False)  # noqa: SLF001 - see above
    said = json.loads(await response.read())
    version = said.get("ApiVersion") if isinstance(said, dict) else None
    if not isinstance(version, str):
        raise ValueError("no API version")  # noqa: TRY004 - to the caller it is a bad answer like any other
    docker.api_version = f"v{version}"
