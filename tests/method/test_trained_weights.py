"""A run whose weights cannot move, or have no gradient, says so before it trains."""

import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_adapters import train
from transformers import AutoModelForCausalLM

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.baselines import FineTuningConfig, FineTuningTrainer, KDConfig, KDTrainer
from minillm_trl.errors import UserError
from minillm_trl.evaluation.evaluate import evaluate_model
from minillm_trl.models.lm_head import without_wrapper
from minillm_trl.training.trained_weights import check_trained_weights, stuck_share, unit_step

ROWS = Dataset.from_dict({"prompt": ["the punter"] * 8, "completion": [" is cheap"] * 8})


def make_trainer(kind: str, folder: str, student, teacher=None, **options):
    settings = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 1}
    settings |= {"gradient_checkpointing": False, "per_device_train_batch_size": 8, **options}
    peft_config = settings.pop("peft_config", None)
    data = {"train_dataset": ROWS, "processing_class": build_tokenizer(), "peft_config": peft_config}
    teacher = build_model("gpt2", len(build_tokenizer()), 1) if teacher is None else teacher
    if kind == "sft":
        return FineTuningTrainer(model=student, args=FineTuningConfig(folder, **settings), **data)
    if kind == "kd":
        return KDTrainer(model=student, teacher_model=teacher, args=KDConfig(folder, **settings), **data)
    settings |= {"steps_per_generation": 1, "max_completion_length": 4}
    data["train_dataset"] = Dataset.from_dict({"prompt": [f"the punter {i}" for i in range(8)]})
    return MiniLLMTrainer(student, teacher, args=MiniLLMConfig(folder, **settings), **data)


class TestStuckShare:
    def test_bounds_of_what_moves(self):
        step = 2.0**-10
        weights = torch.tensor([0.24, 0.26, -0.24, 0.51, -0.51, 1.0, 0.0])  # bfloat16 has steps of 2^-9 below 1/2
        assert stuck_share([weights.bfloat16()], step) == pytest.approx(3 / 7)
        assert stuck_share([weights.half()], step) == 0.0
        assert stuck_share([weights], 1e-9) == 0.0
        assert stuck_share([weights.bfloat16(), torch.ones(7)], step) == pytest.approx(3 / 14)
        assert stuck_share([], step) == 0.0
        assert stuck_share((each for each in (weights.bfloat16(), torch.ones(7))), step) == pytest.approx(3 / 14)

    @pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 2e-5), (torch.float16, 5e-6)])
    def test_it_is_what_adam_leaves_as_it_was(self, dtype: torch.dtype, rate: float):
        torch.manual_seed(0)
        weight = torch.nn.Parameter((0.02 * torch.randn(200, 200)).to(dtype))
        before = weight.detach().clone()
        expected = stuck_share([weight], rate)
        weight.grad = torch.randn_like(weight)
        torch.optim.AdamW([weight], lr=rate, weight_decay=0.0).step()
        assert 0.2 < expected < 0.95
        assert (weight == before).double().mean().item() == pytest.approx(expected, abs=0.02)

    def test_sample_of_large_models_is_every_nth_weight(self):
        """Of twice as many weights as the sample has, every second one is read: those that are 1, which are stuck."""
        weights = torch.tensor([1.0, 0.0] * (1 << 20))
        assert stuck_share([weights.bfloat16()], 2.0**-10) == 1.0  # every second one is sampled
        assert stuck_share([weights.view(2, -1).bfloat16(), weights[:0].bfloat16()], 2.0**-10) == 1.0
        assert stuck_share([weights[:-2].bfloat16()], 2.0**-10) == 0.5  # all are

    def test_weights_on_both_sides_count(self):
        """At a power of two, the step downwards may move a weight that the step upwards leaves."""
        weights = torch.tensor([0.5, -0.5, 0.625, -0.625])
        step = 0.375 * 2.0**-8  # of the steps of bfloat16 above 1/2, which are twice those below
        assert stuck_share([weights.bfloat16()], step) == 0.5

    def test_step_itself_is_not_rounded(self):
        """Half a step of bfloat16 is rounded to the even neighbour; a little more moves the weight."""
        weight = torch.tensor([0.25 + 2.0**-8]).bfloat16()
        assert stuck_share([weight], 2.0**-10) == 1.0
        assert stuck_share([weight], 2.0**-10 * (1 + 2.0**-9)) == 0.0


