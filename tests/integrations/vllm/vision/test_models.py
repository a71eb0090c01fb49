"""Visual pruners in running engines, with a randomly initialised LLaVA-NeXT whose views have 4 x 4 patches."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from lora import RANK, save_adapter

from pilotfish.integrations.vllm.vision import layouts
from pilotfish.plugins.contracts import LayerSchedule
from pilotfish.plugins.globalcom2 import GlobalCom2, GlobalCom2Options
from pilotfish.plugins.pruning.importance import keep_visual_tokens, page_rank

pytestmark = pytest.mark.engine

SIZE = 56
PINPOINTS = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
SIZES = [(112, 112), (200, 90), (60, 150), (1, 1)]  # width, height
WORKER = Path(__file__).parents[1] / "vision_worker.py"


@pytest.fixture(scope="module")
def vision_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a LLaVA-NeXT checkpoint: the tiny Llama with a tiny CLIP vision tower."""
    import torch
    from safetensors.torch import save_file
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=14,
        initializer_range=0.2,
    )
    config = LlavaNextConfig(
        vision_config=tower,
        text_config=LlamaConfig.from_pretrained(tiny_model, vocab_size=49_216),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
        image_seq_length=16,
    )
    folder = tmp_path_factory.mktemp("seeing")
    model = LlavaNextForConditionalGeneration(config)
    model.save_pretrained(folder)
    # vLLM expects the weight names of published checkpoints.
    save_file(
        {
            k.replace("vision_tower.", "vision_tower.vision_model."): v
            for k, v in model.state_dict().items()
            if "lm_head" not in k
        },
        folder / "model.safetensors",
        {"format": "pt"},
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=PINPOINTS,
    )
    LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write images of the sizes in ``SIZES``, and return their paths."""
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for width, height in SIZES:
        coarse = random.integers(0, 255, (5, 5, 3), np.uint8)
        paths.append(str(folder / f"{width}x{height}.png"))
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def requests(image_paths: list[str]) -> list[dict[str, Any]]:
    """Return requests with one image, two images, and no image."""
    return [
        *({"prompt": "<image>\nWhat is it?", "pictures": [p]} for p in image_paths),
        {"prompt": "<image> and <image>: compare.", "pictures": image_paths[1:3]},
        {"prompt": "No picture, only words"},
    ]


def start_engine(start: Callable, model: str, pruner: Any = None, **config: Any) -> Any:
    """Start an engine with the worker for images, and with ``pruner`` if it is given."""
    selected = {} if pruner is None else {"additional_config": {"pilotfish": {"pruner": pruner}}}
    limit = {"limit_mm_per_prompt": {"image": 2}}
    return start(model, worker=WORKER, **{**limit, **selected, **config})


@pytest.mark.shows(
    "globalcom2", "chunked prefill", "prefix caching", "batches of mixed requests", "several images in a prompt"
)
def test_pruned_answers(
    start: Callable, vision_model: str, requests: list[dict[str, Any]], image_paths: list[str]
) -> None:
    """Test that retain=1.0 equals stock vLLM, and that pruned output depends on neither batching, chunking nor caches.

    Also test pruner options of single requests, and the errors for invalid ones.
    """
    stock = start_engine(start, vision_model)
    full = stock.ask(do="look", requests=requests)
    stock.close()

    pruned = start_engine(start, vision_model, {"name": "globalcom2", "retain": 1.0})
    assert pruned.ask(do="look", requests=requests) == full
    quarter = [{**r, "pruner": {"retain": 0.25}} for r in requests]
    together = pruned.ask(do="look", requests=quarter)
    pruner = GlobalCom2(GlobalCom2Options(0.25))
    for request, before, after in zip(requests, full["prompt"], together["prompt"], strict=True):
        saved = 0
        for path in request.get("pictures", ()):
            width, height = SIZES[image_paths.index(path)]
            layout = layouts.anyres_layout(_config(), height, width)
            saved += layout.num_tokens - pruner.plan(layout).num_tokens
        assert before - after == saved
    alone = [pruned.ask(do="look", requests=[r]) for r in quarter]
    assert [a["tokens"][0] for a in alone] == together["tokens"]
    for other in ({"name": "aim"}, "diversity", {"name": "diversity", "method": "determinantal", "retain": 0.5}):
        answer = pruned.ask(do="look", requests=[{**r, "pruner": other} for r in requests])
        assert all(n <= m for n, m in zip(answer["prompt"], full["prompt"], strict=True))
        assert answer["prompt"][0] < full["prompt"][0]
    for bad, message in (
        ({"retian": 0.1}, "did you mean 'retain'"),
        ("nope", "unknown, known are"),
        ({"retain": 3}, "expected a share"),
        (7, "expected a name or an object"),
        ({"name": ["aim"]}, "expected a name, got"),
        ({"temperature": 5e-324}, "expected a number of 1e-06 or more"),
        ({"name": "aim", "experimental_layers": [0, 1]}, "set for the whole engine"),
    ):
        assert message in pruned.ask(do="look", requests=[{**requests[0], "pruner": bad}])["error"]
    assert pruned.ask(do="look", requests=requests) == full, "the engine still works after rejected requests"
    metrics = pruned.ask(do="metrics")
    assert metrics["pilotfish_pruner_dropped_tokens_total"] > 0
    pruned.close()

    chunked = start_engine(
        start,
        vision_model,
        {"name": "globalcom2", "retain": 0.25},
        enable_prefix_caching=True,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        block_size=32,
    )
    assert chunked.ask(do="look", requests=requests)["tokens"] == together["tokens"]
    again = chunked.ask(do="look", requests=requests)
    assert again["tokens"] == together["tokens"]
    assert max(again["cached"]) > 0
    more = chunked.ask(do="look", requests=[{**r, "pruner": {"retain": 0.9}} for r in requests])
    assert more["prompt"] == together["prompt"], "the number of tokens is limited to what the engine was profiled for"
    named = {"prompt": requests[0]["prompt"], "pictures": image_paths[:1], "uuids": ["the picture"]}
    less = {**named, "pruner": {"retain": 0.1}}
    first, second, third = (chunked.ask(do="look", requests=[r]) for r in (named, less, named))
    assert first["tokens"] == third["tokens"] == [together["tokens"][0]]
    assert second["prompt"] < first["prompt"]
    chunked.close()


def _config() -> Any:
    """Return the fields of the model configuration that ``anyres_layout`` reads."""
    from types import SimpleNamespace

    vision = SimpleNamespace(image_size=SIZE, patch_size=14)
    return SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS)


@pytest.mark.long  # pruning in layers is experimental
@pytest.mark.shows("aim", "batches of mixed requests")
def test_visual_tokens_are_dropped_inside_the_language_model(
    start: Callable, vision_model: str, requests: list[dict[str, Any]]
) -> None:
    """Test that AIM's pruning between layers does not depend on the batch, and that deeper layers read fewer tokens."""
    aim_options = {"name": "aim", "merge_steps": 0, "experimental_layers": [0, 2]}
    unchunked = {"enable_prefix_caching": False, "enable_chunked_prefill": False, "max_num_batched_tokens": 1024}
    pruned = start_engine(start, vision_model, aim_options, **unchunked)
    lengths = [3, 12, 7, 5, 9, 12]
    alone = [pruned.ask(do="look", requests=[r], max_tokens=n) for r, n in zip(requests, lengths, strict=True)]
    staggered = pruned.ask(do="look_staggered", requests=requests, lengths=lengths)
    assert staggered["tokens"] == [a["tokens"][0] for a in alone]
    layers = pruned.ask(do="layers", request=requests[0])
    last = pruned.ask(do="layers", request={**requests[0], "prompt": "What is it?\n<image>"})
    rejected = pruned.ask(do="look", requests=[{**requests[0], "prompt_logprobs": 0}])
    assert "prompt_logprobs would lack the pruned tokens" in rejected["error"]
    pruned.close()
    assert last["visual"][-1], "the last token of the prompt is visual, and is never dropped"
    kept, token = masked_reference(
        vision_model, last["embeds"], [*last["visual"][:-1], False], LayerSchedule(0, 2, 0.1, 5)
    )
    assert (last["positions"], last["tokens"][0]) == (kept[:2], [token])
    text = layers["visual"].count(False)
    assert len(layers["positions"][0]) == alone[0]["prompt"][0] == text + sum(layers["visual"])
    assert len(layers["positions"][1]) == text + sum(layers["visual"]) // 2, (
        "the second layer reads half of the visual tokens"
    )
    assert layers["last"] == text, "no visual token is left after the second layer"
    kept, token = masked_reference(vision_model, layers["embeds"], layers["visual"], LayerSchedule(0, 2, 0.1, 5))
    assert layers["positions"] == kept[:2]
    assert layers["tokens"][0] == [token]


