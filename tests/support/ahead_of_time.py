"""Compiles Triton kernels for a GPU that the machine does not have, to find errors that the interpreter does not find.

Kernels are either compiled or interpreted in a process, so tests do this in another process.
"""

import ast
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def type_of(value: Any) -> str:
    """Return Triton's name of an argument's type."""
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextlib.contextmanager
def compiled_launches(compute_capability: int = 90) -> Iterator[dict[str, int]]:
    """Compile each kernel that is launched, for an NVIDIA GPU, instead of running it.

    Yields:
        The size of the machine code of each kernel by its name, in bytes; filled as kernels are launched.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import JITFunction

    sizes: dict[str, int] = {}
    original = JITFunction.run

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del grid, warmup
        parameters = {p.name: p for p in self.params}
        values = dict(zip(parameters, args, strict=False)) | {k: v for k, v in kwargs.items() if k in parameters}
        options = {k: v for k, v in kwargs.items() if k not in parameters}
        constants = {n: value for n, value in values.items() if parameters[n].is_constexpr or value is None}
        types = {n: "constexpr" if n in constants else type_of(values[n]) for n in parameters}
        target = GPUTarget("cuda", compute_capability, 32)
        compiled = compile(ASTSource(self, types, constants), target=target, options=options)
        sizes[self.fn.__name__] = len(compiled.asm["cubin"])

    JITFunction.run = compile_launch
    try:
        yield sizes
    finally:
        JITFunction.run = original


def compiled_kernels(script: str, folder: Path | None = None) -> list[str]:
    """Run a script that prints the sorted names of the kernels which it launched in `compiled_launches`.

    Args:
        script: Python code; it can import the modules of this folder, and those of another one.
        folder: The other folder.
    """
    paths = os.pathsep.join(str(path) for path in (folder, Path(__file__).parent) if path is not None)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**environment, "PYTHONPATH": paths}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return ast.literal_eval(result.stdout)