class TestUnitStep:
    @pytest.mark.parametrize(
        ("name", "known"),
        [
            *(
                (name, True)
                for name in ("adamw_torch", "adamw_torch_fused", "paged_lion_8bit", "ademamix", "ADAMW_TORCH")
            ),
            *((name, False) for name in ("sgd", "adafactor", "adamw_anyprecision", "galore_adamw", "apollo_adamw")),
            ("schedule_free_adamw", False),
        ],
    )
    def test_is_the_rate_for_optimizers_of_unit_steps(self, name: str, known: bool):
        expected = 0.5 if known else None
        for optim in (name, SimpleNamespace(value=name)):
            args = SimpleNamespace(optim=optim, learning_rate=0.5)
            assert unit_step(SimpleNamespace(optimizer=None, args=args)) == expected

    def test_of_the_users_optimizer_is_its_largest_rate(self):
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.1, 0.3, 0.2)]
        args = SimpleNamespace(optim="sgd", learning_rate=0.5)
        assert unit_step(SimpleNamespace(optimizer=torch.optim.AdamW(groups), args=args)) == 0.3
        assert unit_step(SimpleNamespace(optimizer=torch.optim.SGD(groups), args=args)) is None


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "warning"),
        ({"is_deepspeed_enabled": True}, None),
        ({"is_deepspeed_enabled": True, "precision": "fp16"}, None),
        ({"is_fsdp_enabled": True}, "warning"),  # without mixed precision, it updates the weights as they are
        ({"is_fsdp_enabled": True, "precision": "bf16"}, None),
        ({"is_fsdp_enabled": True, "precision": "fp16"}, None),
        ({"precision": "fp16"}, "error"),
        ({"precision": "bf16"}, "warning"),
        ({"dtype": torch.float32, "precision": "fp16"}, None),
        ({"is_main_process": False}, None),
        ({"optim": "sgd"}, None),
        ({"rate": 0.1}, None),
        ({"stuck": 7}, "warning"),
        ({"stuck": 6}, None),
    ],
)
def test_strategies_that_keep_float32_copies_need_no_check(caplog, changes: dict, outcome: str | None):
    """Of twelve weights, those that are 1 are stuck, and those that are 0 move."""
    options = {
        "precision": "no",
        "dtype": torch.bfloat16,
        "is_main_process": True,
        "optim": "adamw_torch",
        "rate": 1e-5,
    }
    options |= {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, "stuck": 12, **changes}
    student = torch.nn.Linear(6, 2, bias=False, dtype=options["dtype"])
    student.weight.data = (torch.arange(12) < options["stuck"]).to(options["dtype"]).view(2, 6)
    trainer = SimpleNamespace(
        model=student,
        optimizer=None,
        args=SimpleNamespace(optim=options["optim"], learning_rate=options["rate"]),
        accelerator=SimpleNamespace(mixed_precision=options["precision"], is_main_process=options["is_main_process"]),
        is_deepspeed_enabled=options["is_deepspeed_enabled"],
        is_fsdp_enabled=options["is_fsdp_enabled"],
    )
    if outcome == "error":
        with pytest.raises(UserError, match=r"fp16=True with trained weights in half precision \(weight\)"):
            check_trained_weights(trainer)
        return
    with caplog.at_level(logging.WARNING):
        check_trained_weights(trainer)
    share = round(100 * options["stuck"] / 12)
    said = [f"{share} % of the trained weights cannot move"] if outcome else []
    assert [record.getMessage().split(":")[0] for record in caplog.records] == said


@pytest.mark.parametrize("kind", ["sft", "kd", "minillm"])
class TestWarning:
    def warnings(self, caplog) -> list[str]:
        return [record.getMessage() for record in caplog.records if "cannot move" in record.getMessage()]

    def test_names_share_dtype_rate_and_remedy(self, tmp_path, model_dir, caplog, kind: str):
        options = {"model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 5e-6}
        with caplog.at_level(logging.WARNING):
            trainer = make_trainer(kind, str(tmp_path), model_dir("gpt2"), **options)
        (warning,) = self.warnings(caplog)
        assert all(words in warning for words in ("bfloat16", "learning_rate=5e-06", "dtype='float32'"))
        before = {name: each.detach().clone() for name, each in trainer.model.named_parameters()}
        trainer.train()
        same = sum((each == before[name]).sum().item() for name, each in trainer.model.named_parameters())
        share = same / sum(each.numel() for each in before.values())
        assert share > 0.9
        assert int(warning.split(" %")[0]) == pytest.approx(100 * share, abs=8)

    @pytest.mark.parametrize(
        "options",
        [
            {"learning_rate": 5e-6},
            {"learning_rate": 5e-6, "bf16": True},
            {"model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 0.3},
            {"model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 5e-6, "optim": "sgd"},
            {"model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 5e-6, "peft_config": LoraConfig()},
        ],
        ids=["float32", "autocast", "high rate", "sgd", "lora"],
    )
    def test_is_not_given_where_weights_move(self, tmp_path, model_dir, caplog, kind: str, options: dict):
        with caplog.at_level(logging.WARNING):
            make_trainer(kind, str(tmp_path), model_dir("gpt2"), **options)
        assert not self.warnings(caplog)


@pytest.mark.parametrize("kind", ["sft", "kd", "minillm"])
def test_student_without_a_gradient_is_refused(tmp_path, model_dir, kind: str):
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir("gpt2")), LoraConfig()).save_pretrained(
        tmp_path / "a"
    )
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir("gpt2")), tmp_path / "a")
    with pytest.raises(ValueError, match=r"no weight of this PeftModel\w* is trained.* is_trainable=True"):
        make_trainer(kind, str(tmp_path), student)
    frozen = AutoModelForCausalLM.from_pretrained(model_dir("gpt2")).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no weight of this GPT2LMHeadModel is trained.*requires_grad_\(True\)"):
        make_trainer(kind, str(tmp_path), frozen)


