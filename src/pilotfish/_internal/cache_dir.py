"""The cache folder of Pilotfish: compiled kernels, embedded models, step times."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Return ``PILOTFISH_CACHE`` if it is set, else ``pilotfish`` in the user's cache folder."""
    if explicit := os.environ.get("PILOTFISH_CACHE"):
        return Path(explicit)
    return platformdirs.user_cache_path("pilotfish", appauthor=False)
