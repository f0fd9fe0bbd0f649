"""A teacher with another tokenizer in the trainer: rewards against a slow reference, training, chat, and refusals."""

from pathlib import Path

import pytest
import torch
from chat_models import build_chat_tokenizer, save_chat_model
from conftest import build_model, build_tokenizer
from datasets import Dataset
from test_spans import SECOND
from test_trainer import PROMPTS, make_config, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm_trl import MiniLLMTrainer
from minillm_trl.errors import UserError
from minillm_trl.models.encoding import encode_prompts
from minillm_trl.presets import preset
from minillm_trl.rollouts.cross_tokenizer import CrossTokenizerScorer, TwoTokenizers

CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def save_teacher(folder: Path, tokenizer=SECOND, positions: int = 128) -> str:
    build_model("llama", len(tokenizer), seed=1, width=48, positions=positions).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_trainer(
    tmp_path: Path, teacher: str | None = None, prompts: list = PROMPTS, tokenizer=None, student=None, **options
) -> MiniLLMTrainer:
    tokenizer = tokenizer or build_tokenizer()
    given = {name: options.pop(name) for name in ("reward_funcs", "rollout_func", "tools") if name in options}
    return MiniLLMTrainer(
        student or build_model("gpt2", len(tokenizer), seed=0),
        teacher or save_teacher(tmp_path / "teacher"),
        args=make_config(tmp_path, **{**preset("cross_tokenizer"), **options}),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        **given,
    )


def batch_of(tokenizer, prompts: list[str], completions: list[list[int]]) -> tuple[torch.Tensor, ...]:
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    length = max(map(len, completions))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in completions])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in completions])
    return encoded["input_ids"], encoded["attention_mask"], ids, mask


def plain_logps(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the tokens of a completion, by a forward pass over one row without padding."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature, -1)
    return log_probs.gather(1, torch.tensor(completion)[:, None])[:, 0]


TEXTS = ["the river mill", " é — 12\n\nnear", "serves", "a", ""]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"kd_temperature": 1.6}])
def test_rewards_add_up_to_the_log_ratio_of_the_whole_text(tmp_path: Path, options: dict):
    """By a plain forward pass of each model over its own tokens; some completions are cut, some end."""
    trainer = make_trainer(tmp_path, length_normalization=False, loss_reduction="sequence_sum", **options)
    tokenizer, end = trainer.processing_class, trainer.processing_class.eos_token_id
    temperature = options.get("kd_temperature") or options.get("temperature", 1.0)
    completions = [tokenizer(text)["input_ids"] + [end] * (row != 2) for row, text in enumerate(TEXTS)]
    batch = trainer.score_rollouts(*batch_of(tokenizer, PROMPTS[: len(TEXTS)], completions))
    for row, (text, ids) in enumerate(zip(TEXTS, completions, strict=True)):
        prompt = PROMPTS[row]
        student = plain_logps(trainer.model, tokenizer(prompt)["input_ids"], ids, temperature).sum()
        theirs = SECOND(text)["input_ids"] + [SECOND.eos_token_id] * (row != 2)
        teacher = plain_logps(trainer.teacher_model, SECOND(prompt)["input_ids"], theirs, temperature).sum()
        expected = (teacher - student).item()
        assert -batch["sampled_reverse_kl"][row].sum().item() == pytest.approx(expected, abs=1e-4)
        assert batch["advantages"][row, 0].item() == pytest.approx(expected, abs=1e-4)


