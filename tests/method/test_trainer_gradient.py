"""The trainer's own loss on every completion of a tiny model: its expected gradient, and what leaves it unchanged."""

import dataclasses

import pytest
import torch
from conftest import build_model
from datasets import Dataset
from tabular import Tabular, relative_error, sequence_reverse_kl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import minillm_trl.models.fused_head
import minillm_trl.trainer
import minillm_trl.training.rollout_rewards
from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.objectives import mixture_logps, reward_to_go

PROBLEM = Tabular.build(vocab=3, horizon=3)
PROMPT = [1, 2, 2]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def build_trainer(tmp_path, family: str = "gpt2", **options) -> MiniLLMTrainer:
    student, teacher = (build_model(family, vocab_size=3, seed=seed, width=8, layers=1).double() for seed in (0, 1))
    with torch.no_grad():  # further from uniform, so that biases are not small
        student.get_output_embeddings().weight.mul_(4.0)
        teacher.get_output_embeddings().weight.mul_(4.0)
    args = MiniLLMConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=1,
        max_completion_length=3,
        **{"loss_reduction": "sequence_sum", "teacher_mixed_alpha": 0.0, "length_normalization": False} | options,
    )
    dataset = Dataset.from_dict({"prompt": ["a b b"] * 4})
    return MiniLLMTrainer(student, teacher, args=args, train_dataset=dataset, processing_class=tiny_tokenizer())


def enumerate_logps(model, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of every completion's tokens by a plain forward pass."""
    ids = torch.cat([torch.tensor([PROMPT]).expand(len(PROBLEM.ids), -1), PROBLEM.ids], dim=1)
    log_probs = torch.log_softmax(model(ids).logits[:, len(PROMPT) - 1 : -1] / temperature, dim=-1)
    return log_probs.gather(2, PROBLEM.ids[..., None]).squeeze(2).masked_fill(~PROBLEM.mask, 0.0)


def gradient(loss: torch.Tensor, model) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [
            torch.zeros(p.numel()).double() if g is None else g.flatten()
            for g, p in zip(grads, model.parameters(), strict=True)
        ]
    )


def exact_gradient(trainer: MiniLLMTrainer) -> torch.Tensor:
    """Of the reverse KL of student and teacher, both at the sampling temperature."""
    temperature = trainer.temperature
    with torch.no_grad():
        teacher_logps = enumerate_logps(trainer.teacher_model, temperature).sum(dim=1)
    kl = sequence_reverse_kl(enumerate_logps(trainer.model, temperature).sum(dim=1), teacher_logps)
    return gradient(kl, trainer.model)


def batch_of(
    rows: slice, padding: int = 0, mask: torch.Tensor = PROBLEM.mask, right: int = 0
) -> tuple[torch.Tensor, ...]:
    ids, mask = PROBLEM.ids[rows], mask[rows]
    prompt = torch.tensor([[0] * padding + PROMPT]).expand(len(ids), -1)
    prompt_mask = torch.tensor([[0] * padding + [1] * len(PROMPT)]).expand(len(ids), -1)
    ids = torch.nn.functional.pad(ids, (0, right), value=2)
    mask = torch.nn.functional.pad(mask, (0, right), value=False)
    return prompt, prompt_mask, ids, mask.long()


def expected_gradient(trainer: MiniLLMTrainer, alpha: float = 0.0, mask: torch.Tensor = PROBLEM.mask) -> torch.Tensor:
    """Sum over completions of mu(y) times the gradient of compute_loss on y alone."""
    with torch.no_grad():
        models = trainer.model, trainer.teacher_model
        student_logps, teacher_logps = (enumerate_logps(model, trainer.temperature) for model in models)
        mu = mixture_logps(student_logps, teacher_logps, alpha).masked_fill(~PROBLEM.mask, 0.0).sum(dim=1).exp()
    total = 0.0
    for n, probability in enumerate(mu.tolist()):
        batch = trainer.score_rollouts(*batch_of(slice(n, n + 1), padding=2, mask=mask))
        total = total + probability * gradient(trainer.compute_loss(trainer.model, batch), trainer.model)
    return total


