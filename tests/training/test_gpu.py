"""What only a CUDA device can show. Small models: values, not speed; `benchmarks/` has that."""

import copy
import importlib
import itertools
import json
import math

import pytest
import torch
import trl.trainer.grpo_trainer
import trl.trainer.utils
import yaml
from conftest import build_model, build_tokenizer, run_module
from peft import LoraConfig
from test_trainer import DATASET, make_trainer, weights
from transformers import BitsAndBytesConfig

from minillm_trl import MiniLLMTrainer
from minillm_trl.models.fused_head import ScoreRequest, score_hidden_states
from minillm_trl.models.lm_head import LMHead
from minillm_trl.rollouts.buffer import sequences
from minillm_trl.rollouts.compiled_steps import CompiledDecoding
from minillm_trl.rollouts.sampling import sample_prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
KERNELS = ("chunked_divergence", "chunked_logprob", "logprob_entropy")
LONG_PROMPTS = [[5 + i, *range(6, 6 + (3 * i) % 11)] for i in range(12)]
KEYS = [(7, sum(prompt)) for prompt in LONG_PROMPTS]


@pytest.fixture(autouse=True)
def no_kernels_of_trl(monkeypatch: pytest.MonkeyPatch):
    """They need Triton, without which V100s have to do."""

    def refuse(*args, **kwargs):
        raise AssertionError("a kernel of TRL was called")

    kernels = [importlib.import_module(f"trl.kernels.{name}") for name in KERNELS]
    for module in (*kernels, trl.trainer.utils, trl.trainer.grpo_trainer):
        for name, member in list(vars(module).items()):
            if callable(member) and str(getattr(member, "__module__", "")).startswith("trl.kernels"):
                monkeypatch.setattr(module, name, refuse)


def train(tmp_path, **options) -> MiniLLMTrainer:
    trainer = make_trainer(tmp_path, use_cpu=False, **{"learning_rate": 1e-3, "num_iterations": 2, **options})
    trainer.train()
    return trainer


