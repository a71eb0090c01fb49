"""Tests of the speculative settings that drafters refuse."""

from types import SimpleNamespace
from typing import Any

import pytest

from pilotfish.integrations.vllm.drafting import compatibility
from pilotfish.integrations.vllm.engine import vllm_api
from pilotfish.integrations.vllm.engine.selection import PROPOSER_CLASS
from pilotfish.plugins.config import ConfigError, PilotfishConfig, Selection, Verification
from pilotfish.plugins.contracts import Drafter, Engine, Unsupported
from pilotfish.plugins.rasd import RASD
from pilotfish.plugins.token_recycling import TokenRecycling


def check(**speculative: Any) -> None:
    settings = {"method": "custom_class", "model": PROPOSER_CLASS, **speculative}
    model = SimpleNamespace(model="m", enable_prompt_embeds=False, runner_type="generate")
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(**settings), model_config=model, use_v2_model_runner=False
    )
    compatibility._check_speculation(TokenRecycling, TokenRecycling.Options(), PilotfishConfig(), config)


@pytest.mark.parametrize(
    "speculative",
    [
        {},
        {"rejection_sample_method": "standard"},
        {"rejection_sample_method": "block", "draft_sample_method": "greedy"},
    ],
)
def test_accepts_settings_that_keep_the_output_distribution(speculative: dict[str, str]) -> None:
    check(**speculative)


@pytest.mark.parametrize(
    ("name", "value"), [("draft_sample_method", "probabilistic"), ("rejection_sample_method", "synthetic")]
)
def test_refuses_settings_that_its_verifier_does_not_implement(name: str, value: str) -> None:
    with pytest.raises(Unsupported, match=rf"token_recycling does not support model m: {name}='{value}'.*remove it"):
        check(**{name: value})


class OnTheHost(TokenRecycling):
    """A drafter without a counterpart on the device."""

    name = "on_the_host"
    device_drafter = Drafter.device_drafter  # type: ignore[assignment]


TREES = PilotfishConfig(verification=Verification("tree"))


def check_v2(drafter: Any = TokenRecycling, selection: PilotfishConfig | None = None, **facts: Any) -> None:
    settings = {"num_speculative_tokens": 48, "enable_adaptive_verification": False, **facts.pop("speculative", {})}
    speculative = SimpleNamespace(method="ngram_gpu", model="ngram_gpu", **settings)
    config = SimpleNamespace(
        speculative_config=facts.pop("speculative_config", speculative),
        model_config=SimpleNamespace(
            model="m", enable_prompt_embeds=False, runner_type="generate", return_sampling_mask=facts.pop("mask", False)
        ),
        parallel_config=SimpleNamespace(enable_batch_sharded_sampling=facts.pop("sharded", False)),
        use_v2_model_runner=True,
    )
    compatibility._check_speculation(drafter, drafter.Options(), selection or PilotfishConfig(), config)


def test_the_v2_runner_takes_a_drafter_with_a_counterpart_on_the_device() -> None:
    check_v2()
    check_v2(selection=TREES)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"drafter": OnTheHost}, "on_the_host does not support model m: the drafter has no counterpart on the device"),
        ({"selection": TREES, "speculative": {"num_speculative_tokens": 64}}, "at most 63 nodes"),
        (
            {"selection": TREES, "speculative": {"enable_adaptive_verification": True}},
            "adaptive verification truncates",
        ),
        ({"selection": TREES, "mask": True}, "omit --return-sampling-mask"),
        ({"selection": PilotfishConfig(kv=Selection("quest"))}, "no KV policy together with a drafter"),
        ({"selection": PilotfishConfig(verification=Verification(nodes=4))}, "remove nodes"),
        ({"sharded": True}, "omit --enable-batch-sharded-sampling"),
        ({"speculative": {"draft_sample_method": "probabilistic"}}, "draft_sample_method='probabilistic'"),
    ],
)
def test_the_v2_runner_refuses(facts: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        check_v2(**facts)


@pytest.mark.parametrize(
    ("drafter", "options", "selection", "objection"),
    [
        (TokenRecycling, {}, PilotfishConfig(), None),
        (RASD, {}, TREES, None),
        (OnTheHost, {}, PilotfishConfig(), "no counterpart on the device"),
        (TokenRecycling, {"shape": "template"}, PilotfishConfig(), "trees are dynamic"),
        (TokenRecycling, {}, PilotfishConfig(verification=Verification(nodes=4)), "num_speculative_tokens"),
        (RASD, {}, PilotfishConfig(kv=Selection("tidal_decode")), "no KV policy"),
    ],
)
def test_serve_uses_the_v2_runner_where_vllm_and_the_drafter_do(
    monkeypatch, drafter: Any, options: dict[str, Any], selection: PilotfishConfig, objection: str | None
) -> None:
    arguments = drafter, drafter.Options(**options), selection, Engine("m", 0, 0, 0, 1)
    found = compatibility.device_objection(*arguments)
    assert found is None if objection is None else objection in (found or "")
    for gpu, setting, expected in (
        (True, "", objection is None),
        (False, "", False),  # vLLM's CPU build has the V1 runner
        (True, "0", False),
        (False, "1", True),  # what the drafter does not support is refused then
    ):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", setting)
        monkeypatch.setattr(vllm_api, "is_gpu_build", lambda gpu=gpu: gpu)
        assert compatibility.uses_device(*arguments) is expected


@pytest.mark.parametrize("speculative", [None, SimpleNamespace(method="ngram"), SimpleNamespace(method="custom_class")])
def test_the_v2_runner_names_the_method_that_calls_the_drafter(speculative: Any) -> None:
    with pytest.raises(ConfigError, match=r"set --speculative-config '\{\"method\": \"ngram_gpu\", "):
        check_v2(speculative_config=speculative)


@pytest.mark.parametrize(("verification", "first"), [("chain", 12), ("tree", 48)])
@pytest.mark.parametrize("drafter", [TokenRecycling, RASD])
def test_draft_tokens_follow_from_the_number_of_requests(drafter: Any, verification: str, first: int) -> None:
    utils = pytest.importorskip("vllm.v1.spec_decode.dynamic.utils")
    config = compatibility.device_speculation(drafter, verification)
    most = config["num_speculative_tokens"]
    tokens = utils.build_dynamic_sd_schedule_lookup(config["num_speculative_tokens_per_batch_size"], 512, most)[1:]
    assert tokens[0] == most == first
    assert tokens == sorted(tokens, reverse=True)
    for requests, each in enumerate(tokens, 1):
        assert each == 0 or requests * (each + 1) <= compatibility.MEMORY_BOUND_TOKENS
    assert tokens[-1] == 0
