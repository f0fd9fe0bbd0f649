"""Fine-tuning and KD on their own: the loss of a micro-batch, samples of an evaluation, the teacher's arguments."""

import copy
import math
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from accelerate import Accelerator
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_kd import TEXTS, batch_of, by_hand, make_args, make_fine_tuning, make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTTrainer

from minillm_trl.baselines import FineTuningConfig, FineTuningTrainer, fine_tuning, kd
from minillm_trl.errors import UserError
from minillm_trl.evaluation.metrics import repeated_ngrams, rouge_l
from minillm_trl.rollouts.keyed_random import evaluation_key

TOKENIZER = build_tokenizer()
TOKENS = 31  # of an optimizer step that has other micro-batches too
SAMPLED = {"predict_with_generate": True, "eval_strategy": "steps"}


def cross_entropy(trainer: FineTuningTrainer, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The summed cross-entropy of a batch, and the number of its tokens."""
    entropy, _, _ = by_hand(trainer.model, trainer.model, batch, 0.0)
    return entropy, int((batch["labels"][:, 1:] != -100).sum())


class TestFineTuningLoss:
    def test_of_a_training_is_divided_by_the_tokens_of_its_step(self, tmp_path):
        trainer = make_fine_tuning(tmp_path)
        batch = batch_of(trainer, range(3))
        expected = cross_entropy(trainer, batch)[0] / TOKENS
        trainer.model.train()
        hooks = len(trainer.model._forward_hooks)
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(TOKENS))
        torch.testing.assert_close(loss, expected)
        again, outputs = trainer.compute_loss(trainer.model, dict(batch), True, torch.tensor(TOKENS))
        torch.testing.assert_close(again, expected)
        assert outputs.logits.shape[:2] == batch["input_ids"].shape
        assert len(trainer.model._forward_hooks) == hooks
        assert trainer.means.eval_loss() is None
        assert set(dict(trainer.means.take("train"))) == {"entropy", "mean_token_accuracy"}
        assert not {"entropy", "mean_token_accuracy"} & set(trainer._metrics["train"])

    def test_of_an_evaluation_is_the_mean_over_its_tokens(self, tmp_path):
        trainer = make_fine_tuning(tmp_path)
        parts = [batch_of(trainer, rows) for rows in (range(2), range(2, 7))]
        trainer.model.eval()
        with torch.no_grad():
            found = [trainer.compute_loss(trainer.model, dict(part)) for part in parts]
        sums = [cross_entropy(trainer, part) for part in parts]
        for loss, (total, count) in zip(found, sums, strict=True):
            torch.testing.assert_close(loss, total / count)
        total, count = (sum(each) for each in zip(*sums, strict=True))
        assert trainer.means.eval_loss() == pytest.approx((total / count).item(), rel=1e-6)
        loss, _ = trainer.compute_loss(trainer.model, dict(parts[0]), return_outputs=True)
        torch.testing.assert_close(loss, found[0])

    def test_micro_batch_without_a_finite_loss_is_named(self, tmp_path):
        trainer = make_fine_tuning(tmp_path)
        batch = batch_of(trainer, range(4, 6))  # the first row has more than 32 tokens
        assert batch["attention_mask"][0].sum() > 33
        trainer.model.train()
        trainer.model.lm_head.weight.data.fill_(math.nan)
        assert trainer.compute_loss(trainer.model, dict(batch)).isnan()
        text = TOKENIZER.decode(batch["input_ids"][0][:32])
        assert trainer.guard.faults == [f"the loss is nan in a micro-batch whose first row begins with {text!r}"]


class TestKDLoss:
    def test_of_a_training_without_a_number_is_divided_by_its_own_tokens(self, tmp_path):
        trainer = make_trainer(tmp_path, ratio=0.3)
        batch = batch_of(trainer, range(3))
        trainer.model.train()
        expected = by_hand(trainer.model, trainer.teacher_model, batch, 0.3)[2] / cross_entropy(trainer, batch)[1]
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected)
        one = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=1)
        torch.testing.assert_close(one, expected * cross_entropy(trainer, batch)[1])
        assert trainer.means.eval_loss() is None

    def test_of_texts_is_that_of_all_tokens_but_the_first(self, tmp_path):
        trainer = make_trainer(tmp_path, ratio=0.3)
        batch = batch_of(trainer, range(3))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        trainer.model.train()
        expected = by_hand(trainer.model, trainer.teacher_model, batch, 0.3)[2]
        torch.testing.assert_close(
            trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=TOKENS), expected / TOKENS
        )
        trainer.model.eval()
        entropy, count = cross_entropy(trainer, batch)
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), entropy / count)

    @pytest.mark.parametrize("averages", [True, False])
    def test_is_not_averaged_over_processes_where_its_tokens_are_counted_over_them(
        self, tmp_path, monkeypatch, averages: bool
    ):
        """DDP averages gradients, so a loss over all tokens is multiplied by the number of processes."""
        trainer = make_trainer(tmp_path, average_tokens_across_devices=averages)
        batch = batch_of(trainer, range(3))
        trainer.model.train()
        of_step = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=TOKENS)
        of_batch = trainer.compute_loss(trainer.model, dict(batch))
        monkeypatch.setattr(Accelerator, "num_processes", 2)
        factor = 2 if averages else 1
        found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=TOKENS)
        torch.testing.assert_close(found, of_step * factor)
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), of_batch)

    def test_of_nothing_but_padding_is_zero(self, tmp_path):
        trainer = make_trainer(tmp_path)
        batch = batch_of(trainer, range(2))
        batch["labels"] = torch.full_like(batch["labels"], -100)
        trainer.model.train()
        for count in (None, 0):
            loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
            assert loss == 0.0
        trainer.model.eval()
        assert trainer.compute_loss(trainer.model, dict(batch)) == 0.0
        assert trainer.means.eval_loss() == 0.0

    def test_of_one_token_is_its_cross_entropy(self, tmp_path):
        trainer = make_trainer(tmp_path)
        batch = batch_of(trainer, range(1))
        last = int((batch["labels"] != -100).nonzero()[-1, 1])
        batch["labels"][:, :last] = -100
        expected, count = cross_entropy(trainer, batch)
        assert count == 1
        trainer.model.eval()
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected)

    def test_has_no_outputs(self, tmp_path):
        trainer = make_trainer(tmp_path)
        with pytest.raises(UserError, match="compute_metrics"):
            trainer.compute_loss(trainer.model, batch_of(trainer, range(1)), return_outputs=True)


def test_pickled_weights_of_a_student_are_loaded_on_request_alone(tmp_path):
    student = build_model("gpt2", len(TOKENIZER))
    student.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(student.state_dict(), tmp_path / "pytorch_model.bin")

    def make(allowed: bool) -> FineTuningTrainer:
        args = make_args(FineTuningConfig, tmp_path / "out", allow_pickled_weights=allowed)
        return FineTuningTrainer(model=str(tmp_path), args=args, train_dataset=TEXTS, processing_class=TOKENIZER)

    with pytest.raises(ValueError, match="only as a pickle"):
        make(False)
    assert torch.equal(make(True).model.lm_head.weight, student.lm_head.weight)


def test_student_of_a_revision_ends_as_that_revision_does(tmp_path, monkeypatch):
    repository = tmp_path / "models--o--n"
    (repository / "refs").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for number, name in enumerate(("main", "other")):
        (repository / "refs" / name).write_text(40 * str(number))
        student = build_model("gpt2", len(TOKENIZER))
        student.generation_config.eos_token_id = [0, 5 + number]
        student.save_pretrained(repository / "snapshots" / (40 * str(number)))
    for revision, end in ((None, 5), ("other", 6)):
        args = make_args(FineTuningConfig, tmp_path / "out", model_init_kwargs=revision and {"revision": revision})
        trainer = FineTuningTrainer(model="o/n", args=args, train_dataset=TEXTS, processing_class=build_tokenizer())
        assert trainer._ends.ids == [0, end]


def test_adapters_of_a_quantised_student_are_trained_in_float32_on_weights_that_stay(tmp_path, model_dir):
    """SFTTrainer casts adapters to bfloat16, and bitsandbytes repacks the weights in eval mode on some CPUs."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
    student = AutoModelForCausalLM.from_pretrained(model_dir("llama"), quantization_config=nf4)
    layer = student.model.layers[0].mlp.up_proj
    layer.support_avx512bf16_for_cpu = True  # as on such a CPU
    trainer = FineTuningTrainer(
        model=student,
        args=make_args(FineTuningConfig, tmp_path),
        train_dataset=TEXTS,
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    assert {each.dtype for each in trainer.model.parameters() if each.requires_grad} == {torch.float32}
    assert not layer.support_avx512bf16_for_cpu


def test_multimodal_student_needs_its_processor(tmp_path, monkeypatch):
    student = build_model("gpt2", len(TOKENIZER))
    student.config.vision_config = {"hidden_size": 8}
    args, tokenizer = make_args(FineTuningConfig, tmp_path), build_tokenizer()
    options = {"model": student, "args": args, "train_dataset": TEXTS, "processing_class": tokenizer}
    with pytest.raises(UserError, match="is multimodal"):
        FineTuningTrainer(**options)
    monkeypatch.setattr(fine_tuning, "ProcessorMixin", type(tokenizer))  # which TRL accepts with any text model
    assert FineTuningTrainer(**options).model is student


def test_deep_copy_of_the_student_runs_its_own_weights(tmp_path):
    """As moving averages of the weights do."""
    student, ids = make_fine_tuning(tmp_path).model.eval(), torch.tensor([[5, 6, 7]])
    copied, before = copy.deepcopy(student), student(ids).logits
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
        assert torch.equal(copied(ids).logits, before)


@pytest.mark.parametrize(("options", "real"), [({}, 7), ({"is_training": False}, 7), ({"is_training": True}, 8)])
def test_evaluation_on_several_processes_has_each_row_once(tmp_path, monkeypatch, options: dict, real: int):
    """Each process has a batch of four, and the last row is a filler; accelerate repeats the first one in training."""
    trainer, labels = make_fine_tuning(tmp_path), []
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    for process in range(2):
        monkeypatch.setattr(Accelerator, "process_index", process)
        for batch in trainer._get_dataloader(trainer.eval_dataset, "Evaluation", 4, **options):
            labels += batch["labels"].tolist()
    assert len(labels) == 8
    assert sum(any(id_ != -100 for id_ in row) for row in labels) == real


def test_loader_of_the_data_is_made_as_transformers_asks(tmp_path, monkeypatch):
    trainer = make_fine_tuning(tmp_path)
    given = ([1, 2], "Training", 4, "sampler", True, "key")
    monkeypatch.setattr(SFTTrainer, "_get_dataloader", lambda self, *arguments: arguments)
    assert trainer._get_dataloader(*given) == given


class TestSamples:
    ROWS = Dataset.from_dict(
        {
            "prompt": ["the mill\n", "near the river\n", "the mill\n", "the pub\n"],
            "completion": [" is a pub", " is cheap", " serves food", " is a mill"],
        }
    )

    def trainer(self, folder, rows: Any = ROWS, student: Any = None, **options) -> FineTuningTrainer:
        options = {"max_completion_length": 6, "per_device_eval_batch_size": 3, **SAMPLED, **options}
        return FineTuningTrainer(
            model=student or build_model("gpt2", len(TOKENIZER) + 20),
            args=make_args(FineTuningConfig, folder, **options),
            train_dataset=TEXTS,
            eval_dataset=rows,
            processing_class=TOKENIZER,
        )

    @pytest.mark.parametrize(("process", "processes", "rows"), [(0, 1, [0, 1, 2]), (0, 2, [0, 2]), (1, 2, [1])])
    def test_metrics_are_means_over_a_process_s_prompts(self, tmp_path, monkeypatch, process, processes, rows):
        trainer, seen = self.trainer(tmp_path, seed=7), []
        answers = [
            [*TOKENIZER(text)["input_ids"], 0] for text in (" is a pub", " is a mill", " pub pub pub pub pub pub")
        ]
        answers[1].pop()

        def sample(student, prompt_ids, **options):
            seen.append((student.training, torch.is_grad_enabled(), prompt_ids, options))
            return [answers[row] for row in rows]

        monkeypatch.setattr(fine_tuning, "sample_prompts", sample)
        monkeypatch.setattr(Accelerator, "process_index", process)
        monkeypatch.setattr(Accelerator, "num_processes", processes)
        trainer.model.train()
        found = trainer._sample_metrics()
        references = [[" is a pub", " serves food"], [" is cheap"], [" is a mill"]]
        texts = [" is a pub", " is a mill", " pub pub pub pub pub pub"]
        expected = {
            "rouge_l": [rouge_l(texts[row], references[row]) for row in rows],
            "completions/mean_length": [len(answers[row]) for row in rows],
            "rollout/eos_rate": [float(row != 1) for row in rows],
            "rollout/repeated_4grams": [repeated_ngrams(answers[row], 4) for row in rows],
        }
        assert found == pytest.approx({name: sum(values) / len(rows) for name, values in expected.items()})
        prompts = [TOKENIZER(["the mill\n", "near the river\n", "the pub\n"][row])["input_ids"] for row in rows]
        ((training, has_gradients, prompt_ids, options),) = seen
        assert (training, has_gradients, prompt_ids) == (False, False, prompts)
        assert options == {
            "keys": [evaluation_key(7, ids) for ids in prompts],
            "max_new_tokens": 6,
            "eos_token_ids": [0],
            "pad_token_id": TOKENIZER.pad_token_id,
            "batch_size": 3,
            "vocab_size": len(TOKENIZER),
        }

    def test_process_without_prompts_has_the_metrics_of_the_others(self, tmp_path, monkeypatch):
        trainer = self.trainer(tmp_path, self.ROWS.select(range(1)))
        others = torch.tensor([50.0, 6.0, 1.0, 0.25, 1.0])
        monkeypatch.setattr(trainer.accelerator, "reduce", lambda totals, reduction: totals + others)
        monkeypatch.setattr(Accelerator, "process_index", 1)
        monkeypatch.setattr(Accelerator, "num_processes", 2)
        assert list(trainer._sample_metrics().values()) == [50.0, 6.0, 1.0, 0.25]

    @pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=str)
    def test_sharded_student_samples_from_a_whole_copy_that_follows_it_and_is_freed(
        self, tmp_path, monkeypatch, precision: dict
    ):
        """The copy is made before FSDP shards the student."""
        plain = self.trainer(tmp_path, **precision)
        monkeypatch.setattr(fine_tuning, "shards_student", lambda accelerator: True)
        trainer, students = self.trainer(tmp_path, **precision), []
        whole = trainer._whole_copy.model

        def sample(student, prompt_ids, **options):
            students.append((student, {each.dtype for each in student.parameters()}))
            return [student(torch.tensor([ids])).logits[0, -1].topk(5).indices.tolist() for ids in prompt_ids]

        monkeypatch.setattr(fine_tuning, "sample_prompts", sample)
        for trained in (plain, trainer):
            trained.model.transformer.wte.weight.data *= 3.0
        assert not any(each.numel() for each in whole.parameters())
        found = trainer._sample_metrics()
        assert students == [(whole, {torch.bfloat16 if precision else torch.float32})]
        assert not any(each.numel() for each in whole.parameters())
        monkeypatch.undo()
        monkeypatch.setattr(fine_tuning, "sample_prompts", sample)
        assert found == plain._sample_metrics()

    def test_student_that_is_not_sharded_samples_itself(self, tmp_path, monkeypatch):
        trainer, students = self.trainer(tmp_path), []
        monkeypatch.setattr(
            fine_tuning,
            "sample_prompts",
            lambda student, prompts, **_: students.append(student) or [[5]] * len(prompts),
        )
        trainer._sample_metrics()
        assert (students, trainer._whole_copy) == ([trainer.model], None)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_sampling_neither_checkpoints_nor_changes_how_training_does(self, tmp_path, monkeypatch, reentrant: bool):
        trainer = self.trainer(
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            bf16=True,
        )
        block, seen = trainer.model.transformer.h[0], []
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)

        def sample(student, prompt_ids, **options):
            seen.append((block.gradient_checkpointing, torch.is_autocast_enabled("cpu")))
            return prompt_ids

        monkeypatch.setattr(fine_tuning, "sample_prompts", sample)
        trainer._sample_metrics()
        assert seen == [(False, True)]
        assert block.gradient_checkpointing
        assert block._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant

    def test_only_an_evaluation_of_the_prompts_has_them(self, tmp_path):
        trainer = self.trainer(tmp_path)
        own = trainer.evaluate()
        assert "eval_rouge_l" in own
        others = trainer.evaluate(trainer.eval_dataset.select(range(2)))
        assert others["eval_loss"] != own["eval_loss"]
        for found in (others, trainer.evaluate(metric_key_prefix="test"), trainer.state.log_history[-1]):
            assert [name for name in found if "rouge" in name or "length" in name] == []

    def test_first_message_of_a_conversation_is_its_reference(self, tmp_path):
        rows = [[{"role": "assistant", "content": text}, {"role": "user", "content": "?"}] for text in ("a", "b")]
        data = Dataset.from_dict({"prompt": ["x", "y"], "completion": rows})
        assert fine_tuning._prompts_with_references(data)["references"][:] == [["a"], ["b"]]
        given = Dataset.from_dict({"prompt": ["x"], "completion": ["a"], "references": [["b", "c"]]})
        assert fine_tuning._prompts_with_references(given)["references"][:] == [["b", "c"]]

    @pytest.mark.parametrize(
        "rows", [None, {"a": ROWS}, ROWS.remove_columns("completion"), ROWS.remove_columns("prompt"), "rows"]
    )
    def test_data_without_prompts_and_completions_is_refused(self, tmp_path, rows: Any):
        with pytest.raises(ValueError, match="predict_with_generate=True needs an eval_dataset"):
            self.trainer(tmp_path, rows)

    def test_longest_prompt_has_to_leave_room(self, tmp_path, monkeypatch):
        longest = max(len(ids) for ids in TOKENIZER(self.ROWS["prompt"][:])["input_ids"])
        assert self.trainer(tmp_path, max_completion_length=128 - longest) is not None
        with pytest.raises(
            ValueError, match=f"has {longest} tokens; with max_completion_length={129 - longest} .* 128"
        ):
            self.trainer(tmp_path, max_completion_length=129 - longest)
        monkeypatch.setattr(fine_tuning, "max_context", lambda _: None)
        assert self.trainer(tmp_path, max_completion_length=1000) is not None


