"""What idle processes hold resident, after a registration and some heartbeats.

    python -m bench.memory

Bounds: an agent without an engine 32 MiB, with one 48 MiB.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bench.figures import fleet

BOUNDS_MIB = {"agent svc": 32.0, "agent orion": 48.0}
SETTLE_S = 5.0


def main() -> int:
    """Measure and print; exit 1 when a bound is not kept."""
    kept = True
    with fleet(with_engine=True) as made:
        time.sleep(SETTLE_S)
        for name, child in made.children.items():
            held = resident_mib(child.pid)
            bound = BOUNDS_MIB.get(name)
            kept = kept and (bound is None or held <= bound)
            note = {"agent svc": "no engine", "agent orion": "with an engine"}.get(name, "")
            print(f"{name:<18} {held:6.1f} MiB" + (f"  (bound {bound:g}, {note})" if bound else ""))
    return 0 if kept else 1


def resident_mib(pid: int) -> float:
    """Return what the kernel calls VmRSS."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} has ended")


if __name__ == "__main__":
    sys.exit(main())
