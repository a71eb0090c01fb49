"""Profiles: the settings that tuning found for a model, as a versioned JSON file with the model's fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotfish._internal.atomic_write import write_text

FORMAT = 1
# A profile fits every model of the same shape, whatever its weights, so that it also serves fine-tuned models.
SHAPE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHIPPED = Path(__file__).with_name("shipped")


class ProfileError(ValueError):
    """Error for a profile that cannot be used; the message is one line that begins with its path."""


@dataclass(frozen=True)
class Profile:
    """Settings of a policy for one model.

    Attributes:
        policy: Name of the policy.
        model: Name of the model, for information only.
        fingerprint: Fingerprint of the model's shape, see `model_fingerprint`.
        settings: Named settings, each a mapping of the policy's options.
        evidence: How the settings were found: text, budget, measurements.
    """

    policy: str
    model: str
    fingerprint: str
    settings: Mapping[str, Mapping[str, Any]]
    evidence: Mapping[str, Any] = field(default_factory=dict)


def model_fingerprint(config: Mapping[str, Any]) -> str:
    """Return a hex digest of a model's shape.

    Args:
        config: Contents of the model's ``config.json``; of a multimodal model, its text configuration.
    """
    values = [config.get(name) for name in SHAPE]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile atomically."""
    write_text(path, json.dumps({"format": FORMAT, **vars(profile)}, indent=1) + "\n")


def read_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        ProfileError: The file is missing, is not a profile, or has another format version.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value.pop("format")
        profile = Profile(**value)
        if not all(isinstance(s, dict) for s in profile.settings.values()):
            raise TypeError("a setting is not an object")
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ProfileError(f"{path}: not a profile") from None
    if version != FORMAT:
        raise ProfileError(f"{path}: of version {version}, expected {FORMAT}; tune the model again")
    return profile


def shipped_profile(policy: str, of: str) -> Profile | None:
    """Return the profile that this package ships for a policy and the model with fingerprint ``of``, if any."""
    for path in sorted(SHIPPED.glob(f"{policy}-*.json")):
        profile = read_profile(path)
        if profile.fingerprint == of:
            return profile
    return None