def losses(trainer: MiniLLMTrainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def sample(student, teacher=None, **options) -> list[list[int]]:
    common = {"keys": KEYS, "max_new_tokens": 24, "eos_token_ids": [0, 3], "pad_token_id": 1, "batch_size": 5}
    return sample_prompts(student, LONG_PROMPTS, **common, teacher=teacher, **options)


class TestSampling:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
    def test_tokens_are_those_of_the_cpu(self, family: str, dtype: torch.dtype):
        models = [build_model(family, 50, seed, 16).to(dtype) for seed in (0, 1)]
        for options in ({}, {"alpha": 0.3, "keep_states": True}, {"alpha": 0.3, "shared_coins": False}):
            expected = sample(*models, **options)
            assert sample(*(copy.deepcopy(model).cuda() for model in models), **options) == expected
            assert len({len(completion) for completion in expected}) > 3  # rows finish at different steps

    @pytest.mark.parametrize("with_teacher", [False, True])
    @pytest.mark.parametrize(("family", "backend"), [("gpt2", "cudagraphs"), ("llama", "inductor")])
    def test_compiled_decoding_samples_the_same_from_batch_to_batch(
        self, family: str, backend: str, with_teacher: bool
    ):
        models = [build_model(family, 50, seed, 16).double().cuda() for seed in (0, 1)]
        options = {"alpha": 0.3, "keep_states": True, "shared_coins": not with_teacher}
        expected = sample(*models, **options)
        compiled = CompiledDecoding(models[0], backend, models[1] if with_teacher else None)
        for _ in range(2):
            assert sample(*models, **options, compiled=compiled) == expected
        steps, all_steps = compiled.take_counts()
        assert steps == all_steps > 0
        with torch.no_grad():  # as the copy of the student is brought up to date: in place
            for parameter in models[0].parameters():
                parameter.mul_(0.9)
        expected, before = sample(*models, **options), expected
        assert sample(*models, **options, compiled=compiled) == expected != before


class TestFusedHead:
    """Against float64 on the CPU."""

    @pytest.mark.parametrize(
        ("precision", "tolerance"), [("no", 2e-6), ("fp16", 3e-3), ("bf16", 2.5e-2)], ids=["float32", "fp16", "bf16"]
    )
    def test_loss_and_gradients(self, monkeypatch: pytest.MonkeyPatch, precision: str, tolerance: float):
        monkeypatch.setattr("minillm_trl.models.fused_head.CHUNK_ELEMENTS", 16_000)  # 16 tokens a chunk
        torch.manual_seed(0)
        rows, length, vocab = 4, 40, 1000
        hidden, teacher_hidden = torch.randn(rows, length, 64).double(), torch.randn(rows, length, 96).double()
        weight, teacher_weight = 0.2 * torch.randn(vocab, 64).double(), 0.2 * torch.randn(vocab, 96).double()
        bias = torch.randn(vocab).double()
        ids, mask = torch.randint(vocab, (rows, length)), torch.rand(rows, length) < 0.8

        def score(device: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> tuple:
            inputs = [
                tensor.detach().to(device, dtype, copy=True).requires_grad_() for tensor in (hidden, weight, bias)
            ]
            states, head = (tensor.to(device, teacher_dtype) for tensor in (teacher_hidden, teacher_weight))
            where, counted = ids.to(device), mask.to(device)
            request = ScoreRequest(
                where, counted, counted, 1.3, states, loss=lambda scores, _: 0.3 * scores.logps + scores.divergence
            )
            with torch.autocast(device, PRECISIONS.get(precision), enabled=device == "cuda" and precision != "no"):
                scores = score_hidden_states(inputs[0], LMHead(*inputs[1:]), request, vocab, LMHead(head, None))
            scale = 2.0**10 if precision == "fp16" else 1.0
            (scores.loss * scale).backward()
            return scores, [tensor.grad / scale for tensor in inputs]

        expected, expected_gradients = score("cpu", torch.float64, torch.float64)
        scores, gradients = score("cuda", torch.float32, PRECISIONS.get(precision, torch.float32))
        assert scores.loss.dtype == scores.logps.dtype == scores.divergence.dtype == torch.float32
        pairs = [(getattr(scores, name), getattr(expected, name)) for name in ("logps", "entropy", "divergence")]
        for actual, reference in [*pairs, *zip(gradients, expected_gradients, strict=True)]:
            error = (actual.cpu().double() - reference).norm() / reference.norm()
            assert error < tolerance
        assert scores.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)

    def test_sums_over_tokens_may_be_more_than_float16_can_hold(self):
        torch.manual_seed(0)
        hidden = 30.0 * torch.rand(1, 300, 64, device="cuda")  # all tokens pull the same way
        weight = torch.zeros(500, 64, device="cuda")
        ids, mask = torch.full((1, 300), 7, device="cuda"), torch.ones(1, 300, dtype=torch.bool, device="cuda")
        request = ScoreRequest(ids, mask, mask, loss=lambda scores, _: -scores.logps)
        gradients = []
        for enabled in (True, False):
            own = weight.clone().requires_grad_()
            with torch.autocast("cuda", torch.float16, enabled=enabled):
                loss = score_hidden_states(hidden, LMHead(own, None), request, 500).loss
            (loss / 300).backward()
            gradients.append(own.grad)
        assert 64 * 300 * gradients[1].abs().max() > torch.finfo(torch.float16).max
        torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)


class TestAttention:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_left_padding_leaves_gradients_finite_at_every_length(self, tmp_path, family: str, precision: str):
        """cuDNN's attention, torch's choice on Hopper, gives NaN at 64 tokens."""
        student = build_model(family, len(build_tokenizer()), width=64).cuda()
        options = {"fp16": precision == "fp16", "bf16": precision == "bf16", "family": family}
        trainer = make_trainer(tmp_path, use_cpu=False, student=student, **options)
        for length in (48, 64, 65, 96, 128):
            ids = torch.randint(2, 200, (3, length), device="cuda")
            attention_mask = (
                torch.arange(length, device="cuda") >= torch.tensor([[20], [3], [0]], device="cuda")
            ).long()
            mask = attention_mask[:, 24:].bool()
            request = ScoreRequest(ids, attention_mask, mask, loss=lambda scores, _: -scores.logps / 64)
            gradients = []
            for score in (trainer.scoring.answer, lambda model, request: model(score_requests=[request])):
                trainer.model.zero_grad()
                score(trainer.model, request)[0].loss.backward()
                gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]))
            assert (gradients[0] - gradients[1]).norm() < {"fp16": 0.02, "bf16": 0.1}[precision] * gradients[1].norm()


