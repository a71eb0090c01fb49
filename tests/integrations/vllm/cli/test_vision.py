"""The command `pilotfish prune` with many image formats, and the vision encoders of its test models."""

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
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write valid, unusual and damaged image files, and return their folder."""
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


@pytest.mark.slow
def test_prune_prints_token_counts_and_writes_overlays(cli: Callable, image_folder: Path, tmp_path: Path) -> None:
    answer = cli("prune", str(image_folder / "photo.png"), "--out", str(tmp_path / "drawn"))
    assert answer.returncode == 0, answer.stderr
    assert {p.name for p in (tmp_path / "drawn").iterdir()} == {
        f"photo-{name}.png" for name in ("globalcom2", "aim", "diversity")
    }
    assert "2144" in answer.stdout
    assert "560" in answer.stdout


@pytest.mark.slow
def test_prune_accepts_image_formats(inside: Callable, image_folder: Path, tmp_path: Path) -> None:
    names = ("cmyk.jpg", "clear.png", "gray.png", "animated.gif", "dot.png", "line.png")
    options = ("--pruner", "globalcom2,retain=0.1", "--out", str(tmp_path))
    answer = inside("prune", *(str(image_folder / n) for n in names), *options)
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
def test_prune_refuses_invalid_input(inside: Callable, image_folder: Path, tmp_path: Path, arguments, message) -> None:
    base.fetch_model(embedded.SMOLLM2)
    answer = inside("prune", str(image_folder / arguments[0]), *arguments[1:], "--out", str(tmp_path / "o"))
    assert answer.returncode == 2, answer.stdout
    assert message in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", registry.TEST_MODELS)
def test_vision_encoder_of_every_test_model(name: str, image_folder: Path) -> None:
    encoder = VisionEncoder(base.fetch_model(registry.EMBEDDED[name]))
    layout, image_features, features = encoder.encode(Image.open(image_folder / "photo.png"))
    assert image_features.tokens.shape == (layout.num_tokens, 576)
    assert image_features.scores is not None
    assert image_features.scores.shape == features.shape[:2]


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.long])])
def test_globalcom2_matches_naive_implementation_on_trained_vision_tower(image_folder: Path, count: int | None) -> None:
    """Test GlobalCom2 against the naive implementation in `test_pruners`, with scores of a trained vision tower."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("pruners", Path(__file__).parents[3] / "plugins" / "pruning" / "test_pruners.py")
    assert spec is not None and spec.loader is not None
    pruners = module_from_spec(spec)
    spec.loader.exec_module(pruners)
    encoder = VisionEncoder(base.fetch_model(registry.EMBEDDED["test-llava-next"]))
    data = Path(__file__).parents[4].parent / "shared" / "data"
    folders = (data / "skimage_samples", data / "owleval")
    photos = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg"))[:count]
    for path in (image_folder / "photo.png", image_folder / "line.png", *photos):
        layout, image_features, _ = encoder.encode(Image.open(path).convert("RGB"))
        assert image_features.scores is not None
        for retain in (0.5, 0.25, 0.1):
            pruner = GlobalCom2(GlobalCom2Options(retain))
            kept = set(pruner.select(layout, pruner.plan(layout), image_features).tolist())
            oracle = pruners.naive_globalcom2(layout, image_features.scores, retain, 10.0)
            assert len(kept ^ oracle) <= 2, "the sets may differ by ties that float32 and float64 resolve differently"


@pytest.mark.slow
def test_vision_encoder_matches_transformers(image_folder: Path) -> None:
    """Test that the visual tokens of an image are those of transformers' LLaVA-NeXT, in the same order."""
    from transformers import LlavaNextForConditionalGeneration

    folder = base.fetch_model(registry.EMBEDDED["test-llava-next"])
    image = Image.open(image_folder / "photo.png")
    encoder = VisionEncoder(folder)
    layout, image_features, _ = encoder.encode(image)
    inputs = encoder.processor.image_processor(image, return_tensors="pt")
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(expected[0], image_features.tokens, atol=2e-4, rtol=1e-3)
    assert isinstance(layout, ImageLayout)


def test_scores_do_not_leak_from_unscored_inputs() -> None:
    """Test that scores recorded for an input that was not scored, such as a video, do not leak into the next image."""
    from pilotfish.integrations.vllm.vision.patch_scores import ClsAttentionScorer

    scorer = ClsAttentionScorer.__new__(ClsAttentionScorer)
    scorer.begin(True)
    scorer._taken.append(torch.ones(3, 2))
    scorer.begin(False)
    scorer.begin(True)
    scorer._taken.append(torch.zeros(2, 2))
    assert torch.equal(scorer.take(), torch.zeros(2, 2))


def test_refuses_invalid_request_pruner() -> None:
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
