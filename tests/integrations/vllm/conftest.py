"""Real engines for tests: each in a process of its own, at most two alive at a time."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from forked_engine import ForkedEngineProcess
from gpu import HAS_GPU
from stock_engine import StockEngine

from pilotfish.integrations.vllm.bench.engine import EngineProcess
from pilotfish.integrations.vllm.engine.selection import PROPOSER_CLASS
from pilotfish.integrations.vllm.models.base import fetch_model
from pilotfish.integrations.vllm.models.embedded import SMOLLM2

WORKER = Path(__file__).parent / "worker.py"
TRITON_WORKER = Path(__file__).parent / "triton_worker.py"
VLLM_033 = Path(__file__).parents[3] / ".venv-vllm-0.33"  # made by `make setup-033`
Start = Callable[..., EngineProcess]


@pytest.fixture(scope="session")
def model() -> str:
    """The embedded model."""
    return str(fetch_model(SMOLLM2))


@pytest.fixture(scope="session")
def random_model(model: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that saves a small model of random weights with four heads, and returns its folder."""
    import shutil

    import torch

    def save(architecture: Any, **options: Any) -> str:
        folder = tmp_path_factory.mktemp("random_model")
        torch.manual_seed(0)
        defaults: dict[str, Any] = {
            "vocab_size": 49_152,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.2,
        }
        config = architecture.config_class(**{**defaults, **options})
        architecture(config).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(model) / name, folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def tiny_model(random_model: Callable[..., str]) -> str:
    """A Llama of random weights with four heads: starts fast, can be split in two, and soon repeats itself."""
    from transformers import LlamaForCausalLM

    return random_model(LlamaForCausalLM, num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def small_vocabulary(random_model: Callable[..., str]) -> str:
    """`tiny_model` with 512 tokens: interpreted kernels, those of vLLM's sampler among them, are slow with more."""
    from transformers import LlamaForCausalLM

    return random_model(LlamaForCausalLM, num_hidden_layers=2, tie_word_embeddings=True, vocab_size=512)


def drafting(tokens: int = 12, name: str = "token_recycling", **options: Any) -> dict[str, Any]:
    """Engine arguments that select our drafter."""
    return {
        "additional_config": {"pilotfish": {"drafter": {"name": name, **options}}},
        "speculative_config": {"method": "custom_class", "model": PROPOSER_CLASS, "num_speculative_tokens": tokens},
    }


@pytest.fixture(scope="module")
def start_interpreted(start: Start) -> Start:
    """Start engines on vLLM's GPU backend, its Triton kernels and ours interpreted unless the machine has a GPU.

    ``release`` is the release of vLLM that the test needs, "0.32" or "0.33"; tests without it use the installed one.
    """

    def begin(model: str, runner: str, release: str | None = None, **config: Any) -> EngineProcess:
        small: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 128}
        env = {"VLLM_USE_V2_MODEL_RUNNER": runner}
        if HAS_GPU:
            small["attention_backend"] = "TRITON_ATTN"
        elif release == "0.33":
            if not (VLLM_033 / ".ready").exists():
                pytest.skip("`make setup-033` has not been run")
            env["PYTHONPATH"] = str(VLLM_033)
        engine = start(model, env, WORKER if HAS_GPU else TRITON_WORKER, **{**small, **config})
        if release and not (version := engine.ask(do="version")["vllm"]).startswith(release):
            engine.close()
            pytest.skip(f"the engine is vLLM {version}")
        return engine

    return begin


@pytest.fixture(scope="session")
def stock_answers() -> dict[str, Any]:
    """Answers of stock engines with the default arguments, shared by all modules."""
    return {}


@pytest.fixture(scope="module")
def stock_engine(start: Start, model: str, stock_answers: dict[str, Any]) -> StockEngine:
    """Return a stock engine with the embedded model."""
    return StockEngine(lambda: start(model), stock_answers)


