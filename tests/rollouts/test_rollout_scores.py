"""What sampling leaves behind, where the teacher's states are kept, and half-precision rollouts."""

import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from test_trainer import DATASET, make_config, make_trainer, weights

import minillm_trl.training.teacher_mixed_trainer
from minillm_trl.models.fused_head import ScoreRequest, score_hidden_states
from minillm_trl.models.lm_head import LMHead
from minillm_trl.models.student_copy import RolloutCopy, rollout_copy, shards_student
from minillm_trl.models.teacher import TeacherOffload
from minillm_trl.rollouts.buffer import by_length, fill_empty_completions, parts_by_length, sequences, trim
from minillm_trl.rollouts.compiled_steps import CompiledDecoding
from minillm_trl.rollouts.scores import HeadStates, RolloutScorer, TeacherStates

MODELS = ("student", "teacher")
SCORES = ("advantages", "old_per_token_logps", "student_logps", "long_term_weights", "single_step_weights")


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"teacher_mixed_alpha": 0.0}, {"kd_temperature": 2.0, "temperature": 0.8}, {"sampling_batch_size": 3}],
    ids=["mixed", "student alone", "two temperatures", "in parts"],
)
def test_scores_of_sampling_equal_those_of_a_scoring_pass(tmp_path, family: str, options: dict):
    trainer = make_trainer(tmp_path, family=family, importance_weighting="prefix", **options)
    trainer.eos_token_ids = list(range(0, 60, 2))
    trainer.model.train()
    batch = trainer._generate_and_score_completions([DATASET[i] for i in range(8)])
    assert not trainer._rollout.scores.parts  # the hidden states of the rollout are freed
    mask = sequences(batch)[2]
    assert len(set(mask.sum(dim=1).tolist())) > 1
    tokens = (batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))
    again = trainer.score_rollouts(*tokens)
    for name in SCORES:
        torch.testing.assert_close(batch[name], again[name], rtol=1e-3, atol=1e-4)
    states = (each["teacher_hidden_states"][mask] for each in (batch, again))
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-3)
    other = trainer.score_rollouts(*(batch[n] for n in ("prompt_ids", "prompt_mask", "completion_ids")), mask.long())
    assert other["advantages"].shape == mask.shape


def set_dropout(model: torch.nn.Module) -> None:
    """Set the probability of every dropout to one half, in training mode."""
    model.train()
    ids = torch.arange(2, 9)[None]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_scores_are_those_without_dropout_and_the_mode_stays(tmp_path):
    trainer = make_trainer(tmp_path, teacher_mixed_alpha=0.0)
    ids, mask = torch.arange(5, 17).view(2, 6), torch.ones(2, 3, dtype=torch.long)
    expected = trainer.score_rollouts(ids[:, :3], mask, ids[:, 3:], mask)
    set_dropout(trainer.model)
    for training in (True, False):
        trainer.model.train(training)
        found = trainer.score_rollouts(ids[:, :3], mask, ids[:, 3:], mask)
        assert all(module.training == training for module in trainer.model.modules())
        for name in SCORES:
            torch.testing.assert_close(found[name], expected[name])


def test_teacher_that_is_the_student_gives_no_reward_in_half_precision(tmp_path):
    """Both score in the autocast of the run; the rounding of one of them alone would be a reward."""
    trainer = make_trainer(tmp_path, bf16=True, teacher_mixed_alpha=0.0, teacher=build_model("gpt2"))
    ids, mask = torch.arange(5, 21).view(2, 8), torch.ones(2, 4, dtype=torch.long)
    batch = trainer.score_rollouts(ids[:, :4], mask, ids[:, 4:], mask)
    assert not batch["advantages"].any()
    with torch.no_grad():
        plain = trainer.model(ids).logits[:, 3:-1].float().log_softmax(-1).gather(2, ids[:, 4:, None])[..., 0]
    assert 1e-5 < (batch["student_logps"] - plain).abs().max() < 0.05


