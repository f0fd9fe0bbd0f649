"""Question: when does speculative mixing beat coins, shared or of each row?

    python benchmarks/speculative.py [--teachers gpt2-medium gpt2-large gpt2-xl] [--batch_sizes 1 8] [--repeats 3]
    python benchmarks/speculative.py --small --repeats 5

samples with alpha = 0.2 from GPT-2 shapes with random weights, whose teachers are about 2, 6 and 12 times the student
(`--small`: 7M to 84M parameters, which take minutes on a CPU). The ways of mixing alternate in one process, so that a
busy machine slows all of them; results are ratios within a round. No completion ends early, and hidden states are
kept, as in a rollout. How often the teacher keeps a draft depends on how far the student is from it, which random
weights do not tell. So the verdicts are set: each of the shares in `--kept` is measured. The models still compute all
that a verdict needs. The calls of each model a token are counted as well; they do not depend on the machine. On a CPU,
times are CPU-seconds of one thread. `mixing: auto` then measures shared coins and speculation as a run does at its
first rollout; `auto_over_shared_coins` is the time of its choice over that of shared coins.
Writes `results/speculative.json` (`results/speculative_small.json`).
"""

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from measurement import DEVICE, DTYPE, SHAPES, alternate, build, cpu_clock, parameter_ratio, percentiles, write_record
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import minillm_trl.rollouts.speculative as speculative
from minillm_trl.models.lm_head import LMHead
from minillm_trl.rollouts.rollout_sampler import RolloutSampler
from minillm_trl.rollouts.rollout_teacher import RolloutTeacher
from minillm_trl.rollouts.sampling import sample_prompts
from minillm_trl.rollouts.scores import RolloutScorer
from minillm_trl.training.mixing_choice import measure_mixing

ALPHA, PROMPT = 0.2, 32
SMALL = {
    "student": {"n_embd": 256, "n_layer": 6, "n_head": 4},
    "2x": {"n_embd": 384, "n_layer": 6, "n_head": 6},
    "6x": {"n_embd": 512, "n_layer": 12, "n_head": 8},
    "12x": {"n_embd": 640, "n_layer": 16, "n_head": 10},
}
WAYS: dict[str, dict[str, Any]] = {
    "speculative": {"mixing": "speculative"},
    "shared_coins": {"shared_coins": True},
    "own_coins": {"shared_coins": False},
}


def build_small(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=8192, **SMALL[name])).to(DEVICE, DTYPE).eval()


def keep_share(share: float) -> None:
    """Let verdicts keep this share of the drafts."""
    judge = speculative.judge_drafts

    def judge_as_set(teacher_logits, student_logits, drafts, verdicts, replacements, temperature):
        _, tokens = judge(teacher_logits, student_logits, drafts, verdicts, replacements, temperature)
        return verdicts < share, tokens

    speculative.judge_drafts = judge_as_set


def choose(student: PreTrainedModel, teacher: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> str:
    """Return the way of mixing that `mixing: auto` chooses at the first rollout."""
    of_rollouts = RolloutTeacher(teacher, LMHead.of(teacher).frozen(DEVICE), Accelerator(), len(prompts), "device")
    scorer = RolloutScorer(1.0, 1.0, student.config.vocab_size)
    seconds = measure_mixing(RolloutSampler(of_rollouts, scorer, ALPHA, [], 0), student, prompts, new_tokens)
    return min(seconds, key=lambda name: seconds[name])


def measure(
    student: PreTrainedModel, teacher: PreTrainedModel, batch_size: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(8192, (batch_size, PROMPT), generator=generator).tolist()
    calls: dict[str, list[int]] = {"student": [], "teacher": []}
    hooks = [
        model.base_model.register_forward_pre_hook(lambda *_, name=name: calls[name].append(1))
        for name, model in (("student", student), ("teacher", teacher))
    ]

    def sample(name: str) -> None:
        sample_prompts(
            student,
            prompts,
            keys=[(0, row) for row in range(batch_size)],
            coin_key=(1,),
            max_new_tokens=new_tokens,
            eos_token_ids=[],
            pad_token_id=0,
            teacher=teacher,
            alpha=ALPHA,
            keep_states=True,
            **WAYS[name],
        )

    counts = {}
    for name in WAYS:
        for model in calls:
            calls[model].clear()
        sample(name)
        counts[name] = {model: len(found) / new_tokens for model, found in calls.items()}
    for hook in hooks:
        hook.remove()
    rounds = alternate({name: lambda name=name: sample(name) for name in WAYS}, repeats, cpu_clock())
    speedups = {
        f"speedup_over_{name}": percentiles([times[name] / times["speculative"] for times in rounds])
        for name in WAYS
        if name != "speculative"
    }
    choice = choose(student, teacher, prompts, new_tokens)
    chosen = "shared_coins" if choice == "coins" else choice
    loss = percentiles([times[chosen] / times["shared_coins"] for times in rounds])
    return {
        "batch_size": batch_size,
        **speedups,
        "auto": choice,
        "auto_over_shared_coins": loss,
        "calls_per_step": counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=SHAPES, default="gpt2")
    parser.add_argument("--teachers", choices=SHAPES, nargs="+", default=["gpt2-medium", "gpt2-large", "gpt2-xl"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    names = list(SMALL)[1:] if arguments.small else arguments.teachers
    student = build_small("student") if arguments.small else build(arguments.student)
    judge, results = speculative.judge_drafts, []
    record = "speculative_small" if arguments.small else "speculative"
    settings = {
        "alpha": ALPHA,
        "prompt_tokens": PROMPT,
        "new_tokens": arguments.new_tokens,
        "repeats": arguments.repeats,
        "dtype": str(DTYPE),
        "seeds": {"weights": 0, "prompts": 0, "tokens": 0, "coins": 1},
    }
    for name in names:
        teacher = build_small(name) if arguments.small else build(name)
        for kept in arguments.kept:
            speculative.judge_drafts = judge
            keep_share(kept)
            for batch_size in arguments.batch_sizes:
                result = measure(student, teacher, batch_size, arguments.new_tokens, arguments.repeats)
                ratio = parameter_ratio(teacher, student)
                results.append({"teacher": name, "parameter_ratio": ratio, "kept": kept, **result})
                write_record(record, ("torch", "transformers"), settings, results)  # each as it comes
                shared, own = (result[f"speedup_over_{way}"][1] for way in ("shared_coins", "own_coins"))
                print(
                    f"{name} ({ratio:.1f}x), {kept:.0%} kept, batch {batch_size}: {shared:.2f}x as fast as shared "
                    f"coins, {own:.2f}x as coins of each row; auto: {result['auto']}",
                    flush=True,
                )
        del teacher


if __name__ == "__main__":
    main()