@pytest.mark.parametrize(
    ("family", "tolerance"),
    [("gpt2", 1e-9), ("llama", 1e-6)],  # Llama's norm and rotary positions are computed in float32 whatever the dtype
)
def test_expected_gradient_of_compute_loss_is_that_of_the_reverse_kl(tmp_path, family: str, tolerance: float):
    trainer = build_trainer(tmp_path, family, epsilon=100.0)
    assert relative_error(expected_gradient(trainer), exact_gradient(trainer)) < tolerance


def test_expected_gradient_without_single_step_is_that_of_the_reverse_kl(tmp_path):
    trainer = build_trainer(tmp_path, epsilon=100.0, single_step_decomposition=False)
    assert relative_error(expected_gradient(trainer), exact_gradient(trainer)) < 1e-9


@pytest.mark.parametrize("estimator", ["sampled", "expected"])
@pytest.mark.parametrize("options", [{}, {"teacher_mixed_alpha": 0.3, "importance_weighting": "sequence"}])
def test_temperature_is_that_of_rollouts_rewards_and_single_step_together(tmp_path, estimator: str, options: dict):
    trainer = build_trainer(tmp_path, epsilon=100.0, temperature=0.55, reward_estimator=estimator, **options)
    found = expected_gradient(trainer, options.get("teacher_mixed_alpha", 0.0))
    exact = exact_gradient(trainer)
    assert relative_error(found, exact) < 1e-9
    trainer.temperature = 1.0
    assert relative_error(exact_gradient(trainer), exact) > 0.1


def test_sequence_weights_make_the_gradient_under_mixing_exact(tmp_path):
    trainer = build_trainer(tmp_path, teacher_mixed_alpha=0.2, importance_weighting="sequence")
    assert relative_error(expected_gradient(trainer, 0.2), exact_gradient(trainer)) < 1e-9


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"iw_opd_gamma": 0.5}, 0.353),
        ({"top_entropy_quantile": 0.5}, 0.162),
    ],  # the quantile is of each completion here
)
def test_weights_of_positions_have_their_known_bias(tmp_path, options: dict, error: float):
    trainer = build_trainer(tmp_path, epsilon=100.0, **options)
    assert relative_error(expected_gradient(trainer), exact_gradient(trainer)) == pytest.approx(error, abs=0.001)


# Error of the expected gradient with the long term and another single step, as it is of no single objective
DIVERGENCES = {
    **{"forward_kl": 9.681, "mixed_kl": 4.840, "generalized_jsd": 0.556, "skewed_forward_kl": 0.455},
    **{"skewed_reverse_kl": 0.081, "entropy_aware_kl": 10.501, "trust_region_kl": 5.069},
}


@pytest.mark.parametrize(("name", "error"), DIVERGENCES.items())
def test_another_divergence_has_its_known_error(tmp_path, name: str, error: float):
    trainer = build_trainer(tmp_path, epsilon=100.0, single_step_divergence=name)
    found = relative_error(expected_gradient(trainer), exact_gradient(trainer))
    assert found == pytest.approx(error, abs=0.001)


def test_current_reward_in_the_return_is_told_apart(tmp_path, monkeypatch: pytest.MonkeyPatch):
    trainer = build_trainer(tmp_path, epsilon=100.0)
    monkeypatch.setattr(
        minillm_trl.training.rollout_rewards,
        "reward_to_go",
        lambda *args, **kwargs: reward_to_go(*args, **{**kwargs, "include_current": True}),
    )
    assert relative_error(expected_gradient(trainer), exact_gradient(trainer)) > 1e-3


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(PROBLEM.mask & (PROBLEM.ids != 0), id="end of sequence dropped"),
        pytest.param(torch.ones_like(PROBLEM.mask), id="padding counted"),
    ],
)
def test_wrong_mask_is_told_apart(tmp_path, mask: torch.Tensor):
    trainer = build_trainer(tmp_path, epsilon=100.0)
    assert relative_error(expected_gradient(trainer, mask=mask), exact_gradient(trainer)) > 1e-3


