"""Engine-wide services: configuration, vLLM API checks, patching, logging and metrics."""
