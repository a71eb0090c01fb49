"""Where a KV policy's settings for a model come from: a file from tuning, or the profile that is shipped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..kvcache import profiles
from ..kvcache.profiles import Profile, ProfileError
from .config import ConfigError, unknown_key_message
from .contracts import Engine, Unsupported


def resolve_profile_option(policy: str, named: str | None, engine: Engine, tune: str) -> Mapping[str, Any] | None:
    """The setting that an option ``profile`` names, or the model's default.

    Args:
        policy: Name of the policy.
        named: ``NAME`` of the shipped profile's settings, ``FILE.json`` or ``FILE.json#NAME``; None: the default.
        engine: Whose model it has to be of.
        tune: The command that makes a profile, for messages.

    Returns:
        None when nothing was named and no profile is shipped for the model.

    Raises:
        ConfigError: the profile cannot be read, or has no such setting.
        Unsupported: the profile is of another model.
    """
    where, _, name = (named or "").partition("#")
    path = Path(where)
    profile: Profile | None
    if path.suffix == ".json":
        try:
            profile = profiles.read_profile(path)
        except ProfileError as error:
            raise ConfigError(f"pilotfish.kv.profile: {error}") from None
        if profile.policy != policy:
            raise ConfigError(f"pilotfish.kv.profile: {path}: of the policy {profile.policy}")
        if engine.fingerprint and profile.fingerprint != engine.fingerprint:
            reason = f"the profile {path} is of the model {profile.model}"
            raise Unsupported(policy, reason, f"run `{tune}` for this model", engine.model)
        name = name or "default"
    else:
        profile, name = profiles.shipped_profile(policy, engine.fingerprint), where or "default"
        if profile is None and where and engine.fingerprint:
            reason = f"no profile is shipped for it, so that there is no '{where}'"
            raise Unsupported(policy, reason, f"run `{tune}` for this model, and name the file", engine.model)
    if profile is None:
        return None
    if name not in profile.settings:
        raise ConfigError(unknown_key_message(f"pilotfish.kv.profile: '{name}'", name, profile.settings))
    return profile.settings[name]
