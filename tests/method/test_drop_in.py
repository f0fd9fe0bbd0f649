"""Code written for TRL's former MiniLLM trainer runs with another import: its documented calls, on local models."""

import inspect

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import TrainerCallback

import minillm_trl.trainer
from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.training.teacher_mixed_trainer import TeacherMixedTrainer

PROMPTS = Dataset.from_dict({"prompt": [f"the mill {i}" for i in range(17)], "answer": [str(i) for i in range(17)]})

# Constructor arguments and configuration fields of trl.experimental.minillm in TRL 1.14, in order
CONSTRUCTOR = [
    *("model", "teacher_model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"),
    *("reward_processing_classes", "callbacks", "optimizers", "peft_config", "rollout_func"),
]
FIELDS = [
    *("teacher_model_init_kwargs", "disable_dropout", "rkl_advantage", "single_step_decomposition", "kd_temperature"),
    *("gamma", "length_normalization"),
]


class StopAfterOneStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.fixture(scope="module")
def long_context(tmp_path_factory) -> tuple[str, str]:
    """Folders of a student and a teacher whose context takes the default completion length."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"model-{seed}")
        tokenizer = build_tokenizer()
        model = build_model("llama", len(tokenizer), seed)
        model.config.max_position_embeddings = 1024
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders[0], folders[1]


def test_constructor_takes_the_same_arguments_in_the_same_order():
    parameters = list(inspect.signature(MiniLLMTrainer.__init__).parameters)[1:]
    assert parameters[: len(CONSTRUCTOR)] == CONSTRUCTOR


def test_configuration_takes_the_same_fields():
    assert set(FIELDS) <= set(inspect.signature(MiniLLMConfig).parameters)


def test_trainer_runs_without_a_configuration(long_context, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    student, teacher = long_context
    trainer = MiniLLMTrainer(
        model=student, teacher_model=teacher, train_dataset=PROMPTS, callbacks=[StopAfterOneStep()]
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.args.output_dir.endswith("-MiniLLM")


def test_training_moves_every_parameter(long_context, tmp_path):
    args = MiniLLMConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        num_generations=3,
        max_completion_length=32,
        report_to="none",
        num_train_epochs=1,
        learning_rate=1e-2,
    )
    trainer = MiniLLMTrainer(model=long_context[0], teacher_model=long_context[1], args=args, train_dataset=PROMPTS)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None
    assert not [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])]


@pytest.mark.parametrize("kind", ["none", "dataset", "dataset dict", "dict"])
def test_evaluation_data_may_be_of_every_kind(long_context, tmp_path, kind: str):
    two = {"data1": PROMPTS.select(range(8)), "data2": PROMPTS.select(range(8, 16))}
    data = {"none": None, "dataset": PROMPTS, "dataset dict": DatasetDict(two), "dict": two}[kind]
    args = MiniLLMConfig(output_dir=str(tmp_path), max_completion_length=4, report_to="none")
    trainer = MiniLLMTrainer(
        model=long_context[0], teacher_model=long_context[1], args=args, train_dataset=PROMPTS, eval_dataset=data
    )
    if kind == "none":
        assert trainer.eval_dataset is None
        return
    metrics = trainer.evaluate()
    names = ["eval_data1", "eval_data2"] if kind.startswith("d") and kind != "dataset" else ["eval"]
    assert all(f"{name}_objective/reverse_kl" in metrics for name in names)


@pytest.mark.parametrize(
    ("options", "is_token_ratio"),
    [
        pytest.param({"single_step_decomposition": False, "gamma": 0.0}, True, id="log-ratio of the token alone"),
        pytest.param({"rkl_advantage": False}, False, id="single step alone"),
    ],
)
def test_documented_special_cases_keep_their_meaning(long_context, tmp_path, options: dict, is_token_ratio: bool):
    args = MiniLLMConfig(output_dir=str(tmp_path), max_completion_length=6, teacher_mixed_alpha=0.0, **options)
    trainer = MiniLLMTrainer(model=long_context[0], teacher_model=long_context[1], args=args, train_dataset=PROMPTS)
    batch = trainer._generate_and_score_completions([PROMPTS[i] for i in range(4)])
    mask = batch["completion_mask"].bool()
    loss = trainer.compute_loss(trainer.model, batch)

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        log_q, log_p = (
            torch.log_softmax(model(input_ids=ids, attention_mask=attention).logits[:, -mask.shape[1] - 1 : -1], -1)
            for model in (trainer.model, trainer.teacher_model)
        )
    if is_token_ratio:
        token_ratio = (log_q - log_p).gather(2, batch["completion_ids"][..., None]).squeeze(2)
        torch.testing.assert_close(batch["advantages"][mask], -token_ratio[mask], rtol=1e-3, atol=1e-4)
        expected = token_ratio[mask].mean()
    else:
        expected = (log_q.exp() * (log_q - log_p)).sum(-1)[mask].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)


def test_full_constructor_by_position(tmp_path):
    tokenizer = build_tokenizer()

    def rewards(completions, answer, **kwargs) -> list[float]:
        return [float(each in text) for each, text in zip(answer, completions, strict=True)]

    def rollout(prompts, trainer) -> dict:
        completions = [[8, 9 + i % 2, 0] for i in range(len(prompts))]
        logprobs = [[-1.0] * 3 for _ in prompts]
        return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": completions, "logprobs": logprobs}

    args = MiniLLMConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_completion_length=4,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = MiniLLMTrainer(
        build_model("gpt2", len(tokenizer)),
        build_model("gpt2", len(tokenizer), 1),
        rewards,
        args,
        PROMPTS,
        PROMPTS,
        tokenizer,
        None,
        [StopAfterOneStep()],
        (None, None),
        LoraConfig(target_modules=["c_attn"], r=4),
        rollout,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert "rewards/rewards/mean" in trainer.state.log_history[0]


def test_every_argument_of_the_constructor_is_checked_and_reaches_grpo(monkeypatch: pytest.MonkeyPatch):
    given = {name: object() for name in inspect.signature(MiniLLMTrainer.__init__).parameters if name != "self"}
    reached, checked = {}, {}
    signature = inspect.signature(minillm_trl.trainer.check_arguments)
    monkeypatch.setattr(TeacherMixedTrainer, "__init__", lambda self, **arguments: reached.update(arguments))
    monkeypatch.setattr(minillm_trl.trainer, "choose_teacher", lambda teacher, args: teacher)
    monkeypatch.setattr(minillm_trl.trainer, "check_machine", lambda *arguments: checked.update(machine=arguments))

    def check(*arguments: object, **named: object) -> None:
        checked.update(signature.bind(*arguments, **named).arguments)

    monkeypatch.setattr(minillm_trl.trainer, "check_arguments", check)
    MiniLLMTrainer(**given)
    assert {name: reached[name] for name in given} == given
    assert checked.pop("machine") == (given["args"], given["quantization_config"])
    assert checked.pop("has_environment") is True
    names = [name for name in signature.parameters if name != "has_environment"]
    assert checked == {name: given[name] for name in names}


def test_conversations_are_rendered_with_the_chat_template(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"the mill {i}"}] for i in range(8)]})
    seen = []

    def rewards(completions, **kwargs) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    trainer = MiniLLMTrainer(
        build_model("gpt2", len(tokenizer)),
        build_model("gpt2", len(tokenizer), 1),
        reward_funcs=[rewards],
        args=MiniLLMConfig(str(tmp_path), max_completion_length=4, max_steps=1, save_strategy="no"),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train()
    assert all(turn[0]["role"] == "assistant" for turn in seen)
    batch = trainer.buffer.batches[0]
    prompt = tokenizer.decode(batch["prompt_ids"][0][batch["prompt_mask"][0].bool()])
    assert prompt.startswith("<user> the mill ")
    assert prompt.endswith("<assistant>")


def test_teacher_is_loaded_with_its_keyword_arguments(long_context, tmp_path):
    args = MiniLLMConfig(str(tmp_path), teacher_model_init_kwargs={"attn_implementation": "eager"})
    trainer = MiniLLMTrainer(long_context[0], long_context[1], args=args, train_dataset=PROMPTS)
    assert trainer.teacher_model.config._attn_implementation == "eager"  # TRL 1.14 wanted a dtype beside it