class TestHalfPrecision:
    @pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
    def test_steps_that_overflow_are_skipped_and_counted_and_a_resumed_run_goes_on(self, tmp_path, optim: str):
        options = {"fp16": True, "optim": optim, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 12}
        options |= {"num_iterations": 2}

        def make(scale: float) -> MiniLLMTrainer:
            trainer = make_trainer(tmp_path, use_cpu=False, max_steps=20, **options)
            trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=scale)
            return trainer

        trainer = make(2.0**24)
        taken = [weights(trainer)]
        step = trainer.accelerator.scaler.step

        def follow(optimizer, *args, **kwargs):
            result = step(optimizer, *args, **kwargs)
            taken.append(weights(trainer))
            return result

        trainer.accelerator.scaler.step = follow
        trainer.train()
        logs = losses(trainer)
        skipped = [int(log["fp16/skipped_steps"]) for log in logs]
        assert 1 <= skipped[-1] < 12
        counts = zip([0, *skipped], skipped, strict=False)
        assert [torch.equal(*pair) for pair in itertools.pairwise(taken)] == [new > old for old, new in counts]
        assert [log["fp16/loss_scale"] for log in logs] == [2.0 ** (24 - count) for count in skipped]
        assert taken[-1].isfinite().all()
        assert taken[-1].dtype == torch.float32
        saved = torch.load(tmp_path / "checkpoint-12" / "scaler.pt")
        assert saved["scale"] == 2.0 ** (24 - skipped[11])

        resumed = make(1.0)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
        for one, other in zip(logs[12:], losses(resumed)[12:], strict=True):
            assert {name: one[name] for name in one if "fp16" in name} == {n: other[n] for n in other if "fp16" in n}
        torch.testing.assert_close(weights(resumed), taken[-1], rtol=0.0, atol=1e-6)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_log_probs_of_the_half_precision_copy_are_those_of_training(self, tmp_path, precision: str):
        trainer = make_trainer(tmp_path, use_cpu=False, fp16=precision == "fp16", bf16=precision == "bf16")
        assert trainer._rollout_copy.model.dtype == PRECISIONS[precision]
        assert weights(trainer).dtype == torch.float32
        trainer.model.train()
        batch = trainer._generate_and_score_completions([DATASET[i] for i in range(8)])
        input_ids, attention_mask, mask = sequences(batch)
        request = ScoreRequest(input_ids, attention_mask, mask)
        of_training = trainer.scoring.without_gradient(trainer.model, request).logps
        with torch.no_grad():
            exact = trainer.model(score_requests=[request])[0].logps  # outside autocast
        tolerance = {"fp16": 0.02, "bf16": 0.15}[precision]
        for one, other in ((batch["student_logps"], of_training), (of_training, exact)):
            assert 0 < (one - other)[mask].abs().max() < tolerance

    @pytest.mark.parametrize(
        ("precision", "backend"), [("fp16", None), ("bf16", None), ("fp16", "cudagraphs"), ("bf16", "inductor")]
    )
    def test_training_with_compiled_rollouts_stays_finite(self, tmp_path, precision: str, backend: str | None):
        trainer = train(
            tmp_path, fp16=precision == "fp16", bf16=precision == "bf16", compile_rollouts=backend, max_steps=8
        )
        logs = losses(trainer)
        assert all(math.isfinite(value) for log in logs for value in log.values() if isinstance(value, float))
        assert weights(trainer).isfinite().all()
        assert ("fp16/loss_scale" in logs[-1]) == (precision == "fp16")
        assert logs[-1]["objective/reverse_kl"] < logs[0]["objective/reverse_kl"]

    def test_bfloat16_is_the_default_on_cards_that_have_it(self, tmp_path):
        trainer = train(tmp_path, max_steps=1)
        assert trainer.args.bf16 == (torch.cuda.get_device_capability() >= (8, 0))
        assert trainer.args.half_precision_rollouts == trainer.args.bf16


