"""Word-level KD: its loss by hand over full logits, what it is divided by, samples during training, real runs."""

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, PartialState
from conftest import WORDS, build_model, build_tokenizer, run_module
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from test_distributed import needs_deepspeed
from transformers import AutoModelForCausalLM

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.baselines import FineTuningConfig, FineTuningTrainer, KDConfig, KDTrainer
from minillm_trl.cli import main
from minillm_trl.cli.launch import accelerate_config_path
from minillm_trl.evaluation.metrics import rouge_l

TEXTS = Dataset.from_dict(
    {
        "prompt": [f"the mill {'near the river ' * (i % 3)}{i}\n" for i in range(24)],
        "completion": [" is a cheap pub" * (1 + i % 5) for i in range(24)],
    }
)


COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "save_strategy": "no",
    "logging_steps": 1,
}


def make_args(config_class, folder, fsdp_on_cpu=False, **options):
    args = config_class(str(folder), **{**COMMON, **options})
    if fsdp_on_cpu:  # accelerate takes FSDP for a matter of GPUs; torch has it on CPUs too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def make_fine_tuning(folder, **options) -> FineTuningTrainer:
    tokenizer = build_tokenizer()
    student = build_model("llama", len(tokenizer))  # as in make_trainer
    return FineTuningTrainer(
        model=student,
        args=make_args(FineTuningConfig, folder, **options),
        train_dataset=TEXTS,
        eval_dataset=TEXTS.select(range(7)),
        processing_class=tokenizer,
    )


def make_trainer(folder, teacher=None, ratio=0.5, student=None, peft_config=None, **options) -> KDTrainer:
    tokenizer = build_tokenizer()
    # without dropout, and before the configuration: transformers spreads what is built later under ZeRO-3
    student = student or build_model("llama", len(tokenizer))
    teacher = teacher or build_model("llama", len(tokenizer), 1, width=48)
    args = make_args(KDConfig, folder, kd_ratio=ratio, **options)
    return KDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=TEXTS,
        eval_dataset=TEXTS.select(range(7)) if "eval_strategy" in options else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("make", [make_fine_tuning, make_trainer], ids=["fine-tuning", "KD"])
def test_snapshot_of_the_model_keeps_the_weights_of_its_time(tmp_path, make):
    trainer, ids = make(tmp_path), torch.tensor([[5, 6, 7, 8]])
    snapshot = copy.deepcopy(trainer.model).eval()
    before = snapshot(ids).logits
    trainer.train()
    assert torch.equal(snapshot(ids).logits, before)
    assert (trainer.model.eval()(ids).logits - before).abs().max() > 1e-3


def batch_of(trainer: KDTrainer, rows: range) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[row] for row in rows])