def test_token_ratio_under_mixing_has_its_closed_form(tmp_path):
    """E_mu[sum_t rho_t A_t grad log q + grad KL_t], written out with plain forward passes."""
    alpha = 0.2
    trainer = build_trainer(tmp_path, epsilon=100.0, teacher_mixed_alpha=alpha)
    logps = enumerate_logps(trainer.model)
    with torch.no_grad():
        teacher_logps = enumerate_logps(trainer.teacher_model)
        mu = (alpha * teacher_logps.exp() + (1 - alpha) * logps.exp()).masked_fill(~PROBLEM.mask, 1.0)
        rewards = teacher_logps - logps
        future = rewards.flip(1).cumsum(1).flip(1) - rewards
        weight = mu.prod(dim=1, keepdim=True) * (logps.exp() / mu).masked_fill(~PROBLEM.mask, 0.0)
    ids = torch.cat([torch.tensor([PROMPT]).expand(len(PROBLEM.ids), -1), PROBLEM.ids], dim=1)
    log_q, log_p = (
        torch.log_softmax(model(ids).logits[:, len(PROMPT) - 1 : -1], dim=-1)
        for model in (trainer.model, trainer.teacher_model)
    )
    kl = (log_q.exp() * (log_q - log_p.detach())).sum(-1).masked_fill(~PROBLEM.mask, 0.0)
    expected = gradient((-weight * future * logps).sum() + (mu.prod(1) * kl.sum(1)).sum(), trainer.model)
    assert relative_error(expected_gradient(trainer, alpha), expected) < 1e-9
    assert relative_error(expected, exact_gradient(trainer)) > 0.01  # the known bias of the per-token ratio


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_padding_row_order_and_surplus_columns_change_nothing(tmp_path, family: str, reduction: str):
    options = {"length_normalization": True, "teacher_mixed_alpha": 0.2, "loss_reduction": reduction}
    trainer = build_trainer(tmp_path, family, **options)
    rows = slice(0, 9)
    tolerance = 1e-6 if family == "llama" else 1e-9

    def loss_and_gradient(batch):
        scored = trainer.score_rollouts(*batch)
        loss = trainer.compute_loss(trainer.model, scored)
        return loss.item(), gradient(loss, trainer.model)

    loss, grad = loss_and_gradient(batch_of(rows))
    for changed in (
        batch_of(rows, padding=5),
        batch_of(rows, padding=1, right=4),
        tuple(each.flip(0) for each in batch_of(rows)),
    ):
        changed_loss, changed_grad = loss_and_gradient(changed)
        assert changed_loss == pytest.approx(loss, rel=tolerance)
        assert relative_error(changed_grad, grad) < tolerance


