"""Which precision a run gets, what stays in float32, and what becomes of steps that overflow."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedDataParallelKwargs
from conftest import build_model, build_tokenizer
from datasets import Dataset
from fixed_rollouts import PROMPTS, rollout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl import ModelConfig

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.baselines import FineTuningConfig, FineTuningTrainer
from minillm_trl.cli.training import quantization_config
from minillm_trl.errors import UserError
from minillm_trl.hardware.precision import OverflowCounter, choose_precision, configure_wrappers, fsdp_policy
from minillm_trl.models.fused_head import ScoreRequest, add_scoring


def make_config(tmp_path, **options) -> MiniLLMConfig:
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, **options}
    return MiniLLMConfig(str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("settings", "dtype", "expected"),
    [
        ({"fp16": True}, None, torch.float16),
        ({"bf16": True}, None, torch.bfloat16),
        ({}, None, torch.float32),
        ({"fp16": True}, "float32", torch.float32),
    ],
)
def test_four_bit_students_compute_in_the_precision_of_the_run(settings: dict, dtype: str | None, expected):
    model = ModelConfig("student", load_in_4bit=True, bnb_4bit_quant_type="nf4", dtype=dtype)
    config = quantization_config(model, SimpleNamespace(**{"fp16": False, "bf16": False, **settings}))
    assert config.bnb_4bit_compute_dtype == expected
    assert quantization_config(ModelConfig("student"), SimpleNamespace(fp16=True, bf16=False)) is None


def test_bf16_without_a_gpu_names_use_cpu_which_allows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for config in (MiniLLMConfig, FineTuningConfig):
        with pytest.raises(UserError, match=r"bf16=True: .*use_cpu=True"):
            config(str(tmp_path), bf16=True)
        assert config(str(tmp_path), bf16=True, use_cpu=True).bf16


class TestConfigureWrappers:
    @staticmethod
    def accelerator(precision: str, **wrappers):
        state = SimpleNamespace(fsdp_plugin=wrappers.get("fsdp_plugin"))
        return SimpleNamespace(state=state, mixed_precision=precision, ddp_handler=wrappers.get("ddp_handler"))

    @pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
    def test_fsdp_keeps_sums_and_outputs_in_float32(self, precision: str, dtype: torch.dtype):
        plugin = SimpleNamespace(mixed_precision_policy="accelerate's")
        configure_wrappers(self.accelerator(precision, fsdp_plugin=plugin))
        policy = plugin.mixed_precision_policy
        assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, torch.float32, torch.float32)

    def test_fsdp_in_float32_is_left_alone(self):
        plugin = SimpleNamespace(mixed_precision_policy="accelerate's")
        configure_wrappers(self.accelerator("no", fsdp_plugin=plugin))
        assert plugin.mixed_precision_policy == "accelerate's"

    def test_ddp_has_no_second_copy_of_the_gradients(self):
        handler = DistributedDataParallelKwargs()
        configure_wrappers(self.accelerator("no", ddp_handler=handler))
        assert handler.to_kwargs()["gradient_as_bucket_view"] is True

    @pytest.mark.parametrize("kind", ["sft", "minillm"])
    def test_both_trainers_do_it(self, tmp_path, monkeypatch, kind: str):
        place = {"sft": "baselines.fine_tuning", "minillm": "training.teacher_mixed_trainer"}[kind]
        seen = []
        monkeypatch.setattr(f"minillm_trl.{place}.configure_wrappers", seen.append)
        torch.backends.cuda.enable_cudnn_sdp(True)
        tokenizer = build_tokenizer()
        student, teacher = (build_model("gpt2", len(tokenizer), seed) for seed in (0, 1))
        rows = {"prompt": ["a"] * 8, "completion": ["b"] * 8}
        if kind == "sft":
            args = FineTuningConfig(str(tmp_path), use_cpu=True, report_to="none")
            trainer = FineTuningTrainer(
                model=student, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer
            )
        else:
            args = make_config(tmp_path)
            trainer = MiniLLMTrainer(
                student, teacher, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer
            )
        assert seen == [trainer.accelerator]
        assert not torch.backends.cuda.cudnn_sdp_enabled()


class TestChoosePrecision:
    @pytest.mark.parametrize(
        ("launched", "options", "expected"),
        [
            (None, {}, (False, False)),
            ("no", {}, (False, False)),
            ("bf16", {}, (False, True)),
            ("bf16", {"bf16": False}, (False, True)),
            ("no", {"bf16": True}, (False, True)),
        ],
    )
    def test_what_is_set_is_what_accelerate_does(
        self, tmp_path, monkeypatch, launched, options: dict, expected: tuple
    ):
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        if launched is not None:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        args = make_config(tmp_path, **options)
        assert (args.fp16, args.bf16) == expected
        assert args.mixed_precision == ("bf16" if args.bf16 else "no")

    def test_cards_with_bfloat16_use_it_and_others_do_as_the_launcher_says(self, monkeypatch):
        class Arguments:
            fp16, bf16, use_cpu = False, None, False

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for capability, launched, expected in (
            ((8, 0), None, (False, True)),
            ((7, 0), None, (False, False)),
            ((7, 0), "fp16", (True, False)),
            ((9, 0), "fp16", (True, False)),
        ):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
            monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
            if launched:
                monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
            arguments = Arguments()
            choose_precision(arguments)
            assert (arguments.fp16, arguments.bf16) == expected


class TestOverflow:
    """With torch's gradient scaler on a CPU, where float32 gradients overflow at a scale of 2^127 or so."""

    def make_trainer(self, tmp_path, scale: float | None, max_steps: int, **options) -> MiniLLMTrainer:
        args = make_config(
            tmp_path,
            per_device_train_batch_size=8,
            steps_per_generation=1,
            max_completion_length=24,
            teacher_mixed_alpha=0.0,
            gradient_checkpointing=False,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,  # clipping would hide that the gradients are those without a scaler
            max_steps=max_steps,
            logging_steps=1,
            save_steps=4,
            **{"optim": "sgd", "learning_rate": 0.05, **options},
        )
        tokenizer = build_tokenizer()
        trainer = MiniLLMTrainer(
            build_model("gpt2", len(tokenizer)),
            build_model("gpt2", len(tokenizer), 1),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
            rollout_func=rollout,
        )
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=50)
            trainer.counts.overflows = OverflowCounter(trainer.accelerator)
            trainer.add_callback(trainer.counts.overflows)
        return trainer

    def test_steps_that_overflow_are_skipped_and_counted_and_a_resumed_run_goes_on(self, tmp_path):
        trainer = self.make_trainer(tmp_path, 2.0**68, max_steps=8)
        weights = [trainer.model.lm_head.weight.detach().clone()]
        step = trainer.accelerator.scaler.step

        def follow(optimizer, *args, **kwargs):
            result = step(optimizer, *args, **kwargs)
            weights.append(trainer.model.lm_head.weight.detach().clone())
            return result

        trainer.accelerator.scaler.step = follow
        trainer.train()
        logs = [each for each in trainer.state.log_history if "loss" in each]
        skipped = [int(each["fp16/skipped_steps"]) for each in logs]
        assert skipped[:4] == [1, 2, 3, 3]
        assert 3 <= skipped[-1] < 8
        counts = zip([0, *skipped], skipped, strict=False)
        assert [torch.equal(*pair) for pair in itertools.pairwise(weights)] == [new > old for old, new in counts]
        assert [each["fp16/loss_scale"] for each in logs] == [2.0 ** (68 - count) for count in skipped]
        assert all(each.isfinite().all() for each in trainer.model.parameters())
        assert torch.load(tmp_path / "checkpoint-4" / "scaler.pt")["scale"] == 2.0**65

        resumed = self.make_trainer(tmp_path, 1.0, max_steps=8)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        last = next(each for each in reversed(resumed.state.log_history) if "loss" in each)
        assert {name: last[name] for name in last if "fp16" in name} == {
            name: logs[-1][name] for name in last if "fp16" in name
        }
        for one, other in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_steps_that_a_fused_optimizer_skips_by_itself_are_counted(self, tmp_path):
        trainer = self.make_trainer(tmp_path, 2.0**68, max_steps=5, optim="adamw_torch_fused", learning_rate=1e-4)
        trainer.train()
        logs = [each for each in trainer.state.log_history if "loss" in each]
        skipped = [int(each["fp16/skipped_steps"]) for each in logs]
        assert skipped[:4] == [1, 2, 3, 3]
        assert [each["fp16/loss_scale"] for each in logs] == [2.0 ** (68 - count) for count in skipped]

    def test_scaled_losses_give_the_gradients_of_plain_ones(self, tmp_path):
        weights = []
        for scale in (None, 2.0**16):
            trainer = self.make_trainer(tmp_path, scale, max_steps=3)
            trainer.train()
            weights.append(torch.cat([each.detach().flatten() for each in trainer.model.parameters()]))
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-7)

    def test_without_float16_nothing_is_counted(self, tmp_path):
        trainer = self.make_trainer(tmp_path, None, max_steps=1)
        trainer.train()
        assert not any(name.startswith("fp16/") for each in trainer.state.log_history for name in each)