def test_both_temperatures_come_from_one_product_of_each_head(monkeypatch):
    """In rollouts and in updates, with the bits of scores at each temperature alone."""
    torch.manual_seed(0)
    ids, mask = torch.randint(40, (3, 5)), torch.ones(3, 5, dtype=torch.bool)
    student, teacher = (HeadStates(torch.randn(3, 5, 16), LMHead(torch.randn(40, 16), None)) for _ in range(2))
    project, products = LMHead.project, []
    monkeypatch.setattr(LMHead, "project", lambda self, *args: products.append(self) or project(self, *args))

    def rollout(temperature: float, kd_temperature: float):
        return RolloutScorer(temperature, kd_temperature, 40).score(ids, mask, student, TeacherStates(*teacher))

    def update(temperature: float, kd_temperature: float):
        request = ScoreRequest(ids, mask, mask, temperature, teacher.hidden_states, kd_temperature)
        request = request._replace(loss=lambda scores, _: scores.logps + scores.divergence)
        hidden = student.hidden_states.clone().requires_grad_()
        return score_hidden_states(hidden, student.head, request, 40, teacher.head)

    for score in (rollout, update):
        products.clear()
        both = score(0.7, 2.0)
        assert len(products) == 2
        first, second = score(0.7, 0.7), score(2.0, 2.0)
        if score is update:
            assert torch.equal(both.logps, first.logps)
            assert torch.equal(both.entropy, first.entropy)
            assert torch.equal(both.divergence, second.divergence)
        else:
            assert all(torch.equal(getattr(both, f"{name}_logps"), getattr(first, f"{name}_logps")) for name in MODELS)
            names = [f"{name}_kd_logps" for name in MODELS]
            assert all(torch.equal(getattr(both, name), getattr(second, name)) for name in names)


def train(tmp_path, **options) -> torch.Tensor:
    return train_and_log(tmp_path, **options)[0]


def train_and_log(tmp_path, **options) -> tuple[torch.Tensor, list[dict[str, float]]]:
    trainer = make_trainer(
        tmp_path, optim="sgd", learning_rate=0.05, max_grad_norm=0.0, num_iterations=2, max_steps=6, **options
    )
    before = weights(trainer)
    trainer.train()
    return weights(trainer) - before, trainer.state.log_history


@pytest.mark.parametrize(
    "options",
    [{"teacher_hidden_states": "cpu"}, {"teacher_hidden_states": "recompute"}, {"offload_teacher": True}],
    ids=lambda options: next(iter(options)) + "=" + str(next(iter(options.values()))),
)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_where_the_teacher_and_its_states_are_does_not_change_training(tmp_path, alpha: float, options: dict):
    expected = train(tmp_path, teacher_mixed_alpha=alpha)
    actual = train(tmp_path, teacher_mixed_alpha=alpha, **options)
    assert (actual - expected).norm() < 1e-4 * expected.norm()


HAS_COMPILER = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()
NEEDS_COMPILER = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")


# "aot_eager" traces and functionalises as "inductor" does, which then compiles for half a minute
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[NEEDS_COMPILER, pytest.mark.slow])])
def test_compiled_rollouts_train_to_the_same_weights(tmp_path, monkeypatch, backend: str):
    def compiled(student, chosen: str, teacher) -> CompiledDecoding:
        assert chosen == "inductor"
        assert teacher is not None
        return CompiledDecoding(student, backend, teacher)

    monkeypatch.setattr(minillm_trl.training.decoding_setup, "CompiledDecoding", compiled)
    options = {"teacher_mixed_alpha": 0.2, "max_completion_length": 6, "family": "llama"}
    expected = train(tmp_path, **options)
    actual, logged = train_and_log(tmp_path, **options, compile_rollouts="inductor")
    assert (actual - expected).norm() < 1e-4 * expected.norm()
    assert [entry["rollout/compiled_steps"] for entry in logged if "rollout/eos_rate" in entry] == [1.0] * 2


