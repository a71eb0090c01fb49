"""The cache folder of Pilotfish: compiled kernels, embedded models, step times."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return ``PILOTFISH_CACHE`` if it is set, else ``pilotfish`` in the user's cache folder."""
    if explicit := os.environ.get("PILOTFISH_CACHE"):
        return Path(explicit)
    import platformdirs  # here, so that kernels can be imported where only torch is installed (benchmarks/gpu)

    return platformdirs.user_cache_path("pilotfish", appauthor=False)
