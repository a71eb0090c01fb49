"""Load test of RAG: 16 concurrent users ask questions while documents change. Checks errors, memory and latency.

    python benchmarks/rag_load.py DATA [--seconds 300] [--people 16]

DATA holds xquad. The index, the engine (which drafts with RASD) and this program share the machine.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from pilotfish.integrations.bench import record
from pilotfish.integrations.bench.memory import of_all
from pilotfish.integrations.bench.record import Record
from pilotfish.integrations.rag import engine, questions
from pilotfish.retrieval import Index

MODEL = "smollm2-135m-instruct"
SETTLED = 0.4  # share of the time until caches are filled; memory is expected to grow before
CHANGED = 10  # documents changed per second
OUT = Path(__file__).parent / "results" / "rag_load.json"


async def ask(client: httpx.AsyncClient, url: str, question: str) -> dict[str, Any]:
    """Ask one question; return times and whether it was answered, or an error."""
    begun = time.perf_counter()
    first = None
    async with client.stream("POST", f"{url}/ask", json={"question": question}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            payload = json.loads(line)
            if "error" in payload:
                return {"error": payload["error"]}
            if "text" in payload and first is None:
                first = time.perf_counter() - begun
            if "done" in payload:
                return {"seconds": time.perf_counter() - begun, "first": first, "known": payload["done"]["known"]}
    return {"error": "the answer ended early"}


async def load(
    url: str, asked: list[str], documents: list[str], seconds: float, people: int, pids: dict[str, int]
) -> Any:
    """Ask questions, change documents, and sample memory and health, all at the same time."""
    until = time.monotonic() + seconds
    answers: list[dict[str, Any]] = []
    changes: list[float] = []
    memory: list[dict[str, float]] = []
    health: list[float] = []

    async with httpx.AsyncClient(timeout=600) as client:

        async def person(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < until:
                try:
                    answers.append(await ask(client, url, rng.choice(asked)))
                except httpx.HTTPError as error:
                    answers.append({"error": repr(error)})

        async def editor() -> None:
            rng, number = random.Random(0), 0
            while time.monotonic() < until:
                begun = time.perf_counter()
                lines = [
                    json.dumps({"id": f"new-{(number + i) % 200}", "text": f"{rng.choice(documents)} {number + i}"})
                    for i in range(CHANGED)
                ]
                number += CHANGED  # beyond 200 documents, each replaces an earlier one
                answer = await client.post(f"{url}/documents", params={"name": "new.jsonl"}, content="\n".join(lines))
                if answer.status_code != 200:
                    answers.append({"error": f"documents: {answer.text}"})
                changes.append(time.perf_counter() - begun)
                await asyncio.sleep(1)

        async def watch() -> None:
            while time.monotonic() < until:
                begun = time.perf_counter()
                (await client.get(f"{url}/health")).raise_for_status()
                health.append(time.perf_counter() - begun)
                memory.append({name: of_all(pid) for name, pid in pids.items()})
                await asyncio.sleep(2)

        await asyncio.gather(editor(), watch(), *(person(i) for i in range(people)))
    return answers, changes, memory, health


def main() -> int:
    """Run the load and write the JSON; return exit code 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--drafter", default="rasd", help="drafter of the engine; empty for none")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    record.check_output_path(arguments.out)
    collection = questions.read_questions(arguments.data / "xquad")
    drafting = ["--drafter", arguments.drafter] if arguments.drafter else []
    texts = [d["text"] for d in collection.documents.values()]
    with (
        tempfile.TemporaryDirectory() as folder,
        engine.running_server(
            ["serve", MODEL], [*drafting, "--max-model-len", "4096", "--max-num-seqs", "16"]
        ) as server,
    ):
        with Index.create(Path(folder) / "index") as index:
            index.add(collection.documents.values())
        serve, options = ["rag", "serve", f"{folder}/index"], ["--server", f"{server.url}/v1", "--max-tokens", "64"]
        with engine.running_server(serve, options) as page:
            pids = {"index and page": page.pid, "engine": server.pid}
            asked = [c.question for c in collection.cases]
            run = load(page.url, asked, texts, arguments.seconds, arguments.people, pids)
            answers, changes, memory, health = asyncio.run(run)
            documents = httpx.get(f"{page.url}/health").json()["documents"]
        with Index.open(Path(folder) / "index") as index:
            index.check()
            assert len(index) == documents
    errors = [a["error"] for a in answers if "error" in a]
    good = [a for a in answers if "error" not in a]
    records = figures(good, errors, changes, memory, health, arguments)
    record.write_records(arguments.out, records, {"answers": answers, "memory": memory})
    for r in records:
        sys.stdout.write(f"{r.arm:18} {r.metric:24} {r.value:10.3f} {r.unit}\n")
    for error in dict.fromkeys(errors):
        sys.stdout.write(f"error: {error}\n")
    return 1 if errors else 0


def figures(
    good: list[Any], errors: list[str], changes: list[float], memory: list[Any], health: list[float], given: Any
) -> list[Record]:
    """Return the records: times over the whole run, memory at 40 % of the run and at its end."""
    seconds, first = sorted(a["seconds"] for a in good), sorted(a["first"] for a in good if a["first"])
    settled = memory[int(SETTLED * len(memory)) :]
    window = max(len(settled) // 6, 1)
    rows = [
        ("all", "answers", len(good), ""),
        ("all", "errors", len(errors), ""),
        ("all", "answers_per_minute", 60 * len(good) / given.seconds, "1/min"),
        ("all", "answer_s_median", statistics.median(seconds), "s"),
        ("all", "answer_s_p95", seconds[int(0.95 * (len(seconds) - 1))], "s"),
        ("all", "first_token_s_median", statistics.median(first), "s"),
        ("all", "first_token_s_p95", first[int(0.95 * (len(first) - 1))], "s"),
        ("all", "documents_changed", CHANGED * len(changes), ""),
        ("all", "change_s_median", statistics.median(changes), "s"),
        ("all", "health_s_p95", sorted(health)[int(0.95 * (len(health) - 1))], "s"),
    ]
    for name in memory[0]:
        begin = statistics.median(m[name] for m in settled[:window])
        end = statistics.median(m[name] for m in settled[-window:])
        rows += [(name, "resident_mib_settled", begin, "MiB"), (name, "resident_mib_end", end, "MiB")]
    params = {"people": given.people, "seconds": given.seconds}
    return [
        Record("rag_load", "xquad", arm, metric, round(value, 4), unit, [], params) for arm, metric, value, unit in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