def test_scored_log_probs_equal_an_unpadded_forward_pass(tmp_path):
    trainer = build_trainer(tmp_path, teacher_mixed_alpha=0.0)
    batch = trainer.score_rollouts(*batch_of(slice(0, None), padding=7))
    expected = enumerate_logps(trainer.model)
    torch.testing.assert_close(batch["student_logps"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(batch["old_per_token_logps"], expected, rtol=0, atol=1e-12)


def test_given_behavior_log_probs_are_used(tmp_path):
    trainer = build_trainer(tmp_path, teacher_mixed_alpha=0.2)
    given = torch.full_like(PROBLEM.ids[:4], -1.5, dtype=torch.float64)
    batch = trainer.score_rollouts(*batch_of(slice(0, 4)), behavior_logps=given)
    assert batch["old_per_token_logps"] is not given or not given.requires_grad
    torch.testing.assert_close(batch["old_per_token_logps"], given)


def test_rewards_and_advantages_carry_no_gradient(tmp_path):
    batch = build_trainer(tmp_path).score_rollouts(*batch_of(slice(0, 4)))
    assert not any(tensor.requires_grad for tensor in batch.values())


def test_kd_temperature_changes_rewards_and_single_step_but_not_the_ratio(tmp_path):
    trainer = build_trainer(tmp_path, kd_temperature=3.0, teacher_mixed_alpha=0.2)
    batch = trainer.score_rollouts(*batch_of(slice(0, None)))
    ids = torch.cat([torch.tensor([PROMPT]).expand(len(PROBLEM.ids), -1), PROBLEM.ids], dim=1)
    with torch.no_grad():
        hot = [
            torch.log_softmax(model(ids).logits[:, len(PROMPT) - 1 : -1] / 3.0, dim=-1)
            for model in (trainer.model, trainer.teacher_model)
        ]
        cold = [enumerate_logps(model) for model in (trainer.model, trainer.teacher_model)]
    log_q, log_p = (each.gather(2, PROBLEM.ids[..., None]).squeeze(2) for each in hot)
    rewards = (log_p - log_q).masked_fill(~PROBLEM.mask, 0.0)
    torch.testing.assert_close(batch["advantages"], rewards.flip(1).cumsum(1).flip(1) - rewards)
    expected_behavior = (0.2 * cold[1].exp() + 0.8 * cold[0].exp()).log()
    torch.testing.assert_close(batch["old_per_token_logps"][PROBLEM.mask], expected_behavior[PROBLEM.mask])
    trainer.args.rkl_advantage = False
    loss = trainer.compute_loss(trainer.model, {**batch, "advantages": torch.zeros_like(rewards)})
    kl = (hot[0].exp() * (hot[0] - hot[1])).sum(-1)[PROBLEM.mask].sum() / len(PROBLEM.ids)
    assert loss.item() == pytest.approx(kl.item())


def test_student_equal_to_teacher_gives_zero_loss_and_gradient(tmp_path):
    trainer = build_trainer(tmp_path, teacher_mixed_alpha=0.2)
    trainer.teacher_model.load_state_dict(trainer.model.state_dict())
    batch = trainer.score_rollouts(*batch_of(slice(0, None)))
    loss = trainer.compute_loss(trainer.model, batch)
    assert abs(loss.item()) < 1e-12
    assert gradient(loss, trainer.model).norm() < 1e-10


@pytest.mark.parametrize("options", [{}, {"reward_clip": 5.0}], ids=["plain", "clipped"])
def test_token_impossible_for_the_teacher_is_reported(tmp_path, options: dict):
    trainer = build_trainer(tmp_path, **options)
    never = torch.tensor([0.0, 0.0, -torch.inf]).double()
    trainer._teacher.head = dataclasses.replace(trainer._teacher.head, bias=never)
    with pytest.raises(FloatingPointError, match=r"teacher gives probability zero at token 2 \('b'\)"):
        trainer.score_rollouts(*batch_of(slice(0, None)))


def test_empty_completions_add_nothing(tmp_path):
    trainer = build_trainer(tmp_path, loss_reduction="token_mean", teacher_mixed_alpha=0.2)
    prompt, prompt_mask, ids, mask = batch_of(slice(0, 6))
    loss = trainer.compute_loss(trainer.model, trainer.score_rollouts(prompt, prompt_mask, ids, mask))
    ids, mask = torch.cat([ids, ids[:2]]), torch.cat([mask, torch.zeros_like(mask[:2])])
    prompt, prompt_mask = (torch.cat([each, each[:2]]) for each in (prompt, prompt_mask))
    with_empty = trainer.compute_loss(trainer.model, trainer.score_rollouts(prompt, prompt_mask, ids, mask))
    assert with_empty.item() == pytest.approx(loss.item(), rel=1e-12)
    empty = trainer.score_rollouts(prompt[:2], prompt_mask[:2], ids[:2], torch.zeros_like(mask[:2]))
    nothing = trainer.compute_loss(trainer.model, empty)
    assert nothing.item() == 0.0
    assert gradient(nothing, trainer.model).norm() == 0.0
