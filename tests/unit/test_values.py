"""Value classes do what attrs.frozen would do."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.model.values import frozen


def made_by(decorator: Any) -> type:
    """Return one and the same class as a decorator makes it."""

    class Key:
        owner: str
        size: int = 0
        seed: str = attrs.field(default="", repr=False)
        seen: int = attrs.field(default=0, eq=False)

    Key.__qualname__ = "Key"
    made: type = decorator(kw_only=True)(Key)
    return made


OURS, THEIRS = made_by(frozen), made_by(attrs.frozen)
FIELDS = st.fixed_dictionaries(
    {"owner": st.text(max_size=2), "size": st.integers(0, 2), "seed": st.sampled_from("ab"), "seen": st.integers(0, 2)}
)


@given(FIELDS, FIELDS)
def test_values_are_equal_and_hash_alike_exactly_where_those_of_attrs_are(one: Any, other: Any) -> None:
    assert (OURS(**one) == OURS(**other)) is (THEIRS(**one) == THEIRS(**other))
    assert (OURS(**one) != OURS(**other)) is (THEIRS(**one) != THEIRS(**other))
    if OURS(**one) == OURS(**other):
        assert hash(OURS(**one)) == hash(OURS(**other))


@given(FIELDS)
def test_a_value_is_shown_as_attrs_shows_it(fields: Any) -> None:
    assert repr(OURS(**fields)) == repr(THEIRS(**fields))


def test_a_value_equals_no_value_of_another_class_and_nothing_else() -> None:
    assert OURS(owner="a") != THEIRS(owner="a")
    assert OURS(owner="a") != "a"


def test_a_value_cannot_be_changed_and_has_no_other_attributes() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        OURS(owner="a").owner = "b"
    assert not hasattr(OURS(owner="a"), "__dict__")
    assert attrs.evolve(OURS(owner="a", size=1), size=2) == OURS(owner="a", size=2)


def test_a_class_may_be_declared_without_arguments() -> None:
    @frozen
    class Point:
        x: int
        y: int

    match Point(1, 2):
        case Point(x, y):
            assert (x, y) == (1, 2)
