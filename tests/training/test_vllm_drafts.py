"""Mixing with vLLM in training: what the trainer asks of vLLM, what it trains on, and what is refused.

`tests/engines/test_vllm_mixing.py` is with vLLM itself.
"""

import copy
import sys
import types

import pytest
import torch
import trl
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from test_engine_drafts import StandIn
from test_trainer import DATASET, PROMPTS, make_config, make_trainer, weights

from minillm_trl.errors import UserError
from minillm_trl.objectives import mixture_logps
from minillm_trl.training.vllm_drafts import update_vllm, vllm_drafts

SPECULATIVE = {"use_vllm": True, "mixing": "speculative", "teacher_mixed_alpha": 0.5}


class SamplingParams:
    def __init__(self, **options):
        self.options = options


class LLM:
    """Answers as vLLM's class of that name does, from the weights of the last update."""

    def __init__(self, generation: "FakeVLLM"):
        self.generation = generation
        self.parameters: list[dict] = []
        self.room = 1000

    def generate(self, prompts, parameters, use_tqdm):
        assert not use_tqdm
        options = [given.options for given in parameters]
        self.parameters += options
        draw = StandIn(self.generation.copy, options[0]["stop_token_ids"], options[0]["temperature"])
        texts = [prompt["prompt_token_ids"] for prompt in prompts]
        limits = [
            max(min(one["max_tokens"], self.room - len(text)), 0) for one, text in zip(options, texts, strict=True)
        ]
        drafts = draw(texts, limits, [one["seed"] for one in options])
        return [self.answer(draft, options[0]["stop_token_ids"]) for draft in drafts]

    @staticmethod
    def answer(draft, ends):
        logps = [
            {token: types.SimpleNamespace(logprob=logp), token + 1: types.SimpleNamespace(logprob=-99.0)}
            for token, logp in zip(*draft, strict=True)
        ]
        reason = "stop" if draft.tokens and draft.tokens[-1] in ends else "length"
        one = types.SimpleNamespace(token_ids=tuple(draft.tokens), logprobs=logps, finish_reason=reason)
        return types.SimpleNamespace(outputs=[one])


class FakeVLLM:
    """TRL's vLLM, with a copy of the student's weights that only `sync_weights` updates."""

    def __init__(self, model, **kwargs):
        self.model, self.copy = model, None
        self.temperature, self.generation_kwargs = kwargs["temperature"], {}
        self.llm = LLM(self)
        self.whole_rollouts = 0

    def sync_weights(self):
        model = copy.deepcopy(self.model)
        self.copy = (model.merge_and_unload() if isinstance(model, PeftModel) else model).eval()

    def generate(self, prompts, images, num_generations, profiler=None):
        self.whole_rollouts += 1
        completions = [[8, 9, 0] for _ in prompts]
        return prompts, completions, [[[-3.0]] * 3 for _ in prompts], None


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", FakeVLLM)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=SamplingParams))


