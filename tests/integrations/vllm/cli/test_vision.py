"""`pilotfish prune` on all sorts of pictures, and the test models behind it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pilotfish.integrations.vllm.models import base, embedded, registry
from pilotfish.integrations.vllm.vision.image_encoder import VisionEncoder
from pilotfish.plugins.contracts import ImageLayout
from pilotfish.plugins.globalcom2 import GlobalCom2, GlobalCom2Options


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    photo = Image.fromarray(random.integers(0, 255, (6, 9, 3), np.uint8)).resize((600, 400))
    photo.save(folder / "photo.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("RGBA").save(folder / "clear.png")
    photo.convert("L").save(folder / "gray.png")
    frames = [photo.rotate(90 * i).convert("P") for i in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    photo.crop((0, 0, 1, 1)).save(folder / "dot.png")
    photo.resize((2000, 3)).save(folder / "line.png")
    (folder / "corrupt.png").write_bytes((folder / "photo.png").read_bytes()[:400])
    (folder / "text.png").write_text("no picture")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    return folder


def test_it_counts_and_draws(cli: Callable, pictures: Path, tmp_path: Path) -> None:
    answer = cli("prune", str(pictures / "photo.png"), "--out", str(tmp_path / "drawn"))
    assert answer.returncode == 0, answer.stderr
    assert {p.name for p in (tmp_path / "drawn").iterdir()} == {
        f"photo-{name}.png" for name in ("globalcom2", "aim", "diversity")
    }
    assert "2144" in answer.stdout
    assert "560" in answer.stdout


def test_all_sorts_of_pictures(inside: Callable, pictures: Path, tmp_path: Path) -> None:
    names = ("cmyk.jpg", "clear.png", "gray.png", "animated.gif", "dot.png", "line.png")
    chosen = ("--pruner", "globalcom2,retain=0.1", "--out", str(tmp_path))
    answer = inside("prune", *(str(pictures / n) for n in names), *chosen)
    assert answer.returncode == 0, answer.stderr
    assert len(list(tmp_path.iterdir())) == len(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("corrupt.png",), "corrupt.png"),
        (("text.png",), "not an image file"),
        (("huge.png",), "pixels"),
        (("none.png",), "No such file"),
        (("photo.png", "--pruner", "globalcom"), "did you mean 'globalcom2'"),
        (("photo.png", "--pruner", "globalcom2,retain=2"), "expected a share"),
        (("photo.png", "--model", "smollm2-135m-instruct"), "of type llama"),
        (("photo.png", "--model", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_pruned_is_refused(inside: Callable, pictures: Path, tmp_path: Path, arguments, message) -> None:
    base.fetch_model(embedded.SMOLLM2)
    answer = inside("prune", str(pictures / arguments[0]), *arguments[1:], "--out", str(tmp_path / "o"))
    assert answer.returncode == 2, answer.stdout
    assert message in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", registry.TEST_MODELS)
def test_eyes_of_all_models(name: str, pictures: Path) -> None:
    eye = VisionEncoder(base.fetch_model(registry.EMBEDDED[name]))
    layout, seen, features = eye.encode(Image.open(pictures / "photo.png"))
    assert seen.tokens.shape == (layout.num_tokens, 576)
    assert seen.scores is not None
    assert seen.scores.shape == features.shape[:2]


@pytest.mark.parametrize("count", [4, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.long])])
def test_kept_sets_are_those_of_the_card_on_a_real_tower(pictures: Path, count: int | None) -> None:
    """The loop over tokens of `test_pruners`, on scores that a real tower gives."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("pruners", Path(__file__).parents[3] / "plugins" / "pruning" / "test_pruners.py")
    assert spec is not None and spec.loader is not None
    pruners = module_from_spec(spec)
    spec.loader.exec_module(pruners)
    eye = VisionEncoder(base.fetch_model(registry.EMBEDDED["test-llava-next"]))
    data = Path(__file__).parents[4].parent / "shared" / "data"
    folders = (data / "skimage_samples", data / "owleval")
    real = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg"))[:count]
    for path in (pictures / "photo.png", pictures / "line.png", *real):
        layout, seen, _ = eye.encode(Image.open(path).convert("RGB"))
        assert seen.scores is not None
        for retain in (0.5, 0.25, 0.1):
            pruner = GlobalCom2(GlobalCom2Options(retain))
            kept = set(pruner.select(layout, pruner.plan(layout), seen).tolist())
            oracle = pruners.naive_globalcom2(layout, seen.scores, retain, 10.0)
            assert len(kept ^ oracle) <= 2, "but for ties that float32 and float64 see differently"


def test_an_eye_sees_what_transformers_does(pictures: Path) -> None:
    """Tokens of a picture as transformers' own LLaVA-NeXT packs them."""
    from transformers import LlavaNextForConditionalGeneration

    folder = base.fetch_model(registry.EMBEDDED["test-llava-next"])
    image = Image.open(pictures / "photo.png")
    eye = VisionEncoder(folder)
    layout, seen, _ = eye.encode(image)
    inputs = eye.processor.image_processor(image, return_tensors="pt")
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        made = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    made = getattr(made, "pooler_output", made)
    torch.testing.assert_close(made[0], seen.tokens, atol=2e-4, rtol=1e-3)
    assert isinstance(layout, ImageLayout)


def test_scores_of_one_picture_are_not_those_of_what_ran_before() -> None:
    """A video between two pictures, whose tower runs without anybody taking its scores."""
    from pilotfish.integrations.vllm.vision.patch_scores import ClsAttentionScorer

    scorer = ClsAttentionScorer.__new__(ClsAttentionScorer)
    scorer.begin(True)
    scorer._taken.append(torch.ones(3, 2))
    scorer.begin(False)
    scorer.begin(True)
    scorer._taken.append(torch.zeros(2, 2))
    assert torch.equal(scorer.take(), torch.zeros(2, 2))


def test_a_choice_that_nobody_can_write_is_refused() -> None:
    from pilotfish.integrations.vllm.vision import request_pruner
    from pilotfish.plugins.config import ConfigError

    engine = '{"name": "globalcom2"}'
    for wrong, message in (
        ("\ud800", "can hold"),
        ({"name": ["aim"]}, "expected a name"),
        ({"name": 1}, "expected a name"),
    ):
        with pytest.raises(ConfigError, match=message):
            request_pruner.request_options(engine, {"pruner": wrong})
