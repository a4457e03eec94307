"""What the demo asks of a container engine beside what agents do: its own network, and who is on it."""

from __future__ import annotations

from collections.abc import Sequence

from mcp.adapters.docker import DockerEngine
from mcp.model.container import OWNER, OWNER_LABEL
from mcp.model.errors import AdapterError, Refused


class DemoEngine(DockerEngine):
    """An engine seen by the demo: everything it makes is on one network, so that nothing else is ever touched."""

    async def has_network(self, name: str) -> bool:
        """Say whether there is such a network."""
        async with self._client.call(f"look for network {name}") as docker:
            found = await docker.networks.list(filters={"name": [name]})  # by substring
            return any(each["Name"] == name for each in found)

    async def on_network(self, name: str) -> set[str]:
        """Return the containers of agents that belong to a network."""
        filters = {"label": [f"{OWNER_LABEL}={OWNER}"], "network": [name]}
        async with self._client.call(f"list what is on network {name}") as docker:
            found = await docker.containers.list(all=True, filters=filters)
            return {each["Names"][0].removeprefix("/") for each in found}

    async def remove_network(self, name: str) -> None:
        """Remove a network that nobody uses; absent already is fine."""
        if not await self.has_network(name):
            return
        async with self._client.call(f"remove network {name}") as docker:
            network = await docker.networks.get(name)
            await network.delete()


async def refuse_foreign_containers(engine_url: str, nodes: Sequence[str], network: str) -> None:
    """See to it that no other fleet's agents are at work on this engine under our nodes' names.

    Raises:
        Refused: they are; our agents would take their containers for their own.
        AdapterError: the engine does not answer.
    """
    for node in nodes:
        engine = DemoEngine(engine_url, node=node)
        try:
            ours = await engine.on_network(network)
            foreign = [c.name for c in await engine.list() if c.name not in ours]
        finally:
            await engine.close()
        if foreign:
            raise Refused(
                "foreign_containers",
                f"cannot make a demo fleet here: this engine runs containers of a node named {node}: {', '.join(foreign)}",
                hint="Use another engine: DOCKER_HOST=unix:///path/of/its.sock mcp demo",
            )


async def clean(engine_url: str, network: str, *, remove_network: bool) -> None:
    """Remove every container of the demo, then its network.

    Raises:
        AdapterError: the engine does not answer, or something of it would not go.
    """
    engine = DemoEngine(engine_url)
    try:
        for name in sorted(await engine.on_network(network)):
            await engine.remove(name)
        if remove_network:
            await engine.remove_network(network)
    finally:
        await engine.close()


async def check(engine_url: str) -> str:
    """Return the engine's version.

    Raises:
        AdapterError: it does not answer, with the remedy.
    """
    engine = DemoEngine(engine_url)
    try:
        return (await engine.facts()).version
    except AdapterError as error:
        raise AdapterError(
            f"no container engine answers at {engine_url}: {error.reason}",
            hint="Install and start one: `apt-get install docker.io && systemctl start docker`; or name yours: DOCKER_HOST=unix://...",
            code="no_engine",
        ) from error
    finally:
        await engine.close()


__all__ = ["DemoEngine", "check", "clean", "refuse_foreign_containers"]
