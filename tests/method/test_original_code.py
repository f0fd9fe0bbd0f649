"""The recipe with the authors' loss against that loss written down from its description, token by token."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build_model, build_tokenizer
from datasets import Dataset

from minillm_trl import MiniLLMConfig, MiniLLMTrainer

RECIPE = Path(__file__).parents[2] / "recipes/e2e_demo/minillm_original_code.yaml"
OBJECTIVE = (
    *("teacher_mixed_alpha", "epsilon", "temperature", "gamma", "include_current_reward", "length_normalization"),
    *("discounted_length", "reward_scale", "reward_clip", "whiten_advantages", "single_step_decomposition"),
    *("loss_reduction", "lm_coef", "lm_kd_ratio"),
)
VOCAB, SLOTS, ALPHA = 300, 6, 0.2
PROMPT = [5, 6, 7]
COMPLETIONS = [[8, 9, 10, 0], [11, 0], [12, 13, 14, 15, 16, 17]]
CORPUS = [[20, 21, 22, 23, 0], [24, 25, 26, 27, 0]]


@pytest.fixture
def trainer(tmp_path: Path) -> MiniLLMTrainer:
    recipe = yaml.safe_load(RECIPE.read_text())
    args = MiniLLMConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        max_completion_length=SLOTS,
        **{name: recipe[name] for name in OBJECTIVE},
    )
    student, teacher = (build_model("gpt2", VOCAB, seed, width=8, layers=1).double() for seed in (0, 1))
    return MiniLLMTrainer(
        student,
        teacher,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 4}),
        processing_class=build_tokenizer(),
        lm_dataset=Dataset.from_dict({"text": ["the mill", "the pub"]}),
    )


def token_log_probs(model, ids: list[int]) -> torch.Tensor:
    """Next-token log-probs at every position, `(len(ids), V)`, by a plain forward pass of one sequence."""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)


def original_loss(student, sampler, teacher) -> torch.Tensor:
    """`sampler` is the student that sampled, `student` the one that is trained."""
    advantages, ratios, divergences = [], [], []
    for completion in COMPLETIONS:
        ids = PROMPT + completion
        now, old, other = (token_log_probs(model, ids) for model in (student, sampler, teacher))
        rewards = []
        for t, token in enumerate(completion):
            position = len(PROMPT) + t - 1
            log_q, log_p = old[position, token].item(), other[position, token].item()
            rewards.append(max(-100.0, min(100.0, (log_p - log_q) / 0.5)))
            w = math.exp(log_q) / (ALPHA * math.exp(log_p) + (1 - ALPHA) * math.exp(log_q))
            ratios.append((now[position, token] - log_q).exp() * w)
            divergences.append((now[position].exp() * (now[position] - other[position].detach())).sum())
        length = len(completion)
        for t in range(length):
            total = sum(0.95 ** (i - t) * rewards[i] for i in range(t, length))
            advantages.append(total / (length - t))
    slots = len(COMPLETIONS) * SLOTS
    mean = sum(advantages) / slots
    empty = slots - len(advantages)
    variance = (sum((a - mean) ** 2 for a in advantages) + empty * mean**2) / slots
    long_term = 0.0
    for ratio, advantage in zip(ratios, advantages, strict=True):
        white = (advantage - mean) / math.sqrt(variance + 1e-8)
        long_term = long_term + torch.maximum(-white * ratio, -white * ratio.clamp(0.8, 1.2))
    tokens = len(advantages)
    return long_term / tokens + sum(divergences) / tokens


def original_corpus_loss(student, teacher) -> torch.Tensor:
    cross_entropy, distillation, count = 0.0, 0.0, 0
    for ids in CORPUS:
        now, other = token_log_probs(student, ids), token_log_probs(teacher, ids).detach()
        for t in range(len(ids) - 1):
            cross_entropy = cross_entropy - now[t, ids[t + 1]]
            distillation = distillation - (other[t].exp() * now[t]).sum()
            count += 1
    return (0.5 * cross_entropy + 0.5 * distillation) / count


def teacher_entropy(teacher) -> float:
    rows = torch.cat([token_log_probs(teacher, ids)[:-1] for ids in CORPUS])
    return -(rows.exp() * rows).sum(dim=-1).mean().item()


def test_loss_and_gradient_are_those_of_the_original_code(trainer: MiniLLMTrainer):
    width = max(map(len, COMPLETIONS))
    ids = torch.tensor([completion + [1] * (width - len(completion)) for completion in COMPLETIONS])
    mask = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in COMPLETIONS])
    prompts = torch.tensor([PROMPT] * len(COMPLETIONS))
    batch = trainer.score_rollouts(prompts, torch.ones_like(prompts), ids, mask)
    corpus = torch.tensor(CORPUS)
    loss_mask = torch.ones(len(CORPUS), corpus.shape[1] - 1, dtype=torch.bool)
    lm = {
        "input_ids": corpus,
        "attention_mask": torch.ones_like(corpus),
        "loss_mask": loss_mask,
        "window_tokens": loss_mask.sum(),
    }

    sampler = build_model("gpt2", VOCAB, 0, width=8, layers=1).double()  # the student before it moved
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    parameters = list(trainer.model.parameters())
    loss = trainer.compute_loss(trainer.model, {**batch, "lm": lm})
    expected = original_loss(trainer.model, sampler, trainer.teacher_model)
    expected = expected + original_corpus_loss(trainer.model, trainer.teacher_model)
    # forward KL in place of the cross-entropy to the teacher: a constant less
    constant = 0.5 * teacher_entropy(trainer.teacher_model)
    assert loss.item() == pytest.approx(expected.item() - constant, rel=1e-10)
    for actual, reference in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(actual, reference, rtol=1e-8, atol=1e-10)
