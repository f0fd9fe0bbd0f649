"""What the constructor of `TeacherMixedTrainer` sets up from its arguments."""

import copy

import bitsandbytes.nn.modules
import pytest
import torch
from conftest import WORDS, build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_cross_tokenizer import save_teacher
from test_trainer import DATASET, make_config, make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

import minillm_trl.training.teacher_mixed_trainer as module
from minillm_trl import MiniLLMTrainer
from minillm_trl.errors import UserError
from minillm_trl.monitoring.degeneration_watch import DegenerationWatch
from minillm_trl.presets import preset
from minillm_trl.training.run_settings import find_changes

CORPUS = Dataset.from_dict({"text": [WORDS] * 4})


def test_no_reward_function_is_no_reward_function(tmp_path):
    for given in (None, []):
        trainer = make_trainer(tmp_path, reward_funcs=given)
        assert (trainer.reward_funcs, trainer.reward_func_names, len(trainer.reward_weights)) == ([], [], 0)


def test_settings_name_corpus_and_reward_functions(tmp_path):
    """So that a resumed run says when they have changed."""

    def short(completions, **unused):
        return [0.0 for _ in completions]

    one = make_trainer(tmp_path, lm_dataset=CORPUS).settings.inputs
    other = make_trainer(tmp_path, lm_dataset=CORPUS.select([0]), reward_funcs=short).settings.inputs
    changes = find_changes(one, other)
    assert [change.split(":")[0] for change in changes] == ["lm_dataset", "reward_funcs"]
    assert "short" in changes[1]


def test_checkpoint_has_the_state_of_all_parts(tmp_path):
    trainer = make_trainer(tmp_path, overlap_rollouts=True)
    parts = [part for part in trainer.resume.parts if part is not trainer._loop]  # which has one in a training alone
    names = {name for part in parts for name in part.state()}
    assert {"rollouts", "nonfinite_completions", "completions", "mixing", "rollout_ahead", "nonfinite_steps"} <= names


def test_rewards_of_an_evaluation_have_their_names_and_weights(tmp_path):
    def one(completions, **unused):
        return [3.0 for _ in completions]

    def other(completions, **unused):
        return [8.0 for _ in completions]

    trainer = make_trainer(
        tmp_path, reward_funcs=[one, other], reward_weights=[1.0, 0.5], eval_dataset=DATASET.select(range(4))
    )
    found = trainer.evaluate()
    names = ("eval_reward", "eval_rewards/one/mean", "eval_rewards/other/mean")
    assert [found[name] for name in names] == pytest.approx([7.0, 3.0, 8.0])


def test_watch_comes_before_callbacks_that_report(tmp_path):
    """Its findings are logged, so they are in the logs that the others report."""

    class Report(TrainerCallback):
        """Stands for one that reports logs."""

    trainer = MiniLLMTrainer(
        build_model("gpt2"),
        build_model("gpt2", seed=1),
        args=make_config(tmp_path),
        train_dataset=DATASET,
        processing_class=build_tokenizer(),
        callbacks=[Report(), DegenerationWatch()],
    )
    order = [type(each) for each in trainer.callback_handler.callbacks]
    assert order.index(DegenerationWatch) == 0
    assert Report in order


@pytest.mark.parametrize("row", [0, 999, 1000, 1001])
def test_prompts_of_all_rows_are_checked(tmp_path, row: int):
    prompts = ["the mill"] * 1002
    prompts[row] = "the mill " * 60
    trainer = make_trainer(tmp_path, dataset=Dataset.from_dict({"prompt": prompts}))
    with pytest.raises(UserError):
        trainer.train()


def test_overflows_are_counted_in_float16_alone(tmp_path, monkeypatch):
    assert make_trainer(tmp_path).counts.overflows is None
    monkeypatch.setattr(module, "half_precision", lambda accelerator: torch.float16)
    trainer = make_trainer(tmp_path)
    counter = trainer.counts.overflows
    assert counter in trainer.callback_handler.callbacks
    trainer.guard.skipped_in_row = 0
    assert not counter._skipped_otherwise()
    trainer.guard.skipped_in_row = 1
    assert counter._skipped_otherwise()


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_of_the_student_is_kept_on_request(tmp_path, disable: bool):
    """That of torch's modules, and that whose rate OPT's layers hold as a number."""
    student = build_model("opt")
    layers = [each for each in student.modules() if isinstance(vars(each).get("dropout"), float)]
    assert layers
    for layer in layers:
        layer.dropout = 0.5
    student.append = torch.nn.Dropout(0.5)
    make_trainer(tmp_path, family="opt", student=student, disable_dropout=disable)
    assert {layer.dropout for layer in layers} | {student.append.p} == {0.0 if disable else 0.5}