def test_recomputed_states_are_not_in_the_batch(tmp_path):
    trainer = make_trainer(tmp_path, teacher_hidden_states="recompute")
    trainer.model.train()
    assert "teacher_hidden_states" not in trainer._generate_and_score_completions([DATASET[i] for i in range(8)])


class TestTeacherOffload:
    def test_all_but_the_head_is_on_the_device_in_a_phase_alone(self):
        teacher = build_model("llama")  # a head of its own
        ids = torch.arange(2, 9)[None]
        expected = teacher(ids).logits
        offload = TeacherOffload(teacher)
        home = {name: each.data_ptr() for name, each in teacher.named_parameters()}
        for _ in range(2):
            with offload:
                there = {name: each.data_ptr() for name, each in teacher.named_parameters()}
                assert torch.equal(teacher(ids).logits, expected)
            assert {name for name in home if home[name] == there[name]} == {"lm_head.weight"}
            assert {name: each.data_ptr() for name, each in teacher.named_parameters()} == home

    def test_teacher_runs_in_its_phase_alone(self, tmp_path):
        trainer, phases = make_trainer(tmp_path, teacher_mixed_alpha=0.0), []
        trainer.teacher_model.base_model.register_forward_pre_hook(lambda *unused: phases.append(list(inside)))
        inside: list[int] = []

        @contextmanager
        def phase() -> Iterator[None]:
            inside.append(1)
            yield
            inside.clear()

        for use in (
            lambda: trainer._generate_and_score_completions([DATASET[0], DATASET[1]]),
            lambda: trainer.score_rollouts(*torch.ones(4, 2, 3, dtype=torch.long)),
        ):
            trainer._teacher_phase = phase()
            use()
        assert phases == [[1]] * len(phases) != []

    def test_quantised_teacher_is_refused(self):
        teacher = build_model("gpt2").requires_grad_(False)
        teacher.transformer.h[0].mlp.c_fc.weight.data = torch.zeros(4, dtype=torch.uint8)
        with pytest.raises(ValueError, match="neither quantised nor sharded"):
            TeacherOffload(teacher)

    @pytest.mark.parametrize("options", [{"teacher_hidden_states": "recompute"}, {"lm_kd_ratio": 0.5}])
    def test_what_needs_the_teacher_in_inner_passes_is_refused(self, tmp_path, options: dict):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.* runs it in them. Drop one of them"):
            make_config(tmp_path, offload_teacher=True, **options)


