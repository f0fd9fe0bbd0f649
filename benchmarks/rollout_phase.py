"""Claim: a rollout phase is one generation with its cached states, not two generations and six scoring passes.

    python benchmarks/rollout_phase.py [--teachers gpt2-large gpt2-xl] [--repeats 2]

generates and scores 8 rollouts with alpha = 0.2 from GPT-2 shapes with random weights. Ours is teacher-mixed sampling,
with log-probs from the cached hidden states of both models. It is compared with the schedule of the authors' code,
rebuilt from its description: a generation that mixes both distributions at every step, a second one of the student
alone (for its logs), and three passes of either model with full logits. Both have the same short padding; the authors'
code pads prompts and responses to 256 tokens each. No completion ends early. The measurements alternate; results are
ratios within a round. Writes `results/rollout_phase.json`.
"""

import torch
from measurement import DEVICE, DTYPE, alternate, build, parameter_ratio, size_arguments, speedup_over, write_record
from sampling import ALPHA, mean_coins, mix_every_step
from transformers import PreTrainedModel

from minillm_trl.models.lm_head import LMHead
from minillm_trl.rollouts.sampling import sample_completions
from minillm_trl.rollouts.scores import HeadStates, RolloutScorer, RolloutScores

BATCH, PROMPT, TOKENS = 8, 64, 64


@torch.no_grad()
def full_logits_pass(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    log_probs = model(input_ids=ids, use_cache=False).logits[:, -TOKENS - 1 : -1].float().log_softmax(dim=-1)
    return log_probs.gather(2, ids[:, -TOKENS:, None]).squeeze(2)


def original_schedule(student: PreTrainedModel, teacher: PreTrainedModel, prompts, uniforms) -> list[torch.Tensor]:
    ids = mix_every_step(student, teacher, prompts, uniforms)
    mask = torch.ones_like(prompts)
    alone = {"max_new_tokens": TOKENS, "eos_token_ids": [], "pad_token_id": 0, "uniforms": uniforms}
    sample_completions(student, prompts, mask, **alone)
    return [full_logits_pass(model, ids) for model in (student, teacher) for _ in range(3)]


def ours(student: PreTrainedModel, teacher: PreTrainedModel, prompts, uniforms) -> RolloutScores:
    sampled = sample_completions(
        student,
        prompts,
        torch.ones_like(prompts),
        max_new_tokens=TOKENS,
        eos_token_ids=[],
        pad_token_id=0,
        uniforms=uniforms,
        teacher=teacher,
        teacher_coins=mean_coins(TOKENS),
        keep_states=True,
    )
    states = zip(sampled[2:], (student, teacher), strict=True)
    both = (HeadStates(hidden_states, LMHead.of(model)) for hidden_states, model in states)
    return RolloutScorer(1.0, 1.0, 50257).score(sampled.ids, sampled.mask, *both)


def main() -> None:
    arguments = size_arguments(__doc__)
    student = build(arguments.student)
    prompts = torch.randint(50257, (BATCH, PROMPT), device=DEVICE)
    uniforms = torch.rand(BATCH, TOKENS, dtype=torch.float64, device=DEVICE)
    results = []
    for name in arguments.teachers:
        teacher = build(name)
        schedules = {
            "ours": lambda teacher=teacher: ours(student, teacher, prompts, uniforms),
            "original": lambda teacher=teacher: original_schedule(student, teacher, prompts, uniforms),
        }
        rounds = alternate(schedules, arguments.repeats)
        ratio = parameter_ratio(teacher, student)
        results.append(speedup_over(rounds, "original", arguments.student, name, ratio))
        del teacher, schedules
    settings = {
        "alpha": ALPHA,
        "batch_size": BATCH,
        "prompt_tokens": PROMPT,
        "new_tokens": TOKENS,
        "dtype": str(DTYPE),
    }
    write_record("rollout_phase", ("torch", "transformers"), settings, results)


if __name__ == "__main__":
    main()
