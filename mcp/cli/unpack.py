"""`mcp-unpack SUBJECT < payload`: one message of the bus as one line of JSON, for `nats sub --translate`.

One process per message, so it loads msgpack and json only. What travels on the sealed lanes carries secrets: there only what
is known to be harmless is shown.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import msgpack

MAX_BYTES = 1024 * 1024
MASK = "***"

OPEN_KEYS = frozenset(
    (
        "name",
        "service",
        "services",
        "component",
        "components",
        "node",
        "tier",
        "version",
        "active",
        "image",
        "images",
        "generation",
        "spec",
        "spec_hash",
        "op",
        "kind",
        "routes",
        "hostname",
        "port",
        "mode",
        "public",
        "volumes",
        "host_path",
        "container_path",
        "read_only",
        "network",
        "user",
        "restart",
        "ports",
        "host_port",
        "container_port",
        "protocol",
        "memory_bytes",
        "cpu_cores",
        "stop_grace_s",
        "update",
        "health",
        "interval_s",
        "timeout_s",
        "tcp",
        "path",
        "world",
        "force",
        "follow",
        "tail",
        "since_s",
        "stream",
        "credit",
        "desired",
    )
)
"""Keys whose values are shown on a sealed lane."""

SECRET_WORDS = ("password", "secret", "token", "seed", "private", "credential")
"""Keys with these words in them are masked on every lane."""

USAGE = """\
Usage: mcp-unpack [SUBJECT] < payload

Prints one message of the bus as one line of JSON; secrets are masked.

Example:
  nats sub 'mcp.>' --translate 'mcp-unpack {{Subject}}'
"""


def main() -> None:
    """Read a payload from stdin and print it; rubbish is described, never an error."""
    if any(word in ("-h", "--help") for word in sys.argv[1:]):
        sys.stdout.write(USAGE)
        return
    subject = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        payload = sys.stdin.buffer.read(MAX_BYTES + 1)
        print(line(subject, payload))
        sys.stdout.flush()
    except (OSError, KeyboardInterrupt):
        # The reader has gone: nobody is left to be told. Python must not try to flush again.
        sys.stdout = None


def line(subject: str, payload: bytes) -> str:
    """Return a payload as one line of JSON."""
    return json.dumps(shown(subject, payload), ensure_ascii=True, sort_keys=False)


def shown(subject: str, payload: bytes) -> Any:
    """Return a payload as plain values with its secrets masked, or what is wrong with it."""
    if not payload:
        return None
    if len(payload) > MAX_BYTES:
        return {"not_msgpack": f"more than {MAX_BYTES} bytes"}
    try:
        value = msgpack.unpackb(payload, strict_map_key=False, timestamp=0)
        return masked(value, is_sealed=subject.startswith("sealed."))
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        return {"not_msgpack": type(error).__name__, "bytes": len(payload)}


def masked(value: Any, *, is_sealed: bool, key: str = "") -> Any:
    """Return a value that may be shown: strings, numbers, lists and maps, without secrets."""
    if isinstance(value, dict):
        return {_text(name): masked(each, is_sealed=is_sealed, key=_text(name)) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(each, is_sealed=is_sealed, key=key) for each in value]
    if value is None or value == "" or isinstance(value, bool):
        return value
    if (is_sealed and key not in OPEN_KEYS) or any(word in key.lower() for word in SECRET_WORDS):
        return MASK
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, int) else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(value).encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    main()