@pytest.mark.parametrize("mixing", ["speculative", "auto"])
def test_training_mixes_with_drafts_of_the_current_weights(tmp_path, mixing: str):
    trainer = make_trainer(
        tmp_path, **{**SPECULATIVE, "mixing": mixing}, max_steps=4, num_iterations=1, logging_steps=1
    )
    before = weights(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rollout/kept_drafts" in entry]
    assert len(logs) == 2  # a rollout for two updates
    for entry in logs:  # stale weights would be further off
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        assert entry["rollout/mixture_distance"] == 0.0
        assert 0.3 < entry["rollout/kept_drafts"] < 1.0
        assert "sampling/importance_sampling_ratio/mean" not in entry
    assert not torch.equal(weights(trainer), before)
    assert trainer.vllm_generation.whole_rollouts == 0
    asked = trainer.vllm_generation.llm.parameters
    assert len({one["seed"] for one in asked}) == len(asked)
    for one in asked:
        assert 0 <= one["seed"] < 2**63  # vLLM takes signed integers of 64 bits
        assert one["stop_token_ids"] == trainer.eos_token_ids
        assert one["ignore_eos"]
        assert one["logprobs"] == 0
        assert 1 <= one["max_tokens"] <= trainer.max_completion_length


@pytest.mark.parametrize(
    ("use_vllm", "alpha", "rollout_func", "are_drafts"),
    [
        (True, 0.1, None, True),
        (True, 1.0, None, True),
        (False, 0.5, None, False),
        (True, 0.0, None, False),
        (True, 0.5, print, False),
        (False, 0.0, print, False),
    ],
)
def test_drafts_are_for_mixed_rollouts_of_vllm(use_vllm: bool, alpha: float, rollout_func, are_drafts: bool):
    args, vllm = types.SimpleNamespace(teacher_mixed_alpha=alpha), object()
    trainer = types.SimpleNamespace(args=args, use_vllm=use_vllm, rollout_func=rollout_func, vllm_generation=vllm)
    assert (vllm_drafts(trainer) is not None) == are_drafts


def test_weights_go_to_vllm_once_after_each_update(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SPECULATIVE)
    copied = []
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", lambda: copied.append(trainer.state.global_step))
    for step in (0, 0, 1, 1):
        trainer.state.global_step = step
        update_vllm(trainer)
    assert copied == [0, 1]


def test_without_mixing_vllm_samples_whole_rollouts(tmp_path):
    trainer = make_trainer(tmp_path, use_vllm=True, teacher_mixed_alpha=0.0, max_steps=1, num_iterations=1)
    trainer.train()
    assert trainer.vllm_generation.whole_rollouts == 1
    assert not trainer.vllm_generation.llm.parameters


def test_batch_has_the_fields_and_the_values_of_a_mixed_rollout(tmp_path):
    trainer = make_trainer(tmp_path, **SPECULATIVE, temperature=0.8)
    own = make_trainer(tmp_path / "own", teacher_mixed_alpha=0.5, mixing="speculative", temperature=0.8)
    for each in (trainer, own):
        each.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:4]])
    expected = own._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:4]])
    assert batch.keys() == expected.keys()
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    scored = own.score_rollouts(*(batch[name] for name in names))
    for name in ("advantages", "old_per_token_logps", "student_logps", "long_term_weights", "teacher_hidden_states"):
        torch.testing.assert_close(batch[name], scored[name], rtol=1e-4, atol=1e-4)
    mask = batch["completion_mask"].bool()
    at_zero = mixture_logps(batch["student_logps"], batch["student_logps"] - 40.0, 0.5)
    assert (batch["old_per_token_logps"][mask] >= at_zero[mask] - 1e-5).all()


def test_lora_student_judges_with_merged_adapters(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear")
    options = {**SPECULATIVE, "max_steps": 4, "num_iterations": 1, "logging_steps": 1, "learning_rate": 0.05}
    trainer = make_trainer(tmp_path, family="llama", peft_config=lora, merged_rollouts=True, **options)
    merged = []
    mixed = trainer._mixing.applied_to

    def applied_to(sampler, student, *arguments):
        merged.append(all(layer.merged for layer in student.modules() if isinstance(layer, BaseTunerLayer)))
        return mixed(sampler, student, *arguments)

    trainer._mixing.applied_to = applied_to
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rollout/kept_drafts" in entry]
    assert merged == [True, True]
    assert len(logs) == 2
    for entry in logs:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
    adapter = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert max(float(value.detach().abs().max()) for value in adapter) > 0.01


def test_merged_rollouts_have_no_effect_where_vllm_samples_alone(tmp_path):
    with pytest.raises(UserError, match="merged_rollouts=True has no effect with use_vllm=True"):
        make_config(tmp_path, use_vllm=True, teacher_mixed_alpha=0.0, merged_rollouts=True)


def test_evaluation_samples_from_the_student_with_trls_correction(tmp_path):
    options = {"eval_dataset": DATASET.select(range(4)), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, **SPECULATIVE, **options)
    trainer.train()
    [evaluated] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.vllm_generation.whole_rollouts > 0
    assert "eval_sampling/importance_sampling_ratio/mean" in evaluated
    assert "eval_rollout/kept_drafts" not in evaluated


def test_vllm_without_room_for_a_segment_says_so(tmp_path):
    trainer = make_trainer(tmp_path, **SPECULATIVE)
    trainer.vllm_generation.llm.room = 7
    with pytest.raises(UserError, match="Raise vllm_max_model_length"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing": "coins"}, r"mixing='coins' does not work with .*toss a coin .* Set mixing='speculative'"),
        ({"vllm_mode": "server"}, r"vllm_mode='server' does not work .* Set vllm_mode='colocate'"),
        (
            {"vllm_tensor_parallel_size": 2},
            "vllm_tensor_parallel_size=2 does not work .* Set vllm_tensor_parallel_size=1",
        ),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode=True does not work"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex='a.' does not work"),
    ],
)
def test_settings_that_drafts_cannot_serve_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make_config(tmp_path, **{**SPECULATIVE, **options})


def test_adapters_are_merged_for_mixing(tmp_path):
    trainer = make_trainer(tmp_path, **SPECULATIVE, peft_config=LoraConfig(r=2, target_modules=["c_attn"]))
    assert trainer._rollout_copy is not None
