"""`mcp deploy` as a whole process against create + start + first answer done by hand with aiodocker, interleaved.

    python -m bench.deploys [ROUNDS]

Bound: the median deploy takes at most 2.2 times the direct one, starting Python included.
"""

from __future__ import annotations

import asyncio
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiodocker

from bench.figures import fleet, in_turn, ratio, row, seconds_of
from mcp.demo import image
from mcp.demo.fleet import DemoFleet, default_engine_url, resolved

BOUND = 2.2
DEFINITION = """
name = "bench{round}"
node = "orion"
[[components]]
name = "web"
image = "{image}"
[[components.routes]]
port = 8443
"""


def main() -> int:
    """Measure and print; exit 1 when the bound is not kept."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    web = image.web_image("v1")
    asyncio.run(image.load(default_engine_url(), [web]))
    with fleet(with_engine=True) as made:
        name = web.name
        ours, direct = in_turn(
            rounds, lambda i: deploy(made, name, i), lambda i: asyncio.run(by_hand(name, 20_000 + i, made.network))
        )
    times = ratio(ours, direct)
    print(row("mcp deploy, whole process", ours))
    print(row("create + start + answer by hand", direct))
    print(f"{rounds} rounds, interleaved: {times:.2f} times (bound {BOUND})")
    return 0 if times <= BOUND else 1


def deploy(made: DemoFleet, image_name: str, i: int) -> float:
    """Deploy a new service to orion; undeploying it is not measured."""
    file = Path(made.folder / f"bench{i}.toml")
    file.write_text(DEFINITION.format(round=i, image=image_name))
    words = resolved(["mcp", "--config", str(made.config), "deploy", str(file)])
    took = seconds_of(words, made.env())
    made.run(["mcp", "undeploy", f"bench{i}"])
    return took


async def by_hand(image_name: str, port: int, network: str) -> float:
    """Do the same with the engine's client: bridge network, one published port, until the first answer."""
    docker = aiodocker.Docker(url=default_engine_url())
    began = time.perf_counter()
    config: dict[str, Any] = {
        "Image": image_name,
        "Env": [f"PORT={port}"],
        "ExposedPorts": {f"{port}/tcp": {}},
        "HostConfig": {
            "NetworkMode": network,
            "PortBindings": {f"{port}/tcp": [{"HostIp": "127.0.1.2", "HostPort": str(port)}]},
            "RestartPolicy": {"Name": "unless-stopped"},
        },
    }
    container = await docker.containers.create(config, name=f"mcp-bench-direct-{port}")
    await container.start()
    while not await asyncio.to_thread(answers, port):
        await asyncio.sleep(0.005)
    took = time.perf_counter() - began
    await container.delete(force=True)
    await docker.close()
    return took


def answers(port: int) -> bool:
    """Say whether the page is there."""
    try:
        with urllib.request.urlopen(f"http://127.0.1.2:{port}/", timeout=2) as page:
            return bool(page.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
