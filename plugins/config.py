"""Parsing and validation of the configuration key ``pilotfish`` and of plugin options.

This module imports the standard library only, since vLLM imports it in all of its processes.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

ROOT = "pilotfish"
KINDS = ("kv", "drafter", "pruner")
MAX_NODES = 127  # draft tokens of a request that can be verified in one step, in addition to the root
T = TypeVar("T")


class ConfigError(ValueError):
    """Error for an invalid configuration; the message is one line that begins with the path of the invalid value."""


@dataclass(frozen=True)
class Selection:
    """A plugin that the user selected.

    Attributes:
        name: Name of the plugin.
        options: Options as the user wrote them, not validated.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """How the engine verifies drafts; users write these fields among the options of any drafter.

    Attributes:
        verification: ``chain`` verifies the best path of the draft tree, as vLLM does; ``tree`` verifies the whole tree
            in one step.
        nodes: Number of draft tokens per request and step; if not given, as many as pay by the measured cost of a step.
    """

    verification: Literal["chain", "tree"] = "chain"
    nodes: int | None = None

    def __post_init__(self) -> None:
        if self.nodes is not None and not 0 <= self.nodes <= MAX_NODES:
            raise ValueError(f"nodes: expected 0 to {MAX_NODES}, got {self.nodes}")


# Options of all plugins of a type, by type.
COMMON_OPTIONS = {"drafter": Verification}


@dataclass(frozen=True)
class PilotfishConfig:
    """The value of the key ``pilotfish`` in vLLM's ``additional_config``.

    Attributes:
        kv: Selected KV policy.
        drafter: Selected drafter.
        pruner: Selected visual pruner.
        allow_untested_vllm: Whether versions of vLLM are accepted with which Pilotfish was not tested.
        verification: How the engine verifies the drafter's drafts.
    """

    kv: Selection | None = None
    drafter: Selection | None = None
    pruner: Selection | None = None
    allow_untested_vllm: bool = False
    verification: Verification = Verification()

    def selected(self) -> dict[str, Selection]:
        """Return the selected plugins by type."""
        return {kind: choice for kind in KINDS if (choice := getattr(self, kind)) is not None}


def parse_config(value: object) -> PilotfishConfig:
    """Parse ``{"drafter": {"name": ..., **options}, ...}``; `build_options` validates the options of plugins later.

    Raises:
        ConfigError: A key is unknown, or a value has a wrong type.
    """
    mapping = _mapping(value, ROOT)
    parsed: dict[str, Any] = {}
    for key, entry in mapping.items():
        path = f"{ROOT}.{key}"
        if key in KINDS:
            parsed[key] = selection = _parse_selection(entry, path)
            if key == "drafter":
                parsed[key], parsed["verification"] = _split_verification(selection, path)
        elif key == "allow_untested_vllm":
            parsed[key] = _coerce(entry, bool, path)
        else:
            raise ConfigError(unknown_key_message(path, key, [*KINDS, "allow_untested_vllm"]))
    return PilotfishConfig(**parsed)


def _parse_selection(entry: object, path: str) -> Selection:
    if isinstance(entry, str):
        return Selection(entry)
    options = dict(_mapping(entry, path))
    if "name" not in options:
        raise ConfigError(f'{path}: no plugin named, write {{"name": ...}}')
    return Selection(_coerce(options.pop("name"), str, f"{path}.name"), options)


def _split_verification(selection: Selection, path: str) -> tuple[Selection, Verification]:
    """Split the options of a drafter into its own and those of `Verification`."""
    names = {f.name for f in dataclasses.fields(Verification)}
    ours = {key: value for key, value in selection.options.items() if key in names}
    rest = {key: value for key, value in selection.options.items() if key not in names}
    return Selection(selection.name, rest), build_options(Verification, ours, path)


def build_options(cls: type[T], values: Mapping[str, Any], path: str, others: Iterable[str] = ()) -> T:
    """Build an options dataclass from the values that a user wrote.

    Args:
        cls: Frozen dataclass of the options; its ``__post_init__`` may raise `ValueError` for an invalid value.
        values: Option names and values.
        path: Path of the options in the configuration, such as ``pilotfish.drafter``, for messages.
        others: Names of further options that are valid at this path, for messages.

    Raises:
        ConfigError: An option is unknown (the message suggests the nearest known one), or a value has a wrong type or
            is out of range.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(unknown_key_message(f"{path}.{key}", key, [*known, *others]))
    typed = {key: _coerce(value, known[key], f"{path}.{key}") for key, value in values.items()}
    try:
        return cls(**typed)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}.{error}") from None


def parse_assignments(text: str) -> Selection:
    """Parse ``NAME[,key=value...]`` from the command line; a value that is not JSON is taken as text.

    Raises:
        ConfigError: The text has another form, or a key occurs twice.
    """
    import json

    name, *assignments = _split_outside_brackets(text)
    options: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{name}: '{assignment}' is not of the form key=value")
        if key.strip() == "name":
            raise ConfigError(f"{name}: 'name' is given twice")
        if key.strip() in options:
            raise ConfigError(f"{name}: '{key.strip()}' is given twice")
        try:
            options[key.strip()] = json.loads(value)
        except (ValueError, RecursionError):  # plain text, or a number with too many digits
            options[key.strip()] = value
    if not name.strip():
        raise ConfigError("no plugin named, write NAME[,key=value...]")
    return Selection(name.strip(), options)


def _split_outside_brackets(text: str) -> list[str]:
    """Split at commas outside brackets, as in ``budget=512,select_layers=[2,13]``."""
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    if depth:
        raise ConfigError(f"{text}: brackets do not match")
    return [*parts, text[begin:]]


def unknown_key_message(path: str, name: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown name, with the nearest known name or all known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"{path}: unknown, did you mean '{near[0]}'?"
    return f"{path}: unknown, known are: {', '.join(names) or 'none'}"


def _mapping(value: object, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected an object, got {value!r}")
    return value


def _coerce(value: Any, expected: Any, path: str) -> Any:
    """Return ``value`` as type ``expected``; an int is accepted for a float, and a list for a tuple.

    Raises:
        ConfigError: The value has another type.
    """
    origin = typing.get_origin(expected)
    if origin is typing.Literal:
        choices = typing.get_args(expected)
        if value in choices and type(value) in {type(c) for c in choices}:
            return value
        raise ConfigError(f"{path}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(expected):
            try:
                return _coerce(value, option, path)
            except ConfigError:
                continue
    elif origin is tuple:
        if isinstance(value, list | tuple):
            item = typing.get_args(expected)[0]
            return tuple(_coerce(v, item, f"{path}[{i}]") for i, v in enumerate(value))
    elif origin is Mapping:
        if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            item = typing.get_args(expected)[1]
            return {k: _coerce(v, item, f"{path}.{k}") for k, v in value.items()}
    elif expected is Any:
        return value
    elif expected is type(None):
        if value is None:
            return None
    elif expected is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                return float(value)
    elif isinstance(value, expected) and (expected is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}: expected {type_name(expected)}, got {value!r}")


def type_name(expected: Any) -> str:
    """Return a type as text for users, such as ``int``, ``str | None`` or ``'a' | 'b'``."""
    origin = typing.get_origin(expected)
    if origin is typing.Literal:
        return " | ".join(map(repr, typing.get_args(expected)))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in typing.get_args(expected))
    if origin is tuple:
        return f"list of {type_name(typing.get_args(expected)[0])}"
    if origin is Mapping:
        return f"object of {type_name(typing.get_args(expected)[1])}"
    return "null" if expected is type(None) else getattr(expected, "__name__", str(expected))
