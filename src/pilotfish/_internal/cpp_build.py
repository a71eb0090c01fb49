"""Our C++ kernels: compiled on the machine that runs them, once, and kept in the user's cache.

A plain C interface is loaded with ctypes, so no header of torch or Python is needed and compiling takes seconds.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from pilotfish._internal.cache_dir import cache_dir

# Not -ffast-math: a library linked with it makes its whole process flush denormal numbers to zero.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp",
    "-fPIC",
    "-shared",
)


class NoCompiler(RuntimeError):  # noqa: N818 -- the name says it
    """There is no C++ compiler, or it fails."""


def compiler() -> str | None:
    """Path of the C++ compiler: ``CXX``, else g++, c++ or clang++."""
    named = os.environ.get("CXX")
    return next(
        (path for name in ([named] if named else ["g++", "c++", "clang++"]) if (path := shutil.which(name))), None
    )


@functools.cache
def load(name: str, folder: Path) -> ctypes.CDLL:
    """Compile ``name``.cpp of a folder unless its library is in the cache, and load it.

    OpenMP is the one that the process has loaded already (torch's, by its library's name), so our threads are those of
    the engine.

    Raises:
        NoCompiler: nothing can compile it.
    """
    source = folder / f"{name}.cpp"
    flags = (*FLAGS, "-mcpu=native" if platform.machine() == "aarch64" else "-march=native")
    compile_with = compiler()
    if compile_with is None:
        raise NoCompiler("no C++ compiler: install g++, or name one in CXX")
    texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.hpp")))]
    key = hashlib.sha256("\0".join([*texts, compile_with, *flags, processor()]).encode()).hexdigest()[:16]
    library = cache_dir() / "kernels" / f"{name}-{key}.so"
    if not library.is_file():
        _compile(compile_with, flags, source, library)
    return ctypes.CDLL(str(library))


def processor() -> str:
    """What distinguishes processors that share a cache folder, as on a network file system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _compile(compile_with: str, flags: tuple[str, ...], source: Path, library: Path) -> None:
    """Compile into place, so that two processes which start together both find a whole file."""
    library.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [compile_with, *flags, str(source), "-o", partial], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NoCompiler(f"{compile_with} could not compile {source.name}: {done.stderr.strip()[-500:]}")
        Path(partial).replace(library)
    finally:
        Path(partial).unlink(missing_ok=True)
