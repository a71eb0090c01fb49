"""Entry point ``vllm.general_plugins = pilotfish``, which vLLM calls in each of its processes.

This module imports the standard library only, and `register` never raises: vLLM ignores plugins that fail to load, and
would serve without ours. `register` wraps `EngineArgs.create_engine_config`, where the plugin selection is first read,
and three functions that are called later; an engine that selects no plugin is created unchanged.
"""

import logging

# A child of vLLM's logger: in vLLM's processes other loggers do not print INFO messages.
logger = logging.getLogger("vllm.pilotfish")


def register() -> None:
    """Apply the patches that every engine needs; calling it again has no effect."""
    try:
        from . import patches

        patches.CREATE_ENGINE_CONFIG.apply()
        patches.ATTENTION_BACKEND.apply()
        patches.SCHEDULER.apply()
        patches.WORKER.apply()
    except Exception:  # an unknown vLLM: `vllm_api.version_problem` reports it to users who select a plugin
        logger.debug("pilotfish: vLLM could not be patched", exc_info=True)
