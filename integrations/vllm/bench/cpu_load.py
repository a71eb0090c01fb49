"""Threads of an engine on a CPU that other processes use, too.

OpenMP's threads meet at hundreds of barriers in a step. If another process uses one of the cores, each barrier waits
until the scheduler runs the thread of that core again, and an engine becomes ten times slower. With one thread less it
only loses that core.
"""

import logging
import os

logger = logging.getLogger(__name__)
SECONDS = 0.3  # time over which the load is measured
BUSY = 0.35  # share of a core from which the core counts as used


def threads_beside_others() -> int | None:
    """Return the number of OpenMP threads to use, or None if all cores are free, or the user has set a number.

    Warns that times are unreliable if other processes use the CPU.
    """
    import psutil

    if "OMP_NUM_THREADS" in os.environ:
        return None
    cores = len(psutil.Process().cpu_affinity() or ())
    used = psutil.cpu_percent(SECONDS) / 100 * (psutil.cpu_count() or cores)
    busy = int(used + 1 - BUSY)
    if not busy:
        return None
    threads = max(1, cores - busy)
    logger.warning(
        "pilotfish: other processes use %.1f of %d cores; the engines use %d threads, and times are unreliable",
        used,
        cores,
        threads,
    )
    return threads
