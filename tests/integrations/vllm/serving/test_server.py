"""The server of `pilotfish serve`: concurrent streams, aborted requests, metrics, and clean shutdown."""

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = "smollm2-135m-instruct"
TOKENS = 24


def counters(url: str) -> dict[str, float]:
    """Return Pilotfish's counters from the server's metrics."""
    values = {}
    for line in httpx.get(f"{url}/metrics", timeout=10).text.splitlines():
        if line.startswith("pilotfish_") and "_created" not in line:
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    return values


async def stream(client: AsyncOpenAI, prompt: list[int], abort_after: int | None = None) -> str:
    """Stream a completion; abort it after ``abort_after`` events if that is given."""
    text, num_events = "", 0
    # The prompt is token ids, since the server must not change it.
    answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True)
    async for event in answer:
        text += event.choices[0].text
        num_events += 1
        if abort_after is not None and num_events >= abort_after:
            await answer.close()
            break
    return text


async def run_streams(url: str, prompts: list[list[int]], aborting: bool) -> list[str]:
    """Run eight streams concurrently; abort every other one if ``aborting``."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        return await asyncio.gather(
            *(stream(client, p, 5 + i if aborting and i % 2 else None) for i, p in enumerate(prompts))
        )


@pytest.mark.long
def test_a_server_without_plugins_has_no_counters(tmp_path: Path, serve: Callable, model: str) -> None:
    plain = serve(MODEL, tmp_path / "plain.log")
    try:
        assert counters(plain.url) == {}
    finally:
        plain.interrupt()
        plain.kill()


def test_streams_aborts_metrics_and_shutdown(
    tmp_path: Path, serve: Callable, prompts: list[list[int]], stock_engine
) -> None:
    prompts = prompts[:8]
    greedy = {"temperature": 0, "max_tokens": TOKENS}
    expected = stock_engine.ask(do="sample", prompts=prompts, sampling=[greedy] * len(prompts))["text"]
    stock_engine.close()
    state = tmp_path / "state.npz"
    server = serve(MODEL, tmp_path / "server.log", "--drafter", f"token_recycling,state_path={state}")
    try:
        log = server.tail() if server.log.stat().st_size < 3000 else server.log.read_text(errors="replace")
        assert "pilotfish: drafter token_recycling selected" in log
        assert set(counters(server.url).values()) == {0.0}
        with_aborts = asyncio.run(run_streams(server.url, prompts, aborting=True))
        assert with_aborts[::2] == expected[::2], "requests that were not aborted match stock vLLM"
        assert all(e.startswith(t) for e, t in zip(expected, with_aborts, strict=True))
        assert asyncio.run(run_streams(server.url, prompts, aborting=False)) == expected

        label = '{engine="0",plugin="token_recycling"}'
        values = counters(server.url)
        proposals = values[f"pilotfish_drafter_proposals_total{label}"]
        drafted = values[f"pilotfish_drafter_drafted_tokens_total{label}"]
        accepted = values[f"pilotfish_drafter_accepted_tokens_total{label}"]
        assert 0 < proposals <= drafted
        assert 0 < accepted <= drafted
        deadline = time.monotonic() + 20
        while not state.is_file() and time.monotonic() < deadline:  # written once the server is idle
            time.sleep(0.2)
        assert "drafter token_recycling is active" in server.log.read_text(errors="replace")
    finally:
        code = server.interrupt()
        left = server.left_over()
        server.kill()
    assert code in (0, 130, -signal.SIGINT), server.tail()
    assert left == []
    assert state.is_file()
    # vLLM kills its workers at once; one that was writing leaves a temporary file, which the next writer removes.
    files = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert files == {"server.log", "state.npz"}