class TestPlaces:
    @pytest.mark.parametrize(
        "options",
        [{"offload_teacher": True}, {"teacher_hidden_states": "cpu"}, {"teacher_hidden_states": "recompute"}],
        ids=["teacher on the CPU", "states on the CPU", "states computed anew"],
    )
    @pytest.mark.parametrize("alpha", [0.0, 0.5])
    def test_where_the_teacher_and_its_states_are_does_not_change_training(self, tmp_path, alpha: float, options):
        common = {"teacher_mixed_alpha": alpha, "bf16": False, "optim": "sgd", "learning_rate": 0.05, "max_steps": 6}
        before = weights(make_trainer(tmp_path, use_cpu=False, **common))
        expected, actual = train(tmp_path, **common), train(tmp_path, **common, **options)
        assert {parameter.device.type for parameter in actual.model.parameters()} == {"cuda"}
        if "offload_teacher" in options:
            places = [parameter.device.type for parameter in actual.teacher_model.base_model.h.parameters()]
            assert set(places) == {"cpu"}
        if options.get("teacher_hidden_states") == "cpu":
            assert all(batch["teacher_hidden_states"].is_pinned() for batch in actual.buffer.batches)
        moved = weights(expected) - before
        assert (weights(actual) - weights(expected)).norm() < 1e-4 * moved.norm()

    @pytest.mark.parametrize("device", ["cpu", "cuda:1"])
    def test_rollouts_on_another_device_change_no_training(self, tmp_path, device: str):
        if device == "cuda:1" and torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        common = {"bf16": False, "optim": "sgd", "learning_rate": 0.05, "max_steps": 8, "overlap_rollouts": True}
        before = weights(make_trainer(tmp_path, use_cpu=False, **common))
        expected, actual = train(tmp_path, **common), train(tmp_path, **common, rollout_device=device)
        assert {str(parameter.device) for parameter in actual.teacher_model.parameters()} == {device}
        assert {parameter.device.index for parameter in actual.model.parameters()} == {0}
        moved = weights(expected) - before
        assert (weights(actual) - weights(expected)).norm() < 1e-3 * moved.norm()

    def test_training_in_float32_is_that_on_the_cpu(self, tmp_path):
        common = {"bf16": False, "optim": "sgd", "learning_rate": 0.05, "max_steps": 6, "num_iterations": 2}
        on_cpu = make_trainer(tmp_path, **common)
        before = weights(on_cpu)
        on_cpu.train()
        moved = weights(on_cpu) - before
        assert (weights(train(tmp_path, **common)).cpu() - weights(on_cpu)).norm() < 1e-3 * moved.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_qlora_student_of_an_nf4_teacher(tmp_path, model_dir, precision: str):
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=PRECISIONS[precision]
    )
    args = make_trainer(tmp_path, use_cpu=False, fp16=precision == "fp16", bf16=precision == "bf16").args
    args.teacher_model_init_kwargs = {"quantization_config": nf4}
    args.gradient_checkpointing = True
    args.max_steps = 8
    trainer = MiniLLMTrainer(
        model_dir("llama", width=64),
        model_dir("llama", seed=1, width=128),
        args=args,
        train_dataset=DATASET,
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        quantization_config=nf4,
    )
    trained = {name: w.detach().clone() for name, w in trainer.model.named_parameters() if w.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert any(parameter.dtype == torch.uint8 for parameter in trainer.teacher_model.parameters())
    trainer.train()
    logs = losses(trainer)
    assert all(math.isfinite(value) for log in logs for value in log.values() if isinstance(value, float))
    assert logs[-1]["objective/reverse_kl"] < logs[0]["objective/reverse_kl"]
    parameters = dict(trainer.model.named_parameters())
    assert all(parameters[name].isfinite().all() for name in trained)
    assert any(not torch.equal(parameters[name], parameter) for name, parameter in trained.items())


def test_resumed_run_reaches_the_weights_of_an_uninterrupted_one(tmp_path):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "linear"}
    whole = train(tmp_path, **options)
    resumed = make_trainer(tmp_path, use_cpu=False, learning_rate=1e-3, num_iterations=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0.0, atol=1e-6)


@pytest.mark.cli
class TestCommands:
    def test_minillm_trains_in_float16(self, tmp_path, model_dir):
        run = {
            "model_name_or_path": model_dir("llama"),
            "teacher_model_name_or_path": model_dir("llama", seed=1, width=48),
            "dataset": str(tmp_path / "prompts.jsonl"),
            "output_dir": str(tmp_path / "out"),
            "fp16": True,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "max_completion_length": 8,
            "logging_steps": 1,
            "report_to": "none",
        }
        rows = [{"prompt": f"the mill {i}\n"} for i in range(64)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        checked = run_module("minillm_trl", "doctor", "--config", tmp_path / "run.yaml")
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert torch.cuda.get_device_name() in checked.stdout
        result = run_module("minillm_trl", "minillm", "--config", tmp_path / "run.yaml")
        assert result.returncode == 0, result.stderr[-3000:]
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        assert "fp16/loss_scale" in next(log for log in state["log_history"] if "loss" in log)
        assert (tmp_path / "out" / "model.safetensors").exists()
