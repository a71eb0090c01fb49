"""Visual pruners in real engines, on a LLaVA-NeXT of random weights that sees in views of 4 x 4 patches."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

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
def seeing_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama behind a tiny CLIP tower."""
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
    # As published checkpoints name the tower's weights, and vLLM reads them.
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
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for width, height in SIZES:
        coarse = random.integers(0, 255, (5, 5, 3), np.uint8)
        paths.append(str(folder / f"{width}x{height}.png"))
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def requests(pictures: list[str]) -> list[dict[str, Any]]:
    return [
        *({"prompt": "<image>\nWhat is it?", "pictures": [p]} for p in pictures),
        {"prompt": "<image> and <image>: compare.", "pictures": pictures[1:3]},
        {"prompt": "No picture, only words"},
    ]


def engine_with(start: Callable, model: str, pruner: Any = None, **config: Any) -> Any:
    chosen = {} if pruner is None else {"additional_config": {"pilotfish": {"pruner": pruner}}}
    limit = {"limit_mm_per_prompt": {"image": 2}}
    return start(model, worker=WORKER, **{**limit, **chosen, **config})


@pytest.mark.shows(
    "globalcom2", "chunked prefill", "prefix caching", "batches of mixed requests", "several images in a prompt"
)
def test_pruned_answers(
    start: Callable, seeing_model: str, requests: list[dict[str, Any]], pictures: list[str]
) -> None:
    """Everything kept is stock; less is the same whole or in chunks, alone or together, first or from caches."""
    stock = engine_with(start, seeing_model)
    full = stock.ask(do="look", requests=requests)
    stock.close()

    ours = engine_with(start, seeing_model, {"name": "globalcom2", "retain": 1.0})
    assert ours.ask(do="look", requests=requests) == full
    quarter = [{**r, "pruner": {"retain": 0.25}} for r in requests]
    together = ours.ask(do="look", requests=quarter)
    pruner = GlobalCom2(GlobalCom2Options(0.25))
    for request, before, after in zip(requests, full["prompt"], together["prompt"], strict=True):
        saved = 0
        for path in request.get("pictures", ()):
            width, height = SIZES[pictures.index(path)]
            layout = layouts.anyres_layout(_config(), height, width)
            saved += layout.num_tokens - pruner.plan(layout).num_tokens
        assert before - after == saved
    alone = [ours.ask(do="look", requests=[r]) for r in quarter]
    assert [a["tokens"][0] for a in alone] == together["tokens"]
    for other in ({"name": "aim"}, "diversity", {"name": "diversity", "method": "determinantal", "retain": 0.5}):
        answer = ours.ask(do="look", requests=[{**r, "pruner": other} for r in requests])
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
        assert message in ours.ask(do="look", requests=[{**requests[0], "pruner": bad}])["error"]
    assert ours.ask(do="look", requests=requests) == full, "the engine lives on"
    counted = ours.ask(do="metrics")
    assert counted["pilotfish_pruner_dropped_tokens_total"] > 0
    ours.close()

    chunked = engine_with(
        start,
        seeing_model,
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
    assert more["prompt"] == together["prompt"], "no more room than the engine was measured for"
    named = {"prompt": requests[0]["prompt"], "pictures": pictures[:1], "uuids": ["the picture"]}
    less = {**named, "pruner": {"retain": 0.1}}
    first, second, third = (chunked.ask(do="look", requests=[r]) for r in (named, less, named))
    assert first["tokens"] == third["tokens"] == [together["tokens"][0]]
    assert second["prompt"] < first["prompt"]
    chunked.close()


def _config() -> Any:
    from types import SimpleNamespace

    vision = SimpleNamespace(image_size=SIZE, patch_size=14)
    return SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS)