def masked_reference(
    folder: str, embeds: list[list[float]], visual: list[bool], schedule: LayerSchedule
) -> tuple[list[list[int]], int]:
    """Compute pruning between layers with transformers' model, masking dropped tokens in attention.

    Returns:
        The positions that each layer reads, and the next token.
    """
    import torch
    from transformers import LlavaNextForConditionalGeneration
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    language_model: Any = model.model.language_model
    hidden, n = torch.tensor(embeds, dtype=torch.float64)[None], len(embeds)
    cosine, sine = language_model.rotary_emb(hidden, torch.arange(n)[None])
    present, kept = torch.ones(n, dtype=torch.bool), [list(range(n))]
    with torch.inference_mode():
        for i, layer in enumerate(language_model.layers):
            attention, inputs = layer.self_attn, layer.input_layernorm(hidden)
            q, k, v = (
                p(inputs).view(1, n, -1, attention.head_dim).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cosine, sine)
            mask = torch.ones(n, n, dtype=torch.bool).tril() & (present | torch.eye(n, dtype=torch.bool))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
            hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            rows = present.nonzero().flatten()
            rank = page_rank(
                q[0, :, rows].transpose(0, 1),
                k[0, :, rows].transpose(0, 1),
                attention.scaling,
                schedule.temperature,
                schedule.iterations,
            )
            retained = keep_visual_tokens(rank, torch.tensor(visual)[rows], int(sum(visual) * schedule.kept_share(i)))
            present[rows[~retained]] = False
            kept.append(present.nonzero().flatten().tolist())
        return kept, int(model.lm_head(language_model.norm(hidden))[0, -1].argmax())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "pruner", [pytest.param(p, marks=pytest.mark.shows(p, "two tensor-parallel ranks")) for p in ("globalcom2", "aim")]
)
def test_two_tensor_parallel_ranks(
    start: Callable, two_ranks: Callable, vision_model: str, requests: list[dict[str, Any]], pruner: str
) -> None:
    """Test that scores of the vision tower's heads are summed over ranks, so that all ranks keep the same tokens."""
    alone = start_engine(start, vision_model, pruner)
    expected = alone.ask(do="look", requests=requests, max_tokens=40)["tokens"]
    alone.close()
    config = {"additional_config": {"pilotfish": {"pruner": pruner}}, "max_model_len": 1024}
    answer = two_ranks(vision_model, requests, limit_mm_per_prompt={"image": 2}, **config)
    assert answer["tokens"] == expected


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.shows("globalcom2", "LoRA")
def test_lora_adapters_of_the_language_model(
    start: Callable, vision_model: str, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Test LoRA adapters: retain=1.0 equals stock vLLM, and pruned output does not depend on the batch."""
    modules = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    adapter = save_adapter(tmp_path, modules, hidden_size=128)
    adapted = [{**r, "adapter": adapter} for r in requests]
    lora = {"enable_lora": True, "max_lora_rank": RANK}

    stock = start_engine(start, vision_model, **lora)
    full, without = stock.ask(do="look", requests=adapted), stock.ask(do="look", requests=requests)
    assert full["tokens"] != without["tokens"]
    stock.close()
    pruned = start_engine(start, vision_model, {"name": "globalcom2", "retain": 1.0}, **lora)
    assert pruned.ask(do="look", requests=adapted) == full
    quarter = [{**r, "pruner": {"retain": 0.25}} for r in adapted]
    together = pruned.ask(do="look", requests=quarter)
    assert together["prompt"][0] < full["prompt"][0]
    assert [pruned.ask(do="look", requests=[r])["tokens"][0] for r in quarter] == together["tokens"]
    pruned.close()


TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.slow
@pytest.mark.long
def test_server_accepts_image_formats_and_rejects_invalid_images(
    serve: Callable, vision_model: str, tmp_path: Path
) -> None:
    """Test that each image is either answered or rejected with an error, and that the server keeps running."""
    from PIL import Image

    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)).resize((120, 90))

    def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
        image.save(written := io.BytesIO(), kind, **options)
        return written.getvalue()

    rotated = [photo.rotate(90).convert("P")]
    images = {
        "rgb": encoded(photo),
        "cmyk": encoded(photo.convert("CMYK"), "JPEG"),
        "transparent": encoded(photo.convert("RGBA")),
        "animated": encoded(photo.convert("P"), "GIF", save_all=True, append_images=rotated),
        "dot": encoded(photo.crop((0, 0, 1, 1))),
        "line": encoded(photo.resize((3000, 1))),
        "corrupt": encoded(photo)[:200],
        "text": b"no picture",
        "empty": b"",
        "huge": encoded(Image.new("1", (14_000, 14_000))),
    }
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    pruner_arguments = ("--pruner", "globalcom2,retain=0.25", "--trust-request-mm-kwargs")
    model_arguments = ("--served-model-name", "seeing", "--chat-template", str(tmp_path / "chat.jinja"))
    server = serve(vision_model, tmp_path / "server.log", *pruner_arguments, *model_arguments)

    def ask(data: bytes, **more: Any) -> httpx.Response:
        url = {"url": "data:image/png;base64," + base64.b64encode(data).decode()}
        content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What?"}]
        body = {"model": "seeing", "max_tokens": 4, "messages": [{"role": "user", "content": content}], **more}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)

    try:
        answers = {name: ask(data) for name, data in images.items()}
        prompt = {name: a.json()["usage"]["prompt_tokens"] for name, a in answers.items() if a.status_code == 200}
        assert prompt.keys() == {"rgb", "cmyk", "transparent", "animated", "dot", "line"}, server.tail()
        assert prompt["rgb"] == prompt["cmyk"] == prompt["transparent"] == prompt["animated"]
        # vLLM itself returns status 500 for an image that exceeds its pixel limit.
        assert [answers[name].status_code for name in ("corrupt", "text", "empty", "huge")] == [400, 400, 400, 500]
        assert "pixels" in answers["huge"].text
        wrong = ask(images["rgb"], mm_processor_kwargs={"pruner": {"retian": 0.1}})
        assert wrong.status_code == 400
        assert "did you mean 'retain'" in wrong.text
        pruned = ask(images["rgb"], mm_processor_kwargs={"pruner": {"retain": 0.1}})
        assert pruned.json()["usage"]["prompt_tokens"] < prompt["rgb"]
        assert ask(images["rgb"]).json()["usage"]["prompt_tokens"] == prompt["rgb"], (
            "the server still answers after errors"
        )
    finally:
        server.interrupt()
        server.kill()


@pytest.mark.parametrize(
    ("pruner", "config", "reason"),
    [
        ({"name": "aim", "experimental_layers": [0, 2]}, {"enable_chunked_prefill": True}, "a chunk of a prompt"),
        ({"name": "aim", "experimental_layers": [0, 9]}, {}, "the language model has 2 layers"),
        ("globalcom2", {"mm_processor_kwargs": {"pruner": "aim"}}, "is for requests"),
    ],
)
def test_refuses_unsupported_engine_arguments(
    vision_model: str, pruner: Any, config: dict[str, Any], reason: str
) -> None:
    """Test that engine arguments that a pruner does not support are rejected."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"model": vision_model, "additional_config": {"pilotfish": {"pruner": pruner}}, **config}
    with pytest.raises(ValueError, match=reason):
        EngineArgs(**{"enable_prefix_caching": False, "enforce_eager": True, **arguments}).create_engine_config()


def test_refuses_model_without_image_input(tiny_model: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=r"globalcom2 does not support model .*: it takes no images"):
        EngineArgs(model=tiny_model, additional_config={"pilotfish": {"pruner": "globalcom2"}}).create_engine_config()
