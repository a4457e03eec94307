"""The door of the `mcp` program: it listens for Ctrl-C before anything else is loaded, then hands over to the commands."""

from __future__ import annotations

import gc
import sys

from mcp.cli import interrupt


def main() -> None:
    """Run a command line and leave with its exit code (docs/cli.md)."""
    gc.set_threshold(50_000)  # what is being loaded is no garbage: looking for some took 4 % of a command's time
    interrupt.listen(as_json="--json" in sys.argv)
    from mcp.cli import run  # now a Ctrl-C while things are loaded is answered in one line

    run.leave(run.run(sys.argv[1:]))


if __name__ == "__main__":
    main()