@pytest.mark.shows("aim", "batches of mixed requests")
def test_visual_tokens_leave_inside_the_language_model(
    start: Callable, seeing_model: str, requests: list[dict[str, Any]]
) -> None:
    """Answers alone are those in a batch of prompts, decodes and plain text; what leaves is gone for deeper layers."""
    inside = {"name": "aim", "merge_steps": 0, "experimental_layers": [0, 2]}
    whole = {"enable_prefix_caching": False, "enable_chunked_prefill": False, "max_num_batched_tokens": 1024}
    ours = engine_with(start, seeing_model, inside, **whole)
    lengths = [3, 12, 7, 5, 9, 12]
    alone = [ours.ask(do="look", requests=[r], max_tokens=n) for r, n in zip(requests, lengths, strict=True)]
    staggered = ours.ask(do="look_staggered", requests=requests, lengths=lengths)
    assert staggered["tokens"] == [a["tokens"][0] for a in alone]
    seen = ours.ask(do="layers", request=requests[0])
    last = ours.ask(do="layers", request={**requests[0], "prompt": "What is it?\n<image>"})
    asked = ours.ask(do="look", requests=[{**requests[0], "prompt_logprobs": 0}])
    assert "prompt_logprobs would lack the pruned tokens" in asked["error"]
    ours.close()
    assert last["visual"][-1], "a prompt that ends with a picture is sampled from its last token, which stays"
    kept, token = with_masks(seeing_model, last["embeds"], [*last["visual"][:-1], False], LayerSchedule(0, 2, 0.1, 5))
    assert (last["positions"], last["tokens"][0]) == (kept[:2], [token])
    text = seen["visual"].count(False)
    assert len(seen["positions"][0]) == alone[0]["prompt"][0] == text + sum(seen["visual"])
    assert len(seen["positions"][1]) == text + sum(seen["visual"]) // 2, "half of the visual tokens are left"
    assert seen["last"] == text, "and none behind the second layer"
    kept, token = with_masks(seeing_model, seen["embeds"], seen["visual"], LayerSchedule(0, 2, 0.1, 5))
    assert seen["positions"] == kept[:2]
    assert seen["tokens"][0] == [token]


