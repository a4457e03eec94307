"""How long commands take to start and answer, as multiples of `python -c pass` measured in the same run.

    python -m bench.startup [ROUNDS]

Bounds: `mcp --help` 7, `mcp status` of a four-node fleet 20.
"""

from __future__ import annotations

import sys

from bench.figures import fleet, in_turn, ratio, row, seconds_of
from mcp.demo.fleet import resolved

BOUNDS = {"mcp --help": 7.0, "mcp status": 20.0}


def main() -> int:
    """Measure and print; exit 1 when a bound is not kept."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with fleet(with_engine=False) as made:
        env = made.env()
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "mcp --help": resolved(["mcp", "--help"]),
            "mcp status": resolved(["mcp", "--config", str(made.config), "status"]),
        }
        for words in commands.values():
            seconds_of(words, env)  # once to warm the caches
        taken = dict(
            zip(
                commands,
                in_turn(rounds, *[lambda _, w=words: seconds_of(w, env) for words in commands.values()]),
                strict=True,
            )
        )
    kept = True
    for name, values in taken.items():
        times = ratio(values, taken["python -c pass"])
        bound = BOUNDS.get(name)
        kept = kept and (bound is None or times <= bound)
        print(row(name, values), f"  {times:5.1f} times" + (f" (bound {bound:g})" if bound else ""))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