def by_hand(student, teacher, batch, ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, forward KL and loss summed over the completion tokens, row by row without padding."""
    entropies, divergences = [], []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        ids, labels = ids[mask.bool()][None], labels[mask.bool()]
        log_q = student(ids).logits[0, :-1].log_softmax(-1)
        log_p = teacher(ids).logits[0, :-1].log_softmax(-1).detach()
        counts = labels[1:] != -100
        entropies.append(-log_q.gather(1, ids[0, 1:, None])[counts].sum())
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1)[counts].sum())
    entropy, divergence = sum(entropies), sum(divergences)
    return entropy, divergence, (1 - ratio) * entropy + ratio * divergence


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_loss_and_gradient_are_those_of_whole_logits(tmp_path, ratio):
    trainer = make_trainer(tmp_path, ratio=ratio)
    student = copy.deepcopy(trainer.model)
    vars(student).pop("forward")
    vars(student.lm_head).pop("forward")
    batch = batch_of(trainer, range(5))
    tokens = 31  # of an optimizer step that has other micro-batches too
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens)
    loss.backward()
    expected = by_hand(student, trainer.teacher_model, batch, ratio)[2] / tokens
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is None for parameter in trainer.teacher_model.parameters())


def test_evaluation_reports_cross_entropy_and_forward_kl_of_all_tokens(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", per_device_eval_batch_size=7)
    metrics = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[row] for row in range(7)])
    tokens = (batch["labels"][:, 1:] != -100).sum()
    entropy, divergence, _ = by_hand(trainer.model, trainer.teacher_model, batch, 0.5)
    assert metrics["eval_loss"] == pytest.approx((entropy / tokens).item(), rel=1e-5)
    assert metrics["eval_kd/cross_entropy"] == pytest.approx((entropy / tokens).item(), rel=1e-5)
    assert metrics["eval_kd/forward_kl"] == pytest.approx((divergence / tokens).item(), rel=1e-5)


def weights(trainer: KDTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_an_optimizer_step_does_not_depend_on_its_cut_into_micro_batches(tmp_path):
    before = weights(make_trainer(tmp_path))
    moves = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        moves.append(weights(trainer) - before)
    assert moves[0].norm() > 1e-3
    assert (moves[0] - moves[1]).norm() < 1e-4 * moves[0].norm()


def test_adapters_learn_and_the_base_stays(tmp_path):
    tokenizer = build_tokenizer()
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {
        name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed
    assert all("lora_" in name for name in changed)
    prompts = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="PromptTuningConfig is not supported"):
        make_trainer(tmp_path, student=build_model("llama", len(tokenizer)), peft_config=prompts)


def test_students_of_a_larger_vocabulary_learn_over_the_shared_rows(tmp_path):
    tokenizer = build_tokenizer()
    student = build_model("qwen2", len(tokenizer) + 20)
    trainer = make_trainer(tmp_path, student=student, teacher=build_model("qwen2", len(tokenizer) + 4, 1))
    batch = batch_of(trainer, range(3))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    shared = len(tokenizer) + 4
    head = student.get_output_embeddings().weight.grad
    assert head[:shared].abs().sum() > 0
    assert head[shared:].abs().sum() == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [({"packing": True}, "packing"), ({"loss_type": "dft"}, "loss_type"), ({"kd_ratio": 0.0}, "kd_ratio")],
)
def test_settings_without_meaning_are_refused(tmp_path, options, name):
    with pytest.raises(ValueError, match=name):
        KDConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


class TestSamplesDuringTraining:
    def config(self, folder, **options) -> FineTuningConfig:
        return FineTuningConfig(
            str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            **options,
        )

    def test_rouge_l_is_that_of_the_students_samples_over_prompts(self, tmp_path, monkeypatch):
        tokenizer = build_tokenizer()
        data = Dataset.from_dict(
            {
                "prompt": ["the mill\n", "the mill\n", "near the river\n"],
                "completion": [" is a pub", " serves italian food", " in the city centre"],
                "references": [[" is a pub"], [" serves italian food"], [" in the city centre"]],
            }
        )
        options = {"predict_with_generate": True, "eval_strategy": "steps", "max_completion_length": 12}
        trainer = FineTuningTrainer(
            model=build_model("gpt2", len(tokenizer)),
            args=self.config(tmp_path, **options, per_device_eval_batch_size=1),
            train_dataset=TEXTS,
            eval_dataset=data,
            processing_class=tokenizer,
        )
        first, second = trainer.evaluate(), trainer.evaluate()
        assert first["eval_rouge_l"] == second["eval_rouge_l"]  # the same random numbers
        assert 1 <= first["eval_completions/mean_length"] <= 12
        # a student that answers the first prompt's second reference and nothing to the other
        completions = [tokenizer(" serves italian food")["input_ids"] + [0], [0]]
        monkeypatch.setattr("minillm_trl.baselines.fine_tuning.sample_prompts", lambda *args, **kwargs: completions)
        metrics = trainer.evaluate()
        assert metrics["eval_rouge_l"] == pytest.approx((100 + rouge_l("", [" in the city centre"])) / 2)
        assert metrics["eval_rollout/eos_rate"] == 1.0
        assert metrics["eval_completions/mean_length"] == sum(map(len, completions)) / 2

    def test_the_metric_needs_samples_and_samples_need_evaluations(self, tmp_path):
        with pytest.raises(ValueError, match="predict_with_generate=True"):
            self.config(tmp_path, metric_for_best_model="eval_rouge_l")
        with pytest.raises(ValueError, match="eval_strategy"):
            self.config(tmp_path, predict_with_generate=True)

    def test_prompts_that_leave_no_room_are_refused_before_training(self, tmp_path):
        with pytest.raises(ValueError, match="more than the student's context of 128"):
            make_trainer(tmp_path, eval_strategy="steps", predict_with_generate=True, max_completion_length=125)


def test_fine_tuning_and_minillm_evaluate_a_student_alike(tmp_path):
    """The same samples, so that a baseline's curve and MiniLLM's differ by the student alone."""
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "seed": 3, "max_completion_length": 40}
    tokenizer = build_tokenizer()
    data = TEXTS.select(range(7)).add_column("references", [[WORDS]] * 7)
    student, teacher = build_model("llama", len(tokenizer)), build_model("llama", len(tokenizer), 1)
    baseline = FineTuningTrainer(
        model=copy.deepcopy(student),
        args=FineTuningConfig(
            str(tmp_path), **options, eval_strategy="steps", predict_with_generate=True, per_device_eval_batch_size=3
        ),
        train_dataset=TEXTS,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    args = MiniLLMConfig(str(tmp_path), **options, per_device_eval_batch_size=4)
    minillm = MiniLLMTrainer(
        student, teacher, args=args, train_dataset=TEXTS, eval_dataset=data, processing_class=tokenizer
    )
    found, expected = baseline.evaluate(), minillm.evaluate()
    for name in ("eval_rouge_l", "eval_rollout/eos_rate", "eval_rollout/repeated_4grams"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    assert found["eval_rouge_l"] > 0


class TestCommandLine:
    TRAINING = ("--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--gradient_checkpointing", "false")

    def data(self, folder):
        path = folder / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
        return str(path)

    def arguments(self, tmp_path, model_dir, output) -> list[str]:
        data = self.data(tmp_path)
        return [
            *("--model_name_or_path", model_dir("llama"), "--teacher_model_name_or_path", model_dir("llama", 1, 48)),
            *("--dataset", data, "--eval_dataset", data, "--eval_strategy", "steps", "--eval_steps", "1"),
            *("--predict_with_generate", "true", "--max_completion_length", "6", "--output_dir", str(output)),
            *("--metric_for_best_model", "eval_rouge_l", "--load_best_model_at_end", "true"),
            *("--save_strategy", "steps", "--save_steps", "1", "--max_eval_rows", "6", *self.TRAINING),
        ]

    def test_kd_stops_early_and_keeps_the_best_checkpoint(self, tmp_path, model_dir, monkeypatch):
        scores = iter([30.0, 40.0, 35.0, 20.0, 10.0, 5.0])
        monkeypatch.setattr(
            "minillm_trl.baselines.fine_tuning.rouge_l_to_references", lambda texts, rows: [next(scores)] * len(texts)
        )
        output = tmp_path / "kd"
        arguments = self.arguments(tmp_path, model_dir, output)
        assert main(["kd", *arguments, "--max_steps", "9", "--early_stopping_patience", "2"]) == 0
        state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
        assert not (output / "checkpoint-5").exists()  # two evaluations without a better one
        assert state["best_model_checkpoint"].endswith("checkpoint-2")
        best = AutoModelForCausalLM.from_pretrained(output / "checkpoint-2")
        kept = AutoModelForCausalLM.from_pretrained(output)
        assert all(torch.equal(a, b) for a, b in zip(best.parameters(), kept.parameters(), strict=True))

    def test_early_stopping_needs_a_best_checkpoint(self, tmp_path, model_dir, capsys):
        arguments = ["sft", "--model_name_or_path", model_dir("llama"), "--dataset", self.data(tmp_path)]
        options = ["--output_dir", str(tmp_path), *self.TRAINING, "--early_stopping_patience", "3"]
        assert main([*arguments, *options]) == 2
        assert "load_best_model_at_end" in capsys.readouterr().err

    def test_teachers_of_another_tokenizer_are_refused_before_a_model_is_loaded(self, tmp_path, model_dir, capsys):
        other = tmp_path / "other"
        build_tokenizer(280).save_pretrained(other)
        arguments = self.arguments(tmp_path, model_dir, tmp_path / "kd")
        assert main(["kd", *arguments, "--teacher_model_name_or_path", str(other)]) == 2
        assert "different tokenizers" in capsys.readouterr().err


# The entropy of the first of two evaluations is made the better one: what is saved is not the last model
RUN = """
import json, pathlib, sys
output, folder, batch_size, kind, config = sys.argv[1:]
sys.path.insert(0, folder)
from test_kd import make_fine_tuning, make_trainer
options = dict(
    fsdp_on_cpu="fsdp" in config, per_device_train_batch_size=int(batch_size), eval_strategy="steps", eval_steps=2,
    predict_with_generate=True, max_completion_length=6, per_device_eval_batch_size=2, max_steps=4,
    save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    metric_for_best_model="eval_entropy", greater_is_better=kind == "sft",
)
if kind == "kd":
    trainer = make_trainer(output, shard_teacher=config != "", **options)
else:
    trainer = make_fine_tuning(output, **options)
trainer.train()
trainer.save_model(output)
if trainer.accelerator.is_main_process:
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    facts = {"first": found[0], "strategy": str(trainer.accelerator.distributed_type)}
    pathlib.Path(output, "facts.json").write_text(json.dumps(facts))
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("kd", "cpu"),
        pytest.param("kd", "v100_zero3_fp16", marks=needs_deepspeed),
        ("kd", "v100_fsdp_fp16"),
        ("sft", "v100_fsdp_fp16"),
    ],
)
def test_two_processes_reach_what_one_does(tmp_path, kind, config):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    tests = Path(__file__).parents[1]
    moves, facts = [], []
    before = weights(make_trainer(tmp_path))
    for processes in (1, 2):
        output = tmp_path / str(processes)
        if processes == 1:
            result = run_module("run", output, tests, 8, kind, "", cwd=tmp_path)
        else:
            options = ["--config_file", accelerate_config_path(config), "--num_processes=2", "--mixed_precision=no"]
            result = run_module("accelerate.commands.launch", *options, script, output, tests, 4, kind, config)
        assert result.returncode == 0, result.stderr[-3000:]
        after = AutoModelForCausalLM.from_pretrained(output)
        moves.append(torch.cat([parameter.detach().flatten() for parameter in after.parameters()]) - before)
        facts.append(json.loads((output / "facts.json").read_text()))
    assert moves[0].norm() > 1e-3
    assert (moves[0] - moves[1]).norm() < 1e-3 * moves[0].norm()
    names = ("eval_loss", "eval_entropy", "eval_rouge_l", "eval_completions/mean_length")
    for name in (*names, "eval_rollout/repeated_4grams"):
        assert facts[0]["first"][name] == pytest.approx(facts[1]["first"][name], rel=1e-3), name
    expected = "FSDP" if "fsdp" in config else "DEEPSPEED" if "zero" in config else "MULTI_CPU"
    assert facts[1]["strategy"] == f"DistributedType.{expected}"
