"""The option ``profile`` of KV policies: settings for a model, from a file or from the profile that is shipped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..kvcache import profiles
from ..kvcache.profiles import Profile, ProfileError
from .config import ConfigError, unknown_key_message
from .contracts import Engine, Unsupported


def resolve_profile_option(policy: str, named: str | None, engine: Engine, tune: str) -> Mapping[str, Any] | None:
    """Return the setting that the option ``profile`` names, or the model's default setting.

    Args:
        policy: Name of the policy.
        named: Value of the option: ``NAME`` of a setting in the shipped profile, ``FILE.json`` or ``FILE.json#NAME``;
            None for the default setting of the shipped profile.
        engine: Properties of the engine, whose model the profile must fit.
        tune: Command that creates a profile, for messages.

    Returns:
        The options of the setting; None if the option is not given and no profile is shipped for the model.

    Raises:
        ConfigError: The profile cannot be read, or has no such setting.
        Unsupported: The profile belongs to another model.
    """
    source, _, name = (named or "").partition("#")
    path = Path(source)
    profile: Profile | None
    if path.suffix == ".json":
        try:
            profile = profiles.read_profile(path)
        except ProfileError as error:
            raise ConfigError(f"pilotfish.kv.profile: {error}") from None
        if profile.policy != policy:
            raise ConfigError(f"pilotfish.kv.profile: {path}: is a profile of {profile.policy}, not of {policy}")
        if engine.fingerprint and profile.fingerprint != engine.fingerprint:
            reason = f"the profile {path} is of the model {profile.model}"
            raise Unsupported(policy, reason, f"run `{tune}` for this model", engine.model)
        name = name or "default"
    else:
        profile, name = profiles.shipped_profile(policy, engine.fingerprint), source or "default"
        if profile is None and source and engine.fingerprint:
            reason = f"no profile is shipped for it, so there is no setting '{source}'"
            raise Unsupported(policy, reason, f"run `{tune}` for this model and name its file", engine.model)
    if profile is None:
        return None
    if name not in profile.settings:
        raise ConfigError(unknown_key_message(f"pilotfish.kv.profile: '{name}'", name, profile.settings))
    return profile.settings[name]
