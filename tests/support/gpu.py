"""Whether the machine has an NVIDIA GPU, found out without importing torch."""

from pathlib import Path

HAS_GPU = Path("/dev/nvidiactl").exists()