@pytest.fixture(scope="session")
def drafting_args() -> Callable[..., dict[str, Any]]:
    return drafting


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start engines; they end with the module."""
    alive: list[EngineProcess] = []

    def begin(model: str, env: dict[str, str] | None = None, worker: Path = WORKER, **config: Any) -> EngineProcess:
        assert sum(engine.running for engine in alive) < 2, "more than two engines at once"
        log = tmp_path_factory.mktemp("engine") / "engine.log"
        common = {
            "model": model,
            "dtype": "float32",  # batch shapes change rounding in bfloat16, and with it the text
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "seed": 0,
            "kv_cache_memory_bytes": 384 << 20,  # 8 requests of 1,024 tokens; vLLM writes zeros to all of it at start
        }
        if HAS_GPU:
            common["gpu_memory_utilization"] = 0.1  # engines of parallel test workers share the GPU
        # A forked process cannot use CUDA if its parent has initialized it.
        kind = ForkedEngineProcess if worker != TRITON_WORKER and not HAS_GPU else EngineProcess
        engine = kind({**common, **config}, log, worker=(str(worker),), **(env or {}))
        alive.append(engine)
        return engine

    yield begin
    for engine in alive:
        engine.close()


class Server:
    """`pilotfish serve` in a process of its own."""

    def __init__(self, model: str, log: Path, *arguments: str) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        common = ("--port", str(self.port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024")
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pilotfish",
                    "serve",
                    model,
                    *common,
                    "--enforce-eager",
                    "--max-num-seqs",
                    "8",
                    *arguments,
                ],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        deadline = time.monotonic() + 240
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the server did not start: {self.tail()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def interrupt(self) -> int:
        """Ctrl-C; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def left_over(self, grace: float = 10) -> list[str]:
        """Processes of the server's session that still run after ``grace`` seconds: its children end a moment later."""
        deadline = time.monotonic() + grace
        while (found := self._session()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _session(self) -> list[str]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append(stat.parent.name)
        return found

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def serve() -> type[Server]:
    return Server


TWO_RANKS = """
import json, os, sys
if os.environ.get('TRITON_INTERPRET'):
    import triton_worker  # in each rank
    if __name__ == '__main__':
        triton_worker.keep_scheduling_asynchronous()
from PIL import Image
from vllm import LLM, SamplingParams
def request(prompt):
    if isinstance(prompt, list):
        return {'prompt_token_ids': prompt}
    pictures = [Image.open(path).convert('RGB') for path in prompt.get('pictures', [])]
    return {'prompt': prompt['prompt'], **({'multi_modal_data': {'image': pictures}} if pictures else {})}
if __name__ == '__main__':
    config, prompts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    llm = LLM(**config)
    kinds = json.loads(sys.argv[3])
    params = [SamplingParams(**kinds[i % len(kinds)], ignore_eos=True) for i in range(len(prompts))]
    out = llm.generate([request(p) for p in prompts], params, use_tqdm=False)
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, 'value')}
    tokens = [list(o.outputs[0].token_ids) for o in out]
    accepted = metrics.get('vllm:spec_decode_num_accepted_tokens', 0)
    print('ANSWER', json.dumps({'tokens': tokens, 'accepted': accepted}))
"""


# Every other request samples, from one token: where a rank knew nothing of top-k, ranks would not agree.
GREEDY = [{"temperature": 0, "max_tokens": 40}, {"temperature": 0.8, "top_k": 1, "max_tokens": 40}]


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Completions of token ids or prompts with images, by two tensor-parallel ranks."""

    def complete(
        model: str,
        prompts: list[Any],
        sampling: Sequence[dict[str, Any]] = GREEDY,
        interpreted: bool = False,
        **config: Any,
    ) -> dict[str, Any]:
        on_v2 = {
            "VLLM_USE_V2_MODEL_RUNNER": "1",
            "TRITON_INTERPRET": "1",
            "TORCH_COMPILE_DISABLE": "1",  # torch.compile asks Triton's backend for a target
            "PYTHONPATH": str(TRITON_WORKER.parent),
        }
        script = tmp_path / "two.py"
        script.write_text(TWO_RANKS)
        common = {
            "model": model,
            "dtype": "float32",
            "max_model_len": 512,
            "enforce_eager": True,
            "tensor_parallel_size": 2,
            "max_num_seqs": 8,
            "disable_log_stats": False,
        }
        result = subprocess.run(
            [sys.executable, str(script), *map(json.dumps, ({**common, **config}, prompts, sampling))],
            capture_output=True,
            text=True,
            timeout=900 if interpreted else 400,
            # Each rank is bound to a core by hand: there is one NUMA node only.
            env={
                **os.environ,
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_CPU_OMP_THREADS_BIND": "0|1",
                **(on_v2 if interpreted else {}),
            },
        )
        lines = [line for line in result.stdout.splitlines() if line.startswith("ANSWER")]
        assert lines, result.stderr[-2000:]
        return json.loads(lines[0].removeprefix("ANSWER "))

    return complete


@pytest.fixture(scope="session")
def prompts(model: str, root: Path) -> list[list[int]]:
    """Token ids of the demo's prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (root / "examples" / "prompts.jsonl").read_text().splitlines()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        for line in lines
    ]
    return [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
