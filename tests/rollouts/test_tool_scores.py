"""Rollouts in several turns: scores are those of the whole completion, and every turn keeps within the context."""

from pathlib import Path

import pytest
import torch
import trl
from conftest import build_model, build_tokenizer
from datasets import Dataset
from test_trainer import make_config
from test_trainer_options import ScriptedFirstTurn, weather
from transformers import PreTrainedModel
from trl import GRPOTrainer

from minillm_trl import MiniLLMTrainer
from minillm_trl.rollouts.buffer import sequences

MAX_LENGTH = 200
CONVERSATIONS = [[{"role": "user", "content": f"weather {i}"}] for i in range(8)]


def build_trainer(
    tmp_path: Path, trainer_class: type[MiniLLMTrainer] = ScriptedFirstTurn, **options
) -> MiniLLMTrainer:
    """Models whose context is exactly that of the longest prompt and its completion."""
    options = {"max_completion_length": MAX_LENGTH, "max_steps": 2, **options}
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text()
    render = {"tools": [weather], "add_generation_prompt": True, "return_dict": False}
    prompts = [tokenizer.apply_chat_template(conversation, **render) for conversation in CONVERSATIONS]
    positions = max(map(len, prompts)) + options["max_completion_length"]
    models = [build_model("gpt2", len(tokenizer), seed, positions=positions) for seed in (0, 1)]
    for model in models:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return trainer_class(
        *models,
        args=make_config(tmp_path, **options),
        train_dataset=Dataset.from_dict({"prompt": CONVERSATIONS}),
        processing_class=tokenizer,
        tools=[weather],
    )


def token_logps(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """By a plain forward pass of each row without its padding."""
    found = torch.zeros(batch["completion_ids"].shape)
    for row in range(len(found)):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        logps = torch.log_softmax(logits, dim=-1).gather(1, completion[:, None])
        found[row, : len(completion)] = logps.squeeze(1)
    return found


# with 2 accumulation steps, GRPO asks for the old log-probs by itself
@pytest.mark.parametrize(("accumulation", "mixing"), [(1, "coins"), (2, "coins"), (1, "speculative")])
def test_scores_after_tool_turns_are_those_of_the_whole_completion(tmp_path, accumulation: int, mixing: str):
    options = {"gradient_accumulation_steps": accumulation, "gamma": 0.0, "include_current_reward": True}
    options["mixing"] = mixing
    trainer = build_trainer(tmp_path, teacher_mixed_alpha=0.3, **options)
    student, teacher = trainer.model, trainer.teacher_model
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": conversation} for conversation in CONVERSATIONS])
    mask = sequences(batch)[2]
    answered = (batch["completion_mask"].bool() & ~mask).any(dim=1)
    assert answered.tolist() == [True, False] * 4
    q, p = token_logps(student.eval(), batch), token_logps(teacher, batch)
    mixture = (0.7 * q.exp() + 0.3 * p.exp()).log()
    for name, expected in (("student_logps", q), ("old_per_token_logps", mixture), ("advantages", p - q)):
        torch.testing.assert_close(batch[name][mask], expected[mask], rtol=1e-3, atol=1e-3)


def test_later_turns_end_at_the_context(tmp_path):
    """GPT-2 has no embedding of a position beyond it."""
    trainer = build_trainer(tmp_path)
    trainer.train()
    lengths = [
        (batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)).max().item()
        for batch in trainer.buffer.batches
    ]
    assert max(lengths) == trainer.max_context


def test_limit_of_a_turn_that_processes_take_together(tmp_path):
    """A context that is full leaves no tokens, which differs from a process without prompts."""
    trainer = build_trainer(tmp_path)
    trainer.model.train()
    trainer._rollout.turn, trainer._collective_turns = 1, True
    assert trainer._turn_budget([[5] * trainer.max_context, [5]]) == 0
    assert trainer._turn_budget([[5] * (trainer.max_context - 3), [5]]) == 3
    assert trainer._turn_budget([[5]]) == MAX_LENGTH
    assert trainer._turn_budget([]) is None


@pytest.mark.parametrize(("collective", "expected"), [(True, [([], 5, 1), ([], 0, 1)]), (False, [])])
def test_process_without_calls_takes_part_in_the_turns_of_others(
    tmp_path, monkeypatch, collective: bool, expected: list
):
    """As sharded models need it. The other process has two more turns, in the second of which no room is left."""
    trainer, turns, budgets = build_trainer(tmp_path), [], iter([5, 0, -1])
    trainer.model.train()
    trainer._rollout.turn, trainer._collective_turns = 0, collective  # as after a rollout function
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.cat([own, torch.tensor([next(budgets)])]))
    monkeypatch.setattr(
        trainer, "_sample_turn", lambda prompt_ids, budget: turns.append((prompt_ids, budget, trainer._rollout.turn))
    )
    monkeypatch.setattr(GRPOTrainer, "_tool_call_loop", lambda self, *given: given)
    assert trainer._tool_call_loop("prompts", "completions") == ("prompts", "completions")
    assert turns == expected