class TestRolloutCopy:
    def test_copy_computes_like_the_model_in_half_precision_and_follows_it(self):
        model = build_model("llama")
        copied = RolloutCopy(model, torch.bfloat16)
        before = {name: each.clone() for name, each in model.named_parameters()}
        ids = torch.arange(2, 9)[None]
        for _ in range(2):
            expected = build_model("llama")
            expected.load_state_dict(model.state_dict())
            rotary = expected.model.rotary_emb.inv_freq
            expected = expected.bfloat16()
            expected.model.rotary_emb.inv_freq = rotary  # buffers keep their precision
            assert torch.equal(copied.model(ids).logits, expected(ids).logits)
            assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
            with torch.no_grad():
                for name, each in model.named_parameters():
                    each += 0.1
                    before[name] = each.clone()
            copied.refresh(model)
        assert all(each.dtype == torch.float32 and each.requires_grad for each in model.parameters())

    def test_weights_in_half_precision_are_shared(self):
        base = build_model("llama").bfloat16()
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=True)
        copied = RolloutCopy(model.get_base_model(), torch.bfloat16)
        shared = {name for name, each in copied.model.named_parameters() if any(each is p for p in base.parameters())}
        own = {name for name, _ in copied.model.named_parameters()} - shared
        assert shared
        assert own
        assert all("lora_" in name for name in own)

    def test_copy_of_a_model_in_training_mode_has_no_dropout(self):
        model, ids = build_model("gpt2"), torch.arange(2, 9)[None]
        expected = model.eval()(ids).logits
        set_dropout(model)
        copied = RolloutCopy(model, apart=True).model
        torch.testing.assert_close(copied(ids).logits, expected)
        assert not any(module.training for module in copied.modules())
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_autocast_is_for_a_copy_in_the_dtype_of_the_model_alone(self, dtype: torch.dtype | None):
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), mixed_precision="bf16", autocast=lambda: torch.autocast("cpu", torch.bfloat16)
        )
        with RolloutCopy(build_model("gpt2"), dtype, apart=True).precision(accelerator):
            assert torch.is_autocast_enabled("cpu") == (dtype is None)

    def test_tied_weights_stay_tied(self):
        copied = RolloutCopy(build_model("gpt2"), torch.bfloat16).model
        assert copied.lm_head.weight is copied.transformer.wte.weight

    def test_copy_of_a_sharded_student_keeps_the_weights_of_its_last_refresh(self):
        model = build_model("gpt2")
        copied, ids = RolloutCopy(model, sharded=True), torch.arange(2, 9)[None]
        before = copied.model(ids).logits
        assert torch.equal(before, model(ids).logits)
        with torch.no_grad():
            for each in model.parameters():
                each += 0.1
        assert torch.equal(copied.model(ids).logits, before)
        copied.release()
        assert not any(each.numel() for each in copied.model.parameters())
        copied.refresh(model)
        assert torch.equal(copied.model(ids).logits, model(ids).logits)

    @pytest.mark.parametrize(
        ("stage", "fsdp", "sharded"), [(None, None, False), (None, "plugin", True), (2, None, False), (3, None, True)]
    )
    def test_sharded_student_samples_from_a_copy(self, tmp_path, stage, fsdp, sharded: bool):
        plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
        state = SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=fsdp)
        accelerator = SimpleNamespace(state=state, mixed_precision="no")
        assert shards_student(accelerator) == sharded
        copied = rollout_copy(build_model("gpt2"), make_config(tmp_path, bf16=False), accelerator, merges=True)
        assert (copied is not None) == sharded

    def test_rollouts_come_from_the_copy_and_the_trained_weights_stay_float32(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path, bf16=True, half_precision_rollouts=True, max_steps=2)
        refreshed, decoded = [], []
        refresh = RolloutCopy.refresh
        monkeypatch.setattr(RolloutCopy, "refresh", lambda self, model: (refreshed.append(1), refresh(self, model)))
        trainer._rollout_copy.model.base_model.register_forward_hook(lambda *unused: decoded.append(1))
        before = weights(trainer)
        trainer.train()
        assert len(refreshed) == 1
        assert len(decoded) > 5
        assert not torch.equal(weights(trainer), before)
        assert weights(trainer).dtype == torch.float32

    def test_old_log_probs_are_those_of_the_copy(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path, bf16=True, half_precision_rollouts=True, teacher_mixed_alpha=0.0)
        monkeypatch.setattr(RolloutCopy, "refresh", lambda self, model: None)
        with torch.no_grad():  # so that a stale copy and the student are told apart
            for each in trainer.model.parameters():
                each.mul_(0.3)
        trainer.model.train()
        batch = trainer._generate_and_score_completions([DATASET[i] for i in range(8)])
        ids, attention_mask, mask = sequences(batch)
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        errors = []
        for model in (build_model("gpt2").bfloat16(), trainer.model):
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=attention_mask, position_ids=positions).logits.float()
            log_probs = logits[:, -mask.shape[1] - 1 : -1].log_softmax(dim=-1)
            logps = log_probs.gather(2, batch["completion_ids"][..., None]).squeeze(2)
            errors.append((batch["student_logps"] - logps)[mask].abs().mean().item())
        assert errors[0] < 0.05
        assert errors[1] > 0.2

    def test_needs_mixed_precision(self, tmp_path):
        with pytest.raises(ValueError, match="half_precision_rollouts=True"):
            make_config(tmp_path, half_precision_rollouts=True)