def test_clip_bounds_a_span_by_the_number_of_its_tokens(tmp_path: Path):
    """The returns of a completion with a span of many tokens, from the unclipped rewards of its spans."""
    options = {"length_normalization": False, "loss_reduction": "sequence_sum"}
    student, teacher = build_model("gpt2", len(build_tokenizer()), seed=0), save_teacher(tmp_path / "teacher")
    plain, clipped = (
        make_trainer(tmp_path, teacher, student=student, **options, reward_clip=clip) for clip in (None, 0.5)
    )
    tokenizer = plain.processing_class
    end = tokenizer.eos_token_id
    completions = [[*tokenizer(text)["input_ids"], end] for text in ("東京 the mill", "serves river")]
    inputs = batch_of(tokenizer, PROMPTS[:2], completions)
    rewards = -plain.score_rollouts(*inputs)["sampled_reverse_kl"]
    lengths = torch.zeros_like(rewards)
    readings = TwoTokenizers(tokenizer, SECOND).read(completions, [end], SECOND.eos_token_id)
    for row, reading in enumerate(readings):
        for place in reading.of_student:
            lengths[row, place] += 1
    assert lengths.max() > 3
    bounded = torch.minimum(torch.maximum(rewards, -0.5 * lengths), 0.5 * lengths)
    assert ((bounded != rewards) & (lengths > 1)).any()  # a long span is clipped, but not to 0.5
    expected = bounded.flip(1).cumsum(1).flip(1)
    found = clipped.score_rollouts(*inputs)
    mask = inputs[3].bool()
    torch.testing.assert_close(found["advantages"][mask], expected[mask], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(-found["sampled_reverse_kl"], rewards)  # the metric is not clipped


def test_same_tokenizer_gives_the_rewards_of_the_local_teacher_one_span_later(tmp_path: Path):
    """The return at the token after a span is the local one at the span's first token."""
    tokenizer = build_tokenizer()
    teacher = save_teacher(tmp_path / "teacher", tokenizer)
    student = build_model("gpt2", len(tokenizer), seed=0)
    of_spans = make_trainer(tmp_path, teacher, student=student, length_normalization=False)
    options = {"teacher_mixed_alpha": 0.0, "single_step_decomposition": False, "length_normalization": False}
    of_tokens = make_trainer(tmp_path, teacher, student=student, **{**options, "cross_tokenizer": False})
    completions = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    inputs = batch_of(tokenizer, PROMPTS[: len(TEXTS)], completions)
    found, expected = (trainer.score_rollouts(*inputs)["advantages"] for trainer in (of_spans, of_tokens))
    torch.testing.assert_close(found[:, 0], expected[:, 0], atol=1e-4, rtol=1e-5)  # the whole completion
    readings = TwoTokenizers(tokenizer, tokenizer).read(completions, [tokenizer.eos_token_id], tokenizer.eos_token_id)
    spans = [(row, place) for row, reading in enumerate(readings) for place in {*reading.of_student.tolist()}]
    assert len(spans) > 10
    for row, place in spans:
        start = readings[row].of_student.tolist().index(place)
        assert found[row, place].item() == pytest.approx(expected[row, start].item(), abs=1e-4)


def test_training_brings_the_student_closer_to_the_teacher(tmp_path: Path):
    trainer = make_trainer(
        tmp_path,
        max_steps=40,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        max_completion_length=6,
        advantage_baseline="position",
    )
    trainer.train()
    values = [row["objective/reverse_kl"] for row in trainer.state.log_history if "objective/reverse_kl" in row]
    first, last = (sum(part) / len(part) for part in (values[:5], values[-5:]))
    assert last < 0.7 * first
    assert "objective/single_step" not in trainer.state.log_history[0]


def test_evaluation_estimates_the_objective(tmp_path: Path):
    trainer = make_trainer(tmp_path, reward_funcs=[lambda completions, **_: [0.5] * len(completions)])
    trainer.eval_dataset = trainer.train_dataset
    found = trainer.evaluate()
    assert found["eval_objective/reverse_kl"] > 0.0
    assert "eval_objective/single_step" not in found


def test_each_model_reads_conversations_through_its_own_template(tmp_path: Path):
    """ChatML for the teacher, whose turn ends with its own token, and another template for the student."""
    teacher = save_chat_model(tmp_path / "chat", "<|im_end|>", None, seed=3)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '<eos>' }}{% endfor %} the "
    trainer = make_trainer(tmp_path, teacher, CHATS, tokenizer)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(list(trainer.train_dataset))
    theirs = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    checked = 0
    for row, prompt in enumerate(CHATS):
        ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        ended = ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids[:-1] if ended else ids)
        if "�" in text:
            continue
        read = theirs(text)["input_ids"] + [theirs.convert_tokens_to_ids("<|im_end|>")] * ended
        (before,) = encode_prompts(theirs, [prompt])
        expected = plain_logps(model, before, read).sum() - batch["student_logps"][row].sum()
        assert -batch["sampled_reverse_kl"][row].sum().item() == pytest.approx(expected.item(), abs=1e-3)
        checked += 1
    assert checked
    with pytest.raises(UserError, match="own chat template"):
        trainer.score_rollouts(*batch_of(tokenizer, PROMPTS[:1], [[5, 6]]))


def test_text_that_is_too_long_for_the_teacher_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer = make_trainer(tmp_path, save_teacher(tmp_path / "short", positions=40), max_steps=2)
    tokenizer = trainer.processing_class
    inputs = batch_of(tokenizer, PROMPTS[:1], [tokenizer("東" * 20)["input_ids"]])
    with pytest.raises(FloatingPointError, match="tokens of the teacher, its context 40"):
        trainer.score_rollouts(*inputs)