class TestFSDPPolicy:
    @pytest.fixture
    def mesh(self, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()

    # float16 cannot hold the gradients of a loss that it cannot hold either, which is what loss scales are for
    @pytest.mark.parametrize(("dtype", "weight"), [(torch.bfloat16, 1500.0), (torch.float16, 1.0)])
    def test_weights_are_gathered_in_half_precision_and_all_else_is_as_without_sharding(self, mesh, dtype, weight):
        ids = torch.arange(2, 26).view(2, 12)
        mask = torch.ones_like(ids)
        request = ScoreRequest(ids, mask, mask[:, 4:].bool(), loss=lambda scores, rows: -scores.logps * weight)
        results = []
        for sharded in (False, True):
            model = build_model("llama", 40).train()
            add_scoring(model, 40)
            residuals, gathered = [], []
            block = model.model.layers[0]
            if sharded:
                for each in (*model.model.layers, model.lm_head, model):  # the head is gathered by its own call
                    fully_shard(each, mesh=mesh, mp_policy=fsdp_policy(dtype))
            block.register_forward_hook(lambda module, args, output, kept=residuals: kept.append(output.dtype))
            block.mlp.register_forward_hook(
                lambda module, args, output, kept=gathered: kept.append(module.up_proj.weight.dtype)
            )
            with torch.autocast("cpu", dtype=dtype):
                scores = model(score_requests=[request])[0]
            scores.loss.backward()
            assert residuals == [torch.float32]
            assert gathered == [dtype if sharded else torch.float32]
            assert scores.loss.dtype == scores.logps.dtype == torch.float32
            assert scores.loss > 46 * weight  # with the larger weight more than float16 can hold
            gradients = [
                getattr(each.grad, "full_tensor", lambda each=each: each.grad)() for each in model.parameters()
            ]
            assert {each.dtype for each in gradients} == {torch.float32}
            results.append((scores.logps, torch.cat([each.flatten() for each in gradients])))
        (logps, gradient), (sharded_logps, sharded_gradient) = results
        torch.testing.assert_close(sharded_logps, logps, rtol=2e-2, atol=2e-2)
        assert (sharded_gradient - gradient).norm() < 0.03 * gradient.norm()