def with_masks(
    folder: str, embeds: list[list[float]], visual: list[bool], schedule: LayerSchedule
) -> tuple[list[list[int]], int]:
    """The same in transformers' model, where tokens that left are hidden from attention: kept positions, next token."""
    import torch
    from transformers import LlavaNextForConditionalGeneration
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    inside: Any = model.model.language_model
    hidden, n = torch.tensor(embeds, dtype=torch.float64)[None], len(embeds)
    cosine, sine = inside.rotary_emb(hidden, torch.arange(n)[None])
    here, kept = torch.ones(n, dtype=torch.bool), [list(range(n))]
    with torch.inference_mode():
        for i, layer in enumerate(inside.layers):
            attention, inputs = layer.self_attn, layer.input_layernorm(hidden)
            q, k, v = (
                p(inputs).view(1, n, -1, attention.head_dim).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cosine, sine)
            mask = torch.ones(n, n, dtype=torch.bool).tril() & (here | torch.eye(n, dtype=torch.bool))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
            hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            rows = here.nonzero().flatten()
            rank = page_rank(
                q[0, :, rows].transpose(0, 1),
                k[0, :, rows].transpose(0, 1),
                attention.scaling,
                schedule.temperature,
                schedule.iterations,
            )
            stays = keep_visual_tokens(rank, torch.tensor(visual)[rows], int(sum(visual) * schedule.kept_share(i)))
            here[rows[~stays]] = False
            kept.append(here.nonzero().flatten().tolist())
        return kept, int(model.lm_head(inside.norm(hidden))[0, -1].argmax())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "pruner", [pytest.param(p, marks=pytest.mark.shows(p, "two tensor-parallel ranks")) for p in ("globalcom2", "aim")]
)
def test_two_tensor_parallel_ranks(
    start: Callable, two_ranks: Callable, seeing_model: str, requests: list[dict[str, Any]], pruner: str
) -> None:
    """Heads of the tower are split: their scores are added over ranks, which then keep the same tokens."""
    alone = engine_with(start, seeing_model, pruner)
    expected = alone.ask(do="look", requests=requests, max_tokens=40)["tokens"]
    alone.close()
    config = {"additional_config": {"pilotfish": {"pruner": pruner}}, "max_model_len": 1024}
    answer = two_ranks(seeing_model, requests, limit_mm_per_prompt={"image": 2}, **config)
    assert answer["tokens"] == expected


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.shows("globalcom2", "LoRA")
def test_adapters_of_the_language_model(
    start: Callable, seeing_model: str, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    """With LoRA: everything kept is stock, less is the same alone or together."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    names = [f"base_model.model.model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    weights = {f"{n}.lora_A.weight": torch.randn(8, 128) for n in names}
    weights |= {f"{n}.lora_B.weight": torch.randn(128, 8) * 0.3 for n in names}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    adapted = [{**r, "adapter": str(tmp_path)} for r in requests]
    lora = {"enable_lora": True, "max_lora_rank": 8}

    stock = engine_with(start, seeing_model, **lora)
    full, without = stock.ask(do="look", requests=adapted), stock.ask(do="look", requests=requests)
    assert full["tokens"] != without["tokens"]
    stock.close()
    ours = engine_with(start, seeing_model, {"name": "globalcom2", "retain": 1.0}, **lora)
    assert ours.ask(do="look", requests=adapted) == full
    quarter = [{**r, "pruner": {"retain": 0.25}} for r in adapted]
    together = ours.ask(do="look", requests=quarter)
    assert together["prompt"][0] < full["prompt"][0]
    assert [ours.ask(do="look", requests=[r])["tokens"][0] for r in quarter] == together["tokens"]
    ours.close()


TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.slow
@pytest.mark.long
def test_pictures_of_all_sorts_are_sent_to_a_server(serve: Callable, seeing_model: str, tmp_path: Path) -> None:
    """A right answer or a clear error, and the server lives on."""
    from PIL import Image

    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)).resize((120, 90))

    def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
        image.save(written := io.BytesIO(), kind, **options)
        return written.getvalue()

    turned = [photo.rotate(90).convert("P")]
    sent = {
        "rgb": encoded(photo),
        "cmyk": encoded(photo.convert("CMYK"), "JPEG"),
        "transparent": encoded(photo.convert("RGBA")),
        "animated": encoded(photo.convert("P"), "GIF", save_all=True, append_images=turned),
        "dot": encoded(photo.crop((0, 0, 1, 1))),
        "line": encoded(photo.resize((3000, 1))),
        "corrupt": encoded(photo)[:200],
        "text": b"no picture",
        "empty": b"",
        "huge": encoded(Image.new("1", (14_000, 14_000))),
    }
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    chosen = ("--pruner", "globalcom2,retain=0.25", "--trust-request-mm-kwargs")
    named = ("--served-model-name", "seeing", "--chat-template", str(tmp_path / "chat.jinja"))
    server = serve(seeing_model, tmp_path / "server.log", *chosen, *named)

    def ask(picture: bytes, **more: Any) -> httpx.Response:
        url = {"url": "data:image/png;base64," + base64.b64encode(picture).decode()}
        content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What?"}]
        body = {"model": "seeing", "max_tokens": 4, "messages": [{"role": "user", "content": content}], **more}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)

    try:
        answers = {name: ask(picture) for name, picture in sent.items()}
        prompt = {name: a.json()["usage"]["prompt_tokens"] for name, a in answers.items() if a.status_code == 200}
        assert prompt.keys() == {"rgb", "cmyk", "transparent", "animated", "dot", "line"}, server.tail()
        assert prompt["rgb"] == prompt["cmyk"] == prompt["transparent"] == prompt["animated"]
        # vLLM itself answers 500 to a picture beyond its limit of pixels, and says so.
        assert [answers[name].status_code for name in ("corrupt", "text", "empty", "huge")] == [400, 400, 400, 500]
        assert "pixels" in answers["huge"].text
        wrong = ask(sent["rgb"], mm_processor_kwargs={"pruner": {"retian": 0.1}})
        assert wrong.status_code == 400
        assert "did you mean 'retain'" in wrong.text
        less = ask(sent["rgb"], mm_processor_kwargs={"pruner": {"retain": 0.1}})
        assert less.json()["usage"]["prompt_tokens"] < prompt["rgb"]
        assert ask(sent["rgb"]).json()["usage"]["prompt_tokens"] == prompt["rgb"], "the server lives on"
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
def test_engines_that_cannot_are_refused(seeing_model: str, pruner: Any, config: dict[str, Any], reason: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"model": seeing_model, "additional_config": {"pilotfish": {"pruner": pruner}}, **config}
    with pytest.raises(ValueError, match=reason):
        EngineArgs(**{"enable_prefix_caching": False, "enforce_eager": True, **arguments}).create_engine_config()


def test_a_model_without_pictures_is_refused(tiny_model: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=r"globalcom2 does not support model .*: it takes no images"):
        EngineArgs(model=tiny_model, additional_config={"pilotfish": {"pruner": "globalcom2"}}).create_engine_config()