def test_prompt_that_is_too_long_for_the_teacher_is_left_out_or_refused(tmp_path: Path):
    """GPT-2 has no positions beyond its context; the row that fills up a batch has no completion to leave out."""
    teacher = build_model("gpt2", len(SECOND), seed=1, positions=24)
    teacher.save_pretrained(tmp_path / "short")
    SECOND.save_pretrained(tmp_path / "short")
    prompts = ["the mill", "the mill " * 10]
    trainer = make_trainer(tmp_path, str(tmp_path / "short"), max_steps=2)
    tokenizer = trainer.processing_class
    inputs = batch_of(tokenizer, prompts, [tokenizer("pub")["input_ids"]] * 2)
    with pytest.raises(FloatingPointError, match=r"Completion 1: .*its context 24"):
        trainer.score_rollouts(*inputs)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    batch = trainer.scoring.training_batch(trainer.model, dict(zip(names, inputs, strict=True)), 0.0).batch
    assert batch["faulty"].tolist() == [False, True]
    assert batch["sampled_reverse_kl"].isfinite().all()
    assert batch["sampled_reverse_kl"].any(dim=1).tolist() == [True, False]
    inputs[3][1] = 0
    assert not trainer.score_rollouts(*inputs)["faulty"].any()
    with pytest.raises(UserError, match="27 tokens of the teacher, whose context of 24"):
        trainer.train()


def test_prompt_needs_room_for_a_token_where_the_teacher_has_a_context():
    prompt = "the mill " * 10
    count = len(SECOND(prompt)["input_ids"])

    def check(max_context: int | None) -> None:
        CrossTokenizerScorer(TwoTokenizers(SECOND, SECOND), None, None, [0], False, max_context).check_prompts(
            [prompt]
        )

    check(None)
    check(count + 1)
    with pytest.raises(UserError, match=f"has {count} tokens of the teacher, whose context of {count}"):
        check(count)


def test_weights_resume(tmp_path: Path):
    """The buffer of a rollout has the scores, so that a resumed run continues with the same weights."""
    options = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4, "save_strategy": "steps"}
    whole = make_trainer(tmp_path, save_steps=3, **options)
    whole.train()
    resumed = make_trainer(tmp_path, save_steps=3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("single_step_decomposition", True),
            ("teacher_mixed_alpha", 0.2),
            ("reward_estimator", "expected"),
            ("rkl_advantage", False),
            ("include_current_reward", False),
            ("gamma", 0.0),
            ("lmbda", 0.5),
            ("skd_top_k", 3),
            ("iw_opd_gamma", 0.5),
            ("lm_kd_ratio", 0.5),
            ("teacher_hidden_states", "cpu"),
            ("teacher_shares_base", True),
            ("teacher_server_url", "http://127.0.0.1:1"),
        ],
    )
    def test_setting_that_needs_one_vocabulary(self, tmp_path: Path, name: str, value: object):
        with pytest.raises(UserError, match=f"^{name}=.*cross_tokenizer=True"):
            make_config(tmp_path, **{**preset("cross_tokenizer"), name: value})

    def test_other_tokenizer_without_the_option_names_it(self, tmp_path: Path):
        options = {"teacher_mixed_alpha": 0.0, "cross_tokenizer": False}
        with pytest.raises(UserError, match="cross_tokenizer=True"):
            make_trainer(tmp_path, **options)

    def test_teacher_without_a_folder(self, tmp_path: Path):
        with pytest.raises(UserError, match="built in process"):
            make_trainer(tmp_path, build_model("gpt2", len(SECOND), seed=1))

    @pytest.mark.parametrize("name", ["rollout_func", "tools"])
    def test_texts_of_others(self, tmp_path: Path, name: str):
        with pytest.raises(UserError, match=f"excludes {name}"):
            make_trainer(tmp_path, **{name: [print] if name == "tools" else print})

    def test_conversations_without_the_teachers_template(self, tmp_path: Path):
        with pytest.raises(UserError, match="chat template"):
            make_trainer(tmp_path, None, CHATS, build_chat_tokenizer())

    def test_same_vocabulary_is_worth_a_warning(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        make_trainer(tmp_path, save_teacher(tmp_path / "same", build_tokenizer()))
        assert "gives up the single step" in caplog.text
