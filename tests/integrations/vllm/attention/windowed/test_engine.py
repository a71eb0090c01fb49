"""RazorAttention inside a real engine: identical where nothing is dropped, and memory that comes back."""

import random

import pytest

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
BLOCK = 32
WINDOW = {"window": 96, "ratio": 0, "sinks": 4}


def kv(**options) -> dict:
    return {"additional_config": {"pilotfish": {"kv": {"name": "razor_attention", **options}}}, "block_size": BLOCK}


def texts_of(lengths: list[int]) -> list[list[int]]:
    """Prompts of given lengths that repeat themselves, so that there is something to look back at."""
    rng = random.Random(0)
    return [([rng.randrange(1000, 40000) for _ in range(150)] * 20)[:n] for n in lengths]


PROMPTS = texts_of([700, 90, 460, 199, 330])


def ask(prompts: list[list[int]], **sampling) -> dict:
    return {"do": "sample", "prompts": prompts, "sampling": [{**GREEDY, **sampling}] * len(prompts)}


@pytest.fixture(scope="module")
def stock(start, model) -> list[list[int]]:
    """What stock vLLM writes."""
    engine = start(model)
    tokens = engine.ask(**ask(PROMPTS))["tokens"]
    engine.close()
    return tokens


@pytest.fixture(scope="module")
def streaming(start, model, stock):
    """An engine whose windows are far shorter than the prompts, in chunks of 128 tokens."""
    del stock  # its engine has ended
    return start(model, max_num_batched_tokens=128, **kv(**WINDOW, prefill="streaming"))


@pytest.mark.shows("razor_attention", "full budget equals stock")
def test_windows_longer_than_the_context_change_nothing(start, model, stock) -> None:
    engine = start(model, max_num_batched_tokens=128, **kv(window=1024, ratio=0))
    assert engine.ask(**ask(PROMPTS))["tokens"] == stock
    engine.close()


@pytest.mark.shows("razor_attention", "batches of mixed requests", "chunked prefill")
def test_what_a_token_sees_depends_on_its_position_alone(streaming, stock) -> None:
    """Alone, or beside requests that prefill in chunks, decode, or come and go."""
    together = streaming.ask(**ask(PROMPTS))["tokens"]
    alone = [streaming.ask(**ask([p]))["tokens"][0] for p in PROMPTS]
    assert together == alone
    assert together[1] == stock[1], "a text within the window is read whole"
    assert together != stock, "others are not"


def test_blocks_come_back(streaming) -> None:
    """15 of 90 heads keep everything; a group of 15 windowed heads holds sinks, window and what is being written."""
    streaming.ask(do="blocks")
    streaming.ask(**ask([PROMPTS[0]]))
    found = streaming.ask(do="blocks")
    assert found["free"] == found["all"], "every block is back"
    whole, windowed = -(-724 // BLOCK), 1 + (96 + 128) // BLOCK + 1
    assert found["all"] - found["least"] <= whole + 5 * windowed
    assert found["all"] - found["least"] < 0.6 * 6 * whole, "far fewer than if all heads kept everything"


def test_admission_follows_the_real_need(streaming) -> None:
    found = streaming.ask(do="blocks")
    reading, decoding = (-(-1024 // BLOCK) + 5 * (1 + -(-(96 + new) // BLOCK) + 1) for new in (128, 1))
    assert found["concurrency"] == pytest.approx(1 + (found["all"] - reading) / decoding, rel=0.02)
    assert found["tokens"] == pytest.approx(found["concurrency"] * 1024, rel=0.001)


@pytest.mark.long
@pytest.mark.shows("razor_attention", "preemption")
def test_preempted_requests_go_on(start, model, streaming) -> None:
    """Too few blocks for all: some start again, and write what they would have written alone."""
    prompts = [PROMPTS[i][:300] for i in (0, 2, 4)]
    alone = [streaming.ask(**ask([p], max_tokens=300))["tokens"][0] for p in prompts]
    streaming.close()
    small = start(model, max_num_batched_tokens=128, num_gpu_blocks_override=127, **kv(**WINDOW, prefill="streaming"))
    together = small.ask(**ask(prompts, max_tokens=300))
    assert together["preemptions"] > 0
    assert together["tokens"] == alone
    found = small.ask(do="blocks")
    assert found["free"] == found["all"]
    small.close()


@pytest.fixture(scope="module")
def exact(start, model):
    """An engine that reads prompts whole."""
    return start(model, max_num_batched_tokens=128, **kv(**WINDOW))


def test_exact_prefill_reads_whole_prompts_and_frees_them(exact, stock) -> None:
    engine = exact
    answers = engine.ask(**ask(PROMPTS))["tokens"]
    assert [a[0] for a in answers] == [s[0] for s in stock], "the first token follows a prompt that was read whole"
    assert answers != stock
    engine.ask(do="blocks")
    engine.ask(**ask([PROMPTS[0]], max_tokens=1))
    assert (found := engine.ask(do="blocks"))["all"] - found["least"] == 6 * -(-700 // BLOCK)


@pytest.mark.long
@pytest.mark.shows("razor_attention", "a drafter beside it")
def test_together_with_a_drafter(start, model, exact, drafting_args) -> None:
    """Tokens that are drafted see what they would see if they were decoded one by one."""
    drafter, policy = drafting_args(), kv(**WINDOW)
    both = drafter["additional_config"]["pilotfish"] | policy["additional_config"]["pilotfish"]
    expected = exact.ask(**ask(PROMPTS, max_tokens=30))["tokens"]
    exact.close()
    engine = start(model, **{**policy, **drafter, "additional_config": {"pilotfish": both}})
    engine.ask(do="draft_always")
    answer = engine.ask(**ask(PROMPTS, max_tokens=30))
    assert answer["tokens"] == expected
    assert answer["drafted"] > 0
    engine.close()


@pytest.mark.long
@pytest.mark.shows("razor_attention", "two tensor-parallel ranks")
def test_two_tensor_parallel_ranks(two_ranks, start, tiny_model) -> None:
    """Each rank keeps one head whole, of different layers, though all ranks' caches have to be alike."""
    policy = kv(keep=[[0, 0], [1, 1]], window=64, ratio=0, prefill="streaming")
    prompts = [p[:400] for p in PROMPTS[:3]]
    alone = start(tiny_model, **policy)
    expected = alone.ask(**ask(prompts, max_tokens=40))["tokens"]
    alone.close()
    assert two_ranks(tiny_model, prompts, enable_prefix_caching=False, **policy)["tokens"] == expected
