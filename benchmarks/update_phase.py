"""Claim: inner passes need neither the teacher nor full logits.

    python benchmarks/update_phase.py [--teachers gpt2-large gpt2-xl] [--repeats 2]

computes the gradient of the same loss (clipped long term and single step) four times over a scored batch of 8
rollouts, for GPT-2 shapes with random weights. Ours uses cached hidden states of the teacher, heads in chunks, and
computes the gradient of the student's head in the forward pass. It is compared with a teacher forward in each pass and
full logits of both models. The benchmark first checks that losses and gradients agree. The measurements alternate;
results are ratios within a round. Writes `results/update_phase.json`.
"""

from functools import partial

import torch
from measurement import DEVICE, DTYPE, alternate, build, parameter_ratio, size_arguments, speedup_over, write_record
from transformers import PreTrainedModel

from minillm_trl.models.fused_head import ScoreRequest, TokenScores, add_scoring
from minillm_trl.models.lm_head import LMHead, completion_hidden_states
from minillm_trl.objectives import clipped_policy_gradient_loss, reverse_kl

BATCH, PROMPT, TOKENS, PASSES, VOCAB = 8, 64, 64, 4, 50257


def token_loss(scores: TokenScores, old_logps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(advantages, dtype=torch.bool)
    return clipped_policy_gradient_loss(scores.logps, old_logps, advantages, mask, epsilon=0.2) + scores.divergence


def ours(student: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    old_logps, advantages = batch["old_logps"].flatten(), batch["advantages"].flatten()
    request = ScoreRequest(
        batch["ids"],
        torch.ones_like(batch["ids"]),
        torch.ones_like(advantages, dtype=torch.bool).view(BATCH, TOKENS),
        teacher_hidden_states=batch["teacher_hidden_states"],
        loss=lambda scores, rows: token_loss(scores, old_logps[rows], advantages[rows]),
    )
    (scores,) = student(score_requests=[request])
    return scores.loss / (BATCH * TOKENS)


def full_logits(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    completions = slice(-TOKENS - 1, -1)
    with torch.no_grad():
        teacher_logits = teacher(input_ids=batch["ids"], use_cache=False).logits[:, completions]
        teacher_log_probs = teacher_logits.float().log_softmax(dim=-1)
    log_probs = student(input_ids=batch["ids"], use_cache=False).logits[:, completions].float().log_softmax(dim=-1)
    logps = log_probs.gather(2, batch["ids"][:, -TOKENS:, None]).squeeze(2)
    scores = TokenScores(logps, logps.detach(), reverse_kl(log_probs, teacher_log_probs))
    return token_loss(scores, batch["old_logps"], batch["advantages"]).mean()


def passes(loss, student: PreTrainedModel, number: int = PASSES) -> None:
    for _ in range(number):
        student.zero_grad()
        loss().backward()


def check_agreement(losses, student: PreTrainedModel) -> None:
    found = []
    for loss in losses:
        passes(loss, student, 1)
        found.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters()]))
    error = ((found[0] - found[1]).norm() / found[1].norm()).item()
    if not error <= (0.1 if DEVICE.type == "cuda" else 1e-3):
        raise RuntimeError(f"the gradients differ by {error:.2g} of their size")


def main() -> None:
    arguments = size_arguments(__doc__)
    results = []
    for name in arguments.teachers:
        student, teacher = build(arguments.student), build(name)
        add_scoring(student, VOCAB, LMHead.of(teacher))
        ids = torch.randint(VOCAB, (BATCH, PROMPT + TOKENS), device=DEVICE)
        with torch.no_grad():
            states = completion_hidden_states(teacher, ids, torch.ones_like(ids), TOKENS)
        batch = {
            "ids": ids,
            "teacher_hidden_states": states,
            "old_logps": torch.full((BATCH, TOKENS), -10.0, device=DEVICE),
            "advantages": torch.randn(BATCH, TOKENS, device=DEVICE),
        }
        losses = partial(ours, student, batch), partial(full_logits, student, teacher, batch)
        check_agreement(losses, student)
        methods = {
            name: partial(passes, loss, student) for name, loss in zip(("ours", "full_logits"), losses, strict=True)
        }
        rounds = alternate(methods, arguments.repeats)
        ratio = parameter_ratio(teacher, student)
        results.append(speedup_over(rounds, "full_logits", arguments.student, name, ratio))
        del student, teacher, losses, methods
    settings = {
        "passes": PASSES,
        "batch_size": BATCH,
        "prompt_tokens": PROMPT,
        "new_tokens": TOKENS,
        "dtype": str(DTYPE),
    }
    write_record("update_phase", ("torch", "transformers"), settings, results)


if __name__ == "__main__":
    main()
