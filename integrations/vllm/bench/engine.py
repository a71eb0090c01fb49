"""A vLLM engine in a separate process that takes commands as lines of JSON; client and worker of that protocol.

The engine runs in the worker process itself, without vLLM's engine-core process, so that steps can be counted at the
scheduler, and so that runs of two engines can be interleaved without one disturbing the other.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pilotfish._internal.lazy_import import torch

from .cpu_load import threads_beside_others

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    # vLLM's ngram drafter starts a Numba thread pool, which only slows down a small machine.
    "NUMBA_THREADING_LAYER": "workqueue",
    "NUMBA_NUM_THREADS": "1",
}


PROGRESS = "progress"  # key of an answer that reports progress and precedes the final one


def share_gpu(engines: int) -> dict[str, Any]:
    """Return the engine arguments with which several engines fit into the memory of one GPU; none without a GPU."""
    return {"gpu_memory_utilization": 0.9 / engines} if torch.cuda.is_available() else {}


class EngineProcess:
    """Client of a worker process: starts it, sends commands and ends it."""

    def __init__(self, config: dict[str, Any], log: Path, worker: Sequence[str] = ("-m", __name__), **env: str) -> None:
        """Start a worker and wait until its engine is ready.

        Args:
            config: Arguments of `vllm.LLM`.
            log: File for the output of the worker.
            worker: Arguments with which Python runs the worker.
            env: Further environment variables of the worker.
        """
        self.log = log
        environment = {**ENVIRONMENT, **os.environ, **env}
        if not torch.cuda.is_available() and (threads := threads_beside_others()) is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        if "kv_cache_memory_bytes" in config:  # vLLM's CPU platform would silently prefer the variable
            del environment["VLLM_CPU_KVCACHE_SPACE"]
        self._process = self._spawn([*worker, json.dumps(config)], environment)
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def _spawn(self, arguments: Sequence[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
        """Start Python with arguments; its standard error goes to the log."""
        with self.log.open("ab") as errors:
            return subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which ends the worker
            )

    def ask(self, on_progress: Callable[[float], None] | None = None, **command: Any) -> dict[str, Any]:
        """Send a command and return its answer; ``on_progress`` is called with the completed share, 0 to 1."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        while PROGRESS in (answer := self._answer()):
            if on_progress is not None:
                on_progress(answer[PROGRESS])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise RuntimeError(f"the engine ended: {tail[0]} (whole log: {self.log})")
        return json.loads(line)

    @property
    def running(self) -> bool:
        """Whether the worker process is alive."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the worker and all processes that it started."""
        if self.running:
            try:
                os.killpg(self._process.pid, signal.SIGTERM)
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            except ProcessLookupError:
                pass
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Worker:
    """Worker side of the protocol: an engine whose steps and tokens are counted at the scheduler."""

    progress: Callable[[float], None] = staticmethod(lambda done: None)  # reports to the client, see `main`

    def __init__(self, config: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**config)
        core: Any = self.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
        self.core, self.runner = core, core.model_executor.driver_worker.worker.model_runner
        self._drafters: dict[str, Any] = {}
        self._request_steps = self._drafted = 0
        self._first: dict[str, float] = {}
        update = core.scheduler.update_from_output

        def counted(scheduler_output: Any, output: Any) -> Any:
            now = time.perf_counter()
            drafts = scheduler_output.scheduled_spec_decode_tokens
            for request, tokens in zip(output.req_ids, output.sampled_token_ids or [], strict=False):
                if not tokens:
                    continue
                if request in self._first:  # decode; a request's first token comes from prefill
                    self._request_steps += 1
                    self._drafted += len(drafts.get(request, ()))
                self._first.setdefault(request, now)
            return update(scheduler_output, output)

        core.scheduler.update_from_output = counted

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Complete all prompts together, greedily; return tokens, times in seconds and counts of this call."""
        from vllm import SamplingParams

        self._request_steps = self._drafted = 0
        self._first.clear()
        before = self._proposing()
        started = time.perf_counter()
        outputs = self.llm.generate(
            [{"prompt_token_ids": p} for p in prompts],
            SamplingParams(temperature=0, max_tokens=max_tokens),
            use_tqdm=False,
        )
        ended = time.perf_counter()
        after = self._proposing()
        return {
            "tokens": [list(o.outputs[0].token_ids) for o in outputs],
            "seconds": ended - started,
            "decode_seconds": ended - max(self._first.values()),
            "request_steps": self._request_steps,
            # A step may yield tokens after the end of an answer, which do not count.
            "emitted": sum(len(o.outputs[0].token_ids) - 1 for o in outputs),
            "drafted": self._drafted,
            "proposing": {key: after[key] - before[key] for key in after},
        }

    def _proposing(self) -> dict[str, float]:
        counts = getattr(self._ours, "counts", None) or {}
        return {key: counts[key] for key in ("seconds", "requests") if key in counts}

    @property
    def _ours(self) -> Any:
        """Pilotfish's proposer, also where it wraps vLLM's draft model; else vLLM's proposer, or None."""
        proposer = getattr(self.runner, "drafter", None)
        return getattr(proposer, "pilotfish", proposer)

    def use(self, drafter: str) -> dict[str, Any]:
        """Switch to the drafter instance of that name, created with empty state on first use: cold and warm cache."""
        ours = self._ours
        if drafter not in self._drafters:
            self._drafters[drafter] = type(ours.plugin)(ours.plugin.options, ours.plugin.engine)
        ours.plugin = self._drafters[drafter]
        return {"drafter": drafter}

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Call the method that a command names."""
        return getattr(self, command.pop("do"))(**command)


def main(kind: type[Worker] = Worker) -> None:
    """Run the commands of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    worker = kind(json.loads(sys.argv[1]))
    worker.progress = lambda done: print(json.dumps({PROGRESS: done}), file=answers)  # type: ignore[method-assign]
    answers.write("{}\n")
    for line in sys.stdin:
        answers.write(json.dumps(worker.obey(json.loads(line))) + "\n")
    os._exit(0)  # nothing to save; vLLM's teardown takes seconds


if __name__ == "__main__":
    main()