@pytest.mark.parametrize("kind", ["kd", "minillm"])
def test_teacher_that_is_the_base_of_the_students_adapter_is_refused(tmp_path, model_dir, kind: str):
    base = AutoModelForCausalLM.from_pretrained(model_dir("gpt2"))
    student = get_peft_model(base, LoraConfig())
    with pytest.raises(ValueError, match=r"teacher_model \(GPT2LMHeadModel\) shares modules with model \(PeftModel"):
        make_trainer(kind, str(tmp_path), student, base)
    with pytest.raises(ValueError, match="are the same object"):
        make_trainer(kind, str(tmp_path), base, base)


@pytest.mark.parametrize("field", ["model_init_kwargs", "teacher_model_init_kwargs"])
@pytest.mark.parametrize("kind", ["kd", "minillm"])
def test_former_name_of_dtype_acts(tmp_path, model_dir, kind: str, field: str):
    options = {field: {"torch_dtype": "bfloat16"}, "learning_rate": 0.1}
    trainer = make_trainer(kind, str(tmp_path), model_dir("gpt2"), model_dir("gpt2", 1), **options)
    model = trainer.teacher_model if field.startswith("teacher") else trainer.model
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=rf"{field} has torch_dtype='bfloat16' and dtype='float32'"):
        KDConfig(str(tmp_path), use_cpu=True, **{field: {"torch_dtype": "bfloat16", "dtype": "float32"}})


def test_teacher_that_is_an_adapter_in_process_is_the_one_of_its_folder(tmp_path, model_dir):
    torch.manual_seed(5)
    teacher = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir("gpt2", 1)), LoraConfig(init_lora_weights=False)
    )
    teacher.save_pretrained(tmp_path / "teacher")
    losses = []
    for each in (teacher, str(tmp_path / "teacher")):
        trainer = train(tmp_path, model_dir("gpt2"), each)
        losses.append([entry["objective/reverse_kl"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_evaluation_of_an_adapter_is_that_of_the_merged_model(model_dir):
    tokenizer = build_tokenizer()
    torch.manual_seed(5)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir("gpt2")), LoraConfig(init_lora_weights=False)
    )
    teacher = AutoModelForCausalLM.from_pretrained(model_dir("gpt2", 1))
    rows = Dataset.from_dict({"prompt": ["the", "the punter serves"], "references": [[" mill"], [" food"]]})
    options = {"seeds": [0], "max_new_tokens": 6, "progress": False}
    found = evaluate_model(model, tokenizer, rows, teacher=teacher, **options).summary
    as_teacher = evaluate_model(teacher, tokenizer, rows, teacher=model, **options).summary
    merged = model.merge_and_unload()
    expected = evaluate_model(merged, tokenizer, rows, teacher=teacher, **options).summary
    assert found["reverse_kl"].mean == pytest.approx(expected["reverse_kl"].mean, rel=1e-4)
    assert found["loss"].mean == pytest.approx(expected["loss"].mean, rel=1e-4)
    expected = evaluate_model(teacher, tokenizer, rows, teacher=merged, **options).summary
    assert as_teacher["reverse_kl"].mean == pytest.approx(expected["reverse_kl"].mean, rel=1e-4)


def test_virtual_tokens_are_refused(model_dir):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir("gpt2")), config)
    with pytest.raises(ValueError, match=r"PromptTuningConfig \(PeftModelForCausalLM\) is not supported"):
        without_wrapper(model)
