"""The configuration key ``pilotfish`` and the options of plugins: parsed, checked, refused with the full path.

Imports the standard library only, since vLLM's entry-point module leads here.
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
MAX_NODES = 127  # drafted tokens of a request that vLLM verifies in one step, beside the one before them
T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that begins with the path of the fault."""


@dataclass(frozen=True)
class Selection:
    """One plugin chosen by name, with its options as they were written."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """How the engine verifies drafts; written among the options of a drafter, any drafter.

    Attributes:
        verification: A `chain` is one path of the drafter's tree, in vLLM's own way; a `tree` takes part whole.
        nodes: Drafted tokens of a request in each step; as many as pay by what steps cost when None.
    """

    verification: Literal["chain", "tree"] = "chain"
    nodes: int | None = None

    def __post_init__(self) -> None:
        if self.nodes is not None and not 0 <= self.nodes <= MAX_NODES:
            raise ValueError(f"nodes: expected 0 to {MAX_NODES}, got {self.nodes}")


# Options that all plugins of a kind have.
COMMON = {"drafter": tuple(f.name for f in dataclasses.fields(Verification))}


@dataclass(frozen=True)
class PilotfishConfig:
    """The value of the key ``pilotfish`` in vLLM's ``additional_config``."""

    kv: Selection | None = None
    drafter: Selection | None = None
    pruner: Selection | None = None
    allow_untested_vllm: bool = False
    verification: Verification = Verification()

    def selected(self) -> dict[str, Selection]:
        """The kinds for which a plugin was chosen."""
        return {kind: choice for kind in KINDS if (choice := getattr(self, kind)) is not None}


def parse_config(value: object) -> PilotfishConfig:
    """Read ``{"drafter": {"name": ..., **options}, ...}``; plugin options are checked later, by `build_options`.

    Raises:
        ConfigError: on an unknown key or a wrong type.
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
    """A drafter's own options, and those of its verification."""
    ours = {key: value for key, value in selection.options.items() if key in COMMON["drafter"]}
    rest = {key: value for key, value in selection.options.items() if key not in COMMON["drafter"]}
    return Selection(selection.name, rest), build_options(Verification, ours, path)


def build_options(cls: type[T], values: Mapping[str, Any], path: str, others: Iterable[str] = ()) -> T:
    """Build the options dataclass ``cls`` of a plugin from what a user wrote.

    Args:
        cls: A frozen dataclass; its ``__post_init__`` may raise `ValueError` on a value out of range.
        values: Option names and values.
        path: Where the options stand, for messages, as ``pilotfish.drafter``.
        others: Names that may stand there too, for messages.

    Raises:
        ConfigError: an unknown option (with the nearest known one), a wrong type, a value out of range.
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
    """Read the command line's ``NAME[,key=value...]``; values are read as JSON where they are, else as text."""
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
        except (ValueError, RecursionError):  # text, or a number too long to be one
            options[key.strip()] = value
    if not name.strip():
        raise ConfigError("no plugin named, write NAME[,key=value...]")
    return Selection(name.strip(), options)


def _split_outside_brackets(text: str) -> list[str]:
    """Split at commas, but for those inside a value, as in ``select_layers=[2,13]``."""
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
    """The message for an unknown name: its path, and the nearest known name or all of them."""
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
    """Return ``value`` if it is of type ``expected`` (an int passes for a float, a list for a tuple), else refuse."""
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
    """A type as users write it: ``int``, ``str | None``, ``'a' | 'b'``."""
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
