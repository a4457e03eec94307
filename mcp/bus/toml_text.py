"""The few kinds of TOML that we write: tables of strings, numbers, truths and lists of strings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

Value = str | int | float | bool | Sequence[str]
Table = Mapping[str, Value]


def toml_text(tables: Mapping[str, Table], *, heading: str = "") -> str:
    """Return a TOML document; the table named "" comes first, without a header. `heading` becomes a comment above all."""
    parts = [f"# {line}" for line in heading.splitlines()]
    for name, table in tables.items():
        parts += [f"[{name}]"] if name else []
        parts += [f"{key} = {_value(value)}" for key, value in table.items()]
    return "\n".join(parts) + "\n"


def _value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, (int, float)):
        return repr(value)
    return "[" + ", ".join(_string(item) for item in value) + "]"


def _string(text: str) -> str:
    if "\n" in text and text.replace("\n", "").isprintable() and '"' not in text and "\\" not in text:
        return f'"""\n{text}"""'
    # A JSON string is a TOML string but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
