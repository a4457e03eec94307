"""Lines of keys in TOML: found by cutting a text that is known to be TOML into its statements."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.model.toml_lines import Path, TomlLines, statements

SERVICE = '''\
# a comment = "not a key"
name = "web"   # [not] = a header

[[components]]
name = "a"
cmd = [
    "one", "two",   # three, four
    """five
]""",
    'six',
]
env = { A = "1", B = "2" }

[[components]]
name = "b"
text = """
[components.health]
path = "/in-a-text"
"""
[components.health]
path = "/healthz"
[[components.routes]]
port = 1

[[components.routes]]
"quoted.key" = 2
dotted . key = 3
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("name",), 2),
        (("components",), 4),
        (("components", 0), 4),
        (("components", 0, "name"), 5),
        (("components", 0, "cmd"), 6),
        (("components", 0, "cmd", 0), 7),
        (("components", 0, "cmd", 1), 7),
        (("components", 0, "cmd", 2), 8),
        (("components", 0, "cmd", 3), 10),
        (("components", 0, "env", "B"), 12),
        (("components", 1), 14),
        (("components", 1, "text"), 16),
        (("components", 1, "health"), 20),
        (("components", 1, "health", "path"), 21),
        (("components", 1, "routes", 0, "port"), 23),
        (("components", 1, "routes", 1), 25),
        (("components", 1, "routes", 1, "quoted.key"), 26),
        (("components", 1, "routes", 1, "dotted", "key"), 27),
    ],
)
def test_a_key_is_found_on_the_line_where_its_statement_begins(path: Path, line: int) -> None:
    assert TomlLines(SERVICE).line_of(path) == line


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("components", 1, "health", "interval"), 20),
        (("components", 1, "routes", 1, "port"), 25),
        (("components", 1, "image"), 14),
        (("components", 7, "image"), 4),
        (("components", 0, "cmd", 9), 6),
        (("tier",), 0),
        ((), 0),
    ],
)
def test_a_key_that_is_missing_is_told_by_the_line_of_its_table(path: Path, line: int) -> None:
    assert TomlLines(SERVICE).line_of(path) == line


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_only_toml_line_ends_count_as_lines(newline: str) -> None:
    text = newline.join(["a = 'x\u2028y\x85z'  # \u2028", "", "b = 2"])
    assert TomlLines(text).line_of(("b",)) == 3


@pytest.mark.parametrize(
    "value",
    [
        '""',
        '""""""',
        "''''''",
        '"""a"""""',
        "'''a'''''",
        r'"\""',
        r'"""\""""',
        r"'\'",
        '"#"',
        "[[1, 2], [3]]",
        "{a = [1]}",
    ],
)
def test_a_value_does_not_hide_what_stands_below_it(value: str) -> None:
    text = f"a = {value}\nb = 1\n"
    tomllib.loads(text)
    assert TomlLines(text).line_of(("b",)) == 2


def test_inline_tables_are_on_the_line_of_their_statement() -> None:
    text = 'x = 1\ncomponents = [{name = "a", ports = ["p", "q"]},\n {name = "b"}]\n'
    lines = TomlLines(text)
    assert lines.line_of(("components", 0, "ports", 1)) == 2
    assert lines.line_of(("components", 1)) == 3


@pytest.mark.parametrize(
    "text", ["\n" * 65_000, "a = [\n" + "1,\n" * 20_000 + "]\nb = 1", "k=1\n#\n\n".replace("k", "a")]
)
def test_the_longest_files_are_searched_in_a_moment(text: str) -> None:
    begin_s = time.monotonic()
    TomlLines(text).line_of(("b",))
    assert time.monotonic() - begin_s < 5.0


def test_a_thousand_statements_are_searched_in_a_moment() -> None:
    text = "\n".join(f"key{i} = [{i}]" for i in range(4000))
    begin_s = time.monotonic()
    assert TomlLines(text).line_of(("key3999", 0)) == 4000
    assert time.monotonic() - begin_s < 2.0


# ----------------------------------------------------------------- for any TOML

_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_PLAIN = st.integers(-99, 99) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.dates()
_QUOTED = st.sampled_from(
    [
        "'''\n[x]\n'''",
        '"""\n#"""',
        '"""a""""',
        "'='",
        '"]"',
        "[\n1, # ]\n2,\n]",
        "[]",
        "{}",
        '{a = "}", b = [1]}',
        "07:32:00",
    ]
)


def _written(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if not hasattr(value, "isoformat") else value.isoformat()


_STATEMENT = st.tuples(
    st.just("key"), _TEXTS | st.sampled_from("ab"), _QUOTED | (_TEXTS | _PLAIN).map(_written)
) | st.tuples(
    st.sampled_from(["[x]", "[[x]]", "[a.x]", "[[a.x]]", "[a.x.b]", "[[a.x.b]]"]),
    _TEXTS | st.sampled_from("ab"),
    st.just(""),
)


def _line(statement: tuple[str, str, str], comment: str) -> str:
    kind, name, value = statement
    text = f"{_written(name)} = {value}" if kind == "key" else kind.replace("x", _written(name))
    hidden = "".join(c for c in comment if c == "\t" or c.isprintable())
    return f"{text} # {hidden}" if hidden else text


@given(st.lists(st.tuples(_STATEMENT, _TEXTS, st.integers(0, 2)), max_size=12))
def test_every_cut_is_between_statements_and_every_key_is_on_the_line_that_wrote_it(
    parts: list[tuple[tuple[str, str, str], str, int]],
) -> None:
    text, begins = "", []
    for statement, comment, blanks in parts:
        more = _line(statement, comment) + "\n"
        try:
            tomllib.loads(text + more)
        except tomllib.TOMLDecodeError:  # a key twice: not TOML
            continue
        begins.append(text.count("\n") + 1)
        text += more + "\n" * blanks
    found = list(statements(text))
    assert [text.count("\n", 0, each.begin) + 1 for each in found] == begins
    lines = TomlLines(text)
    told: set[Path] = set()
    for each, begin in zip(found, begins, strict=True):
        new = set(_paths(tomllib.loads(text[: each.end]))) - told
        end = begin + text[each.begin : each.end].rstrip().count("\n")
        assert all(begin <= lines.line_of(path) <= end for path in new)
        told |= new


def _paths(here: Any, path: Path = ()) -> Iterator[Path]:
    items = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))
