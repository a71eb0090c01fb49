"""Tests of the plugin configuration: parsing, validation and error messages."""

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.plugins.config import (
    ConfigError,
    Selection,
    Verification,
    build_options,
    parse_assignments,
    parse_config,
)


@dataclass(frozen=True)
class Options:
    budget: int = 5
    rate: float = 0.5
    mode: Literal["a", "b"] = "a"
    path: str | None = None
    layers: tuple[int, ...] = ()
    on: bool = True

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget: expected at least 1, got {self.budget}")


def error_message(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        build_options(Options, values, "pilotfish.drafter")
    return str(caught.value)


def test_options_are_built_and_integers_become_floats() -> None:
    assert build_options(Options, {"rate": 1, "layers": [1, 2], "path": "x"}, "p") == Options(5, 1.0, "a", "x", (1, 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budgets": 3}, "pilotfish.drafter.budgets: unknown, did you mean 'budget'?"),
        ({"zzz": 3}, "pilotfish.drafter.zzz: unknown, known are: budget, layers, mode, on, path, rate"),
        ({"budget": "3"}, "pilotfish.drafter.budget: expected int, got '3'"),
        ({"budget": True}, "pilotfish.drafter.budget: expected int, got True"),
        ({"budget": 1.5}, "pilotfish.drafter.budget: expected int, got 1.5"),
        ({"on": 1}, "pilotfish.drafter.on: expected bool, got 1"),
        ({"mode": "c"}, "pilotfish.drafter.mode: expected one of 'a', 'b', got 'c'"),
        ({"path": 3}, "pilotfish.drafter.path: expected str | null, got 3"),
        ({"layers": [1, "x"]}, "pilotfish.drafter.layers[1]: expected int, got 'x'"),
        ({"layers": 1}, "pilotfish.drafter.layers: expected list of int, got 1"),
        ({"budget": 0}, "pilotfish.drafter.budget: expected at least 1, got 0"),
    ],
)
def test_option_errors_name_path_and_remedy(values: dict, message: str) -> None:
    assert error_message(values) == message


def test_whole_configuration() -> None:
    config = parse_config({"drafter": {"name": "x", "k": 3}, "allow_untested_vllm": True})
    assert config.drafter == Selection("x", {"k": 3})
    assert config.allow_untested_vllm
    assert list(config.selected()) == ["drafter"]
    assert parse_config({"kv": "razor"}).kv == Selection("razor")


def test_verification_is_read_from_drafter_options() -> None:
    config = parse_config({"drafter": {"name": "x", "k": 3, "verification": "tree", "nodes": 5}})
    assert config.drafter == Selection("x", {"k": 3})
    assert config.verification == Verification("tree", 5)
    assert parse_config({"drafter": "x"}).verification == Verification("chain", None)
    with pytest.raises(ConfigError, match=r"pilotfish\.drafter\.nodes: expected 0 to 127, got 128"):
        parse_config({"drafter": {"name": "x", "nodes": 128}})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"draftr": {}}, "pilotfish.draftr: unknown, did you mean 'drafter'?"),
        ({"drafter": {"k": 3}}, 'pilotfish.drafter: no plugin named, write {"name": ...}'),
        ({"drafter": 3}, "pilotfish.drafter: expected an object, got 3"),
        ({"drafter": {"name": 3}}, "pilotfish.drafter.name: expected str, got 3"),
        ("x", "pilotfish: expected an object, got 'x'"),
        ({"allow_untested_vllm": "yes"}, "pilotfish.allow_untested_vllm: expected bool, got 'yes'"),
    ],
)
def test_refuses_invalid_configuration(value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(value)
    assert str(caught.value) == message


def test_assignments_are_parsed() -> None:
    assert parse_assignments("tr,order=2,prime=false,path=/a/b") == Selection(
        "tr", {"order": 2, "prime": False, "path": "/a/b"}
    )
    assert parse_assignments("td,select_layers=[2,[3,4]],budget=512,x={}") == Selection(
        "td", {"select_layers": [2, [3, 4]], "budget": 512, "x": {}}
    )
    for bad in ("tr,order", "", ",a=1", "tr,=3", "td,x=[1,2"):
        with pytest.raises(ConfigError):
            parse_assignments(bad)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_value_is_parsed_or_refused(value: object) -> None:
    try:
        parse_config(value)
    except ConfigError as error:
        assert str(error).startswith("pilotfish")