class TestEmptyCompletions:
    OUTPUT = {"prompt_ids": [[1], [2]], "completion_ids": [[5, 6], []], "logprobs": None}  # noqa: RUF012 - read only

    def test_they_get_a_token_in_each_field_that_there_is(self):
        filled, empty = fill_empty_completions(self.OUTPUT, 9)
        assert empty == [1]
        assert filled == {**self.OUTPUT, "completion_ids": [[5, 6], [9]]}
        output = {**self.OUTPUT, "logprobs": [[-1.0, -2.0], []], "env_mask": [[1, 1], []]}
        filled, _ = fill_empty_completions(output, 9)
        assert filled["completion_ids"] == [[5, 6], [9]]
        assert filled["logprobs"] == [[-1.0, -2.0], [0.0]]
        assert filled["env_mask"] == [[1, 1], [0]]

    def test_others_are_left_as_they_are(self):
        output = {**self.OUTPUT, "completion_ids": [[5, 6], [7]]}
        assert fill_empty_completions(output, 9) == (output, [])


class TestLengths:
    BATCH = {  # noqa: RUF012 - read only
        "prompt_ids": torch.tensor([[1, 1, 5], [1, 1, 7], [1, 8, 9], [1, 1, 6]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.tensor([[5, 0, 1, 1], [5, 5, 5, 0], [0, 1, 1, 1], [4, 0, 1, 1]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]),
        "advantages": torch.arange(16.0).view(4, 4),
        "long_term_weights": torch.ones(4, 1),
    }

    def test_trim_drops_columns_that_are_padding_everywhere(self):
        trimmed = trim({name: values[[0, 3]] for name, values in self.BATCH.items()})
        assert trimmed["prompt_ids"].tolist() == [[5], [6]]
        assert trimmed["completion_ids"].tolist() == [[5, 0], [4, 0]]
        assert trimmed["advantages"].tolist() == [[0, 1], [12, 13]]
        assert trimmed["long_term_weights"].shape == (2, 1)
        whole = trim(self.BATCH)
        assert whole["prompt_ids"].shape == (4, 2)
        assert whole["completion_ids"].shape == (4, 4)

    def test_trim_leaves_a_column_of_an_empty_completion(self):
        empty = {**self.BATCH, "completion_mask": torch.zeros(4, 4)}
        assert trim(empty)["completion_ids"].shape == (4, 1)

    def test_by_length_sorts_within_each_step_alone(self):
        lengths = torch.tensor([3, 5, 3, 9])
        assert by_length(lengths, 1).tolist() == [3, 1, 0, 2]
        assert by_length(lengths, 2).tolist() == [1, 0, 3, 2]
        assert by_length(lengths, 4).tolist() == [0, 1, 2, 3]

    def test_parts_have_rows_of_like_length_and_their_columns(self):
        mask = torch.cat([self.BATCH["prompt_mask"], self.BATCH["completion_mask"]], dim=1)
        parts = [(rows.tolist(), columns) for rows, columns in parts_by_length(mask, 2)]
        assert parts == [([1, 0], slice(2, 7)), ([2, 3], slice(1, 5))]

    def test_micro_batches_of_a_step_have_rows_of_like_length(self, tmp_path):
        trainer = make_trainer(tmp_path, gradient_accumulation_steps=4, steps_per_generation=8, max_steps=1)
        widths = []
        compute_loss = trainer._compute_loss

        def recorded(model, inputs):
            widths.append(sequences(inputs)[0].shape[1])
            return compute_loss(model, inputs)

        trainer._compute_loss = recorded
        trainer.train()
        assert widths[0] > widths[3]
        assert len(widths) == 4