def test_evaluation_reads_the_columns_of_the_template_as_the_training_does(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{{ tools[0]['name'] }} {{ note }}: {% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    prompt, completion = ([{"role": role, "content": text}] for role, text in (("user", "mill"), ("assistant", "pub")))
    row = {
        "prompt": prompt,
        "completion": completion,
        "tools": [{"name": "river"}],
        "chat_template_kwargs": {"note": "cheap"},
    }
    data = Dataset.from_list([{**row, "references": ["pub"], "number": 3}] * 2)
    trainer = FineTuningTrainer(
        model=build_model("gpt2", len(tokenizer)),
        args=make_args(FineTuningConfig, tmp_path, eval_strategy="steps"),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        assert tokenizer.decode(rows[0]["input_ids"]).strip() == "river cheap: mill pub"
    assert trainer.evaluate()["eval_loss"] > 0


def test_fillers_of_an_evaluation_have_no_labels():
    row = {"input_ids": [5, 6], "labels": [5, 6], "other": 1}
    assert fine_tuning._blank(row) == {"input_ids": [5, 6], "labels": [-100, -100], "other": 1}


class TestTeacher:
    def test_head_of_a_sharded_student_is_checked_in_a_whole_copy(self, tmp_path, monkeypatch):
        checked = []
        monkeypatch.setattr(fine_tuning, "shards_student", lambda accelerator: True)
        monkeypatch.setattr(kd, "check_head", lambda model, who: checked.append((model, who)))
        trainer = make_trainer(tmp_path)
        (teacher, student) = checked
        assert (teacher, student[1]) == ((trainer.teacher_model, "teacher"), "student")
        assert student[0] is not trainer.model
        torch.testing.assert_close(student[0].lm_head.weight, trainer.model.lm_head.weight)

    def test_it_is_loaded_as_the_arguments_say(self, tmp_path, model_dir, monkeypatch):
        seen, place = [], kd.place_new_teacher

        def remember(teacher, accelerator, **options):
            seen.append({"teacher": teacher, **options})
            return place(teacher, accelerator, **options)

        monkeypatch.setattr(kd, "place_new_teacher", remember)
        teacher = model_dir("llama", 1, 48)
        trainer = make_trainer(tmp_path, teacher=teacher)
        expected = {
            "teacher": teacher,
            "init_kwargs": None,
            "default_dtype": torch.float32,
            "shard": False,
            "trust_remote_code": False,
            "allow_pickled_weights": False,
        }
        assert seen.pop() == expected
        assert {parameter.dtype for parameter in trainer.teacher_model.parameters()} == {torch.float32}
        assert trainer.settings.inputs["teacher_model"] is not None
        options = {"trust_remote_code": True, "allow_pickled_weights": True, "bf16": True}
        trainer = make_trainer(
            tmp_path, teacher=teacher, teacher_model_init_kwargs={"attn_implementation": "eager"}, **options
        )
        options.pop("bf16")
        kwargs = {"attn_implementation": "eager"}
        assert seen.pop() == {**expected, **options, "init_kwargs": kwargs, "default_dtype": torch.bfloat16}
        assert {parameter.dtype for parameter in trainer.teacher_model.parameters()} == {torch.bfloat16}
        assert trainer.teacher_model.config._attn_implementation == "eager"

    def test_student_is_no_teacher_of_its_own(self, tmp_path):
        model = build_model("llama", len(TOKENIZER))
        with pytest.raises(ValueError, match="teacher"):
            make_trainer(tmp_path, student=model, teacher=model)

    @pytest.mark.parametrize("who", ["student", "teacher"])
    def test_head_that_is_not_reproduced_is_refused(self, tmp_path, who: str):
        model = build_model("llama", len(TOKENIZER))
        forward = type(model).forward

        def scaled(*arguments: Any, **options: Any) -> Any:
            output = forward(model, *arguments, **options)
            output.logits = 3 * output.logits.tanh()
            return output

        model.forward = scaled
        with pytest.raises(ValueError, match=who):
            make_trainer(tmp_path, **{who: model})

    @pytest.mark.parametrize("who", ["student", "teacher"])
    def test_head_with_fewer_rows_than_tokens_is_named(self, tmp_path, who: str):
        with pytest.raises(ValueError, match=f"300 tokens but the {who}'s LM head has 290 rows"):
            make_trainer(tmp_path, **{who: build_model("llama", 290)})

    def test_it_computes_in_the_precision_of_the_training(self, tmp_path):
        teacher, seen = build_model("llama", len(TOKENIZER), 1), []
        trainer = make_trainer(tmp_path, teacher=teacher, bf16=True)
        teacher.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch_of(trainer, range(2)))
        assert seen == [torch.bfloat16]
        assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}

    def test_other_ends_than_the_data_s_are_warned_of_at_once(self, tmp_path, monkeypatch):
        warnings: list[str] = []
        monkeypatch.setattr(kd.logger, "warning", warnings.append)
        teacher = build_model("llama", len(TOKENIZER), 1)
        teacher.generation_config.eos_token_id = 5
        make_trainer(tmp_path, teacher=teacher)
        assert len(warnings) == 1

    @pytest.mark.parametrize(
        ("learnt", "ends", "number"),
        [(0, 5, 1), (0, [5, 6], 1), (0, [5, 0], 0), (0, 300, 0), (0, None, 0), (None, 5, 0), (0, 299, 1)],
    )
    def test_ends_that_are_no_token_of_the_data_are_warned_of(
        self, tmp_path, monkeypatch, learnt: int | None, ends: Any, number: int
    ):
        warnings: list[str] = []
        monkeypatch.setattr(kd.logger, "warning", warnings.append)
        trainer = make_trainer(tmp_path)
        assert warnings == []
        assert len(TOKENIZER) == 300
        trainer._learnt_end, trainer.teacher_model.generation_config.eos_token_id = learnt, ends
        trainer._compare_ends()
        assert len(warnings) == number
        assert all("The data ends completions with '<eos>', the teacher with" in text for text in warnings)
