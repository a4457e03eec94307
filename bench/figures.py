"""Whole processes, timed from outside: medians, and ratios taken in the same run."""

from __future__ import annotations

import compileall
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import mcp
from mcp.demo.fleet import DemoFleet, default_engine_url


def seconds_of(words: Sequence[str], env: Mapping[str, str] | None = None, *, ok: Sequence[int] = (0,)) -> float:
    """Run a command to its end and return how long it took."""
    began = time.perf_counter()
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    took = time.perf_counter() - began
    if done.returncode not in ok:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr or done.stdout}")
    return took


def in_turn(rounds: int, *measures: Callable[[int], float]) -> list[list[float]]:
    """Take each measure in turn, A B A B..., so that a machine that slows down does so for all of them."""
    taken: list[list[float]] = [[] for _ in measures]
    for i in range(rounds):
        for kept, measure in zip(taken, measures, strict=True):
            kept.append(measure(i))
    return taken


def row(name: str, values: Sequence[float]) -> str:
    """Write the minimum, the median and the maximum of seconds, in milliseconds."""
    low, mid, high = (1000 * f(values) for f in (min, statistics.median, max))
    return f"{name:<34} min {low:7.1f}   median {mid:7.1f}   max {high:7.1f} ms"


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the ratio of the medians."""
    return statistics.median(a) / statistics.median(b)


@contextmanager
def fleet(*, with_engine: bool) -> Iterator[DemoFleet]:
    """Give a four-node fleet of real processes, removed afterwards; its code is compiled, as pip leaves what it installs."""
    compileall.compile_dir(Path(mcp.__file__).parent, quiet=1)
    engine_url = default_engine_url() if with_engine else ""
    with (
        tempfile.TemporaryDirectory(prefix="mcp-bench-") as folder,
        DemoFleet(Path(folder) / "fleet", engine_url=engine_url, network="mcpbench") as made,
    ):
        yield made
