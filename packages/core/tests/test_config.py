from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pareto_core import Config, ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Config):
    size: int = 3
    note: str = ""

    def validate(self) -> None:
        self.require("size", self.size > 0, "must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Config):
    number: int
    rate: float = 0.5
    flag: bool = False
    word: str = "w"
    maybe: int | None = None
    kind: Literal["a", "b", 3] = "a"
    shape: tuple[int, int] = (1, 2)
    items: tuple[float, ...] = ()
    inner: Inner = dataclasses.field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)


finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, size=st.integers(1, 10**30), note=st.text())
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda item: st.lists(item) | st.tuples(item) | st.dictionaries(st.text(), item),
    max_leaves=8,
)
outers = st.builds(
    Outer,
    number=st.integers(),
    rate=finite | st.integers(-(10**300), 10**300),
    flag=st.booleans(),
    word=st.text(),
    maybe=st.none() | st.integers(),
    kind=st.sampled_from(["a", "b", 3]),
    shape=st.tuples(st.integers(), st.integers()),
    items=st.lists(finite),
    inner=inners,
    many=st.lists(inners, max_size=3),
    table=st.dictionaries(st.text(), st.integers(), max_size=3),
    free=st.dictionaries(st.text(), plain, max_size=3),
)


@given(outers)
def test_round_trip(config: Outer) -> None:
    text = json.dumps(config.to_json(), allow_nan=False)
    again = Outer.from_json(json.loads(text))
    assert again == config
    assert again.canonical() == config.canonical()


def test_canonical_form_by_hand() -> None:
    assert Inner(size=2, note="é").canonical() == '{"note":"\\u00e9","size":2}'
    outer = Outer(number=1, rate=2, items=[1, 2.5], shape=[3, 4])  # type: ignore[arg-type]
    assert outer.rate == 2.0
    assert isinstance(outer.rate, float)
    assert outer.items == (1.0, 2.5)
    assert outer.shape == (3, 4)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("number", "1", "an integer"),
        ("number", True, "an integer"),
        ("number", 1.0, "an integer"),
        ("number", None, "an integer"),
        ("rate", math.nan, "a finite number"),
        ("rate", math.inf, "a finite number"),
        ("rate", 10**400, "a finite number"),
        ("rate", True, "a finite number"),
        ("rate", "0.5", "a finite number"),
        ("flag", 1, "true or false"),
        ("word", 5, "a text"),
        ("maybe", "5", "an integer or nothing"),
        ("kind", "c", "'a', 'b', 3"),
        ("kind", 3.0, "'a', 'b', 3"),
        ("shape", [1], "a list of 2"),
        ("shape", [1, 2, 3], "a list of 2"),
        ("shape", "12", "a list of 2"),
        ("items", 1.0, "a list, each item a finite number"),
        ("inner", 3, "a table (Inner)"),
        ("table", [1], "a table"),
        ("table", {1: 1}, "a table"),
    ],
)
def test_wrong_types_are_refused_by_name(field: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.from_json({"number": 1, field: value})
    assert caught.value.field == field
    assert caught.value.owner == "Outer"
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("values", "owner", "field"),
    [
        ({"items": [1.0, "x"]}, "Outer", "items[1]"),
        ({"table": {"k": "x"}}, "Outer", "table.k"),
        ({"free": {"k": [1, {"z": object()}]}}, "Outer", "free.k[1].z"),
        ({"free": {"k": math.nan}}, "Outer", "free.k"),
        ({"inner": {"size": "x"}}, "Inner", "size"),
        ({"inner": {"size": 0}}, "Inner", "size"),
        ({"inner": {"colour": 1}}, "Inner", "colour"),
        ({"many": [{"size": 1}, {"size": -1}]}, "Inner", "size"),
    ],
)
def test_nested_fields_are_refused_by_name(values: dict[str, Any], owner: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.from_json({"number": 1, **values})
    assert (caught.value.owner, caught.value.field) == (owner, field)


def test_unknown_and_missing_fields() -> None:
    with pytest.raises(ConfigError, match=r"Outer\.numbre = 1: no such field; did you mean 'number'\?"):
        Outer.from_json({"numbre": 1})
    with pytest.raises(ConfigError, match=r"Outer\.number = None: this field is required"):
        Outer.from_json({})
    with pytest.raises(ConfigError, match="expected a table of fields"):
        Outer.from_json([1])  # type: ignore[arg-type]


def test_what_python_makes_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"Inner\.size = 0: must be above 0"):
        Inner(size=0)
    with pytest.raises(ConfigError, match=r"Inner\.size = 'x': expected an integer"):
        dataclasses.replace(Inner(), size="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().size = 4  # type: ignore[misc]


def test_integers_of_any_size_are_kept_or_refused_by_name() -> None:
    huge = 16**5000
    assert Outer(number=huge).number == huge
    with pytest.raises(ConfigError, match=r"Outer\.rate = a value of type int that is too large to show"):
        Outer(number=1, rate=huge)


def test_free_tables_have_a_limit_of_depth() -> None:
    deep: Any = 1
    for _ in range(32):
        deep = {"k": [deep]} if isinstance(deep, dict) else {"k": deep}
    with pytest.raises(ConfigError, match="nested more than 32 levels deep"):
        Outer(number=1, free=deep)
    within = {"k": [{"k": [1, {"k": 2.5}]}]}
    assert Outer(number=1, free=within).free == within
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ConfigError, match=r"Outer\.free\.k.*nested more than 32 levels deep"):
        Outer(number=1, free={"k": endless})


def test_a_table_without_types_of_its_own_is_checked_too() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bare(Config):
        table: dict = dataclasses.field(default_factory=dict)  # type: ignore[type-arg]

    assert Bare(table={"k": (1, 2)}).table == {"k": [1, 2]}
    with pytest.raises(ConfigError, match=r"Bare\.table\.k"):
        Bare(table={"k": object()})
