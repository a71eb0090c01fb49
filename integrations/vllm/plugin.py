"""The entry point ``vllm.general_plugins = pilotfish``, which vLLM calls in every one of its processes.

This module imports the standard library only, and `register` never raises: vLLM would swallow an import error and serve
without us. All it does is put a door-keeper before `EngineArgs.create_engine_config`, where the choice of plugins is
read for the first time; an engine that chose none passes through it unchanged.
"""

import logging

# Under the name of vLLM's own loggers: in its processes others lose their INFO lines.
logger = logging.getLogger("vllm.pilotfish")


def register() -> None:
    """Install the door-keeper; calling it again changes nothing."""
    try:
        from . import patches

        patches.CREATE_ENGINE_CONFIG.apply()
        patches.ATTENTION_BACKEND.apply()
        patches.SCHEDULER.apply()
    except Exception:  # an unknown vLLM: whoever selected a plugin hears of it from the seams check
        logger.debug("pilotfish: the front door could not be installed", exc_info=True)