@pytest.mark.parametrize(("options", "with_trl"), [({}, False), ({"top_p": 0.5, "teacher_mixed_alpha": 0.0}, True)])
@pytest.mark.parametrize("sharded", [None, "student", "teacher"])
def test_processes_of_a_sharded_model_sample_together(
    tmp_path, monkeypatch, sharded: str | None, options: dict, with_trl: bool
):
    """Then a process without prompts of its own takes part in a later turn, if any process has prompts."""
    monkeypatch.setattr(module, "shards_student", lambda accelerator: sharded == "student")
    monkeypatch.setattr("minillm_trl.rollouts.rollout_teacher.is_sharded", lambda model: sharded == "teacher")
    trainer = make_trainer(tmp_path, **options)
    trainer._rollout.turn = 1
    assert (trainer._turn_budget([]) is None) is (sharded is not None and not with_trl)


@pytest.mark.parametrize(
    ("options", "copied"),
    [({}, True), ({"top_p": 0.5, "teacher_mixed_alpha": 0.0}, False)],
    ids=["mixture", "TRL"],
)
def test_adapters_are_merged_for_the_samplers_of_this_package(tmp_path, options: dict, copied: bool):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["c_attn"]), **options)
    assert (trainer._rollout_copy is not None) is copied
    if copied:  # it takes memory while it samples alone
        assert any(parameter.numel() == 0 for parameter in trainer._rollout_copy.model.parameters())


def test_quantised_student_has_adapters_in_float32_and_keeps_the_layout_of_its_base(tmp_path, model_dir, monkeypatch):
    """GRPOTrainer casts adapters to bfloat16, which loses small updates; bitsandbytes repacks weights in eval mode."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)  # of any machine
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
    student = AutoModelForCausalLM.from_pretrained(model_dir("llama"), quantization_config=nf4)
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(tmp_path, family="llama", student=student, peft_config=adapter)
    trained = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}
    weight = trainer.model.get_base_model().model.layers[0].mlp.up_proj.weight
    before = weight.data.clone()
    with torch.no_grad():
        trainer.model.eval()(torch.tensor([[5, 6]]))
    assert torch.equal(weight.data, before)


@pytest.mark.parametrize("corpus", [None, CORPUS], ids=["none", "corpus"])
def test_checks_of_the_model_know_whether_there_is_a_corpus(tmp_path, monkeypatch, corpus: Dataset | None):
    """With one, several processes cannot have reentrant checkpoints."""
    found, check = [], module.check_model
    monkeypatch.setattr(
        module, "check_model", lambda trainer, has_corpus: found.append(has_corpus) or check(trainer, has_corpus)
    )
    make_trainer(tmp_path, lm_dataset=corpus)
    assert found == [corpus is not None]


def test_rows_of_the_corpus_fit_into_the_context(tmp_path):
    corpus = Dataset.from_dict({"text": ["the mill " * 400]})
    trainer = make_trainer(tmp_path, lm_dataset=corpus, lm_max_length=2000)
    assert trainer._lm_batches.window(0, 1, 0, 1)[0]["input_ids"].shape[1] == trainer.max_context < 400


def test_layers_are_checkpointed_as_configured_after_sampling_and_scoring(tmp_path):
    """Both switch checkpointing off, and on again."""
    options = {"use_reentrant": False, "preserve_rng_state": False}
    trainer = make_trainer(
        tmp_path, family="llama", gradient_checkpointing=True, gradient_checkpointing_kwargs=options, max_steps=1
    )

    def kept() -> dict:
        return trainer.model.model.layers[0]._gradient_checkpointing_func.keywords

    trainer.train()
    assert kept() == options
    ids = torch.tensor([[5, 6]])
    trainer.score_rollouts(ids, torch.ones_like(ids), ids, torch.ones_like(ids))
    assert kept() == options
    assert trainer.model.is_gradient_checkpointing


def test_kernels_of_cudnn_are_off(tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_trainer(tmp_path)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_deep_copy_of_the_student_runs_its_own_weights(tmp_path):
    """As moving averages of the weights do."""
    student = make_trainer(tmp_path).model
    ids = torch.tensor([[5, 6, 7]])
    before = student(ids).logits
    copied = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
        assert torch.equal(copied(ids).logits, before)


def test_loss_of_an_evaluation_is_a_mean_over_sequences_where_that_of_training_is(tmp_path):
    found = {}
    for reduction in ("token_mean", "sequence_sum"):
        trainer = make_trainer(tmp_path, eval_dataset=DATASET.select(range(4)), loss_reduction=reduction)
        found[reduction] = trainer.evaluate()
    length = found["token_mean"]["eval_completions/mean_length"]
    assert length > 1.0
    assert found["sequence_sum"]["eval_loss"] == pytest.approx(length * found["token_mean"]["eval_loss"], rel=1e-4)


def test_student_of_a_teacher_with_another_tokenizer_ends_with_the_tokens_of_the_user(tmp_path):
    options = {**preset("cross_tokenizer"), "eos_tokens": ["<eos>", "<pad>"]}
    trainer = make_trainer(tmp_path, teacher=save_teacher(tmp_path / "teacher"), **options)
    assert trainer.eos_token_ids == [0, 1]
    assert trainer.scoring.spans is not None
