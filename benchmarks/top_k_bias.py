"""Question: how much of the reverse KL and of its gradient does the single step keep with a list of k tokens?

    python benchmarks/top_k_bias.py --teacher FOLDER --students FOLDER [FOLDER ...] --dataset FILE

Each student samples completions at temperature 1. At each token, the reverse KL over the whole vocabulary is compared
with the KL that treats all but k tokens and the sampled one as a single token: of the teacher's k most likely tokens
and of the student's (`teacher_server_tokens`). `kept` is the ratio of the sums over tokens, `gradient_error` the norm
of the difference of the gradients with respect to the logits, relative to the norm of the gradient over the whole
vocabulary.

The student's list is made when the rollout is scored, and stays in the passes over the buffer. So the student is then
trained by the exact single step on these completions (`--updates`, AdamW at `--learning_rate`), and everything is
measured again at the trained student: with its own tokens, and with those of the student that sampled (`rollout's
student`). `moved` is the KL between the two students.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measurement import write_record
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from minillm_trl.data import load_examples
from minillm_trl.models.encoding import encode_prompts
from minillm_trl.models.lm_head import LMHead, completion_hidden_states
from minillm_trl.rollouts.sampling import left_pad, sample_completions
from minillm_trl.teacher_server.top_k import complete, listed_log_probs, most_likely_tokens

SIZES = (1, 4, 16, 64, 256, 1024)
CHUNK = 128  # tokens whose logits exist at a time


@torch.no_grad()
def states_of(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """Return the hidden states that predict the completions, `(B, T, H)`."""
    return completion_hidden_states(model, ids, mask, length)


def kl_and_gradient(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(q || p) `(n,)` and its gradient with respect to the student's logits `(n, V)`."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    q, ratio = log_q.exp(), log_q - log_p
    kl = (q * ratio).sum(-1)
    return kl, q * (ratio - kl[:, None])


def sample(student: PreTrainedModel, tokenizer, prompts: list[list[int]], tokens: int) -> tuple[torch.Tensor, ...]:
    """Return ids and mask of whole sequences `(B, P+T)`, and the mask of the sampled tokens `(B, T)`."""
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    sampled = sample_completions(
        student,
        ids,
        mask,
        max_new_tokens=tokens,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        uniforms=torch.from_numpy(np.random.default_rng(0).random((len(prompts), tokens))),
    )
    return torch.cat([ids, sampled.ids], 1), torch.cat([mask, sampled.mask], 1), sampled.mask.bool()


def measure(
    student_states: torch.Tensor,
    teacher_states: torch.Tensor,
    heads: tuple[LMHead, LMHead],
    targets: torch.Tensor,
    rollout_states: torch.Tensor | None = None,
    rollout_head: LMHead | None = None,
) -> dict:
    """Return, for each k and each source of the list, the kept share and the error of the gradient.

    The third source of lists, if given, is the student that sampled the rollout.
    """
    size = min(head.weight.shape[0] for head in heads)
    sources = ["teacher", "student"] + (["rollout's student"] if rollout_head is not None else [])
    full_kl, full_norm, moved = 0.0, 0.0, 0.0
    sums = {(source, k): [0.0, 0.0] for source in sources for k in SIZES}
    with torch.no_grad():
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            q, p = (
                head.logits(states[part], size)
                for head, states in zip(heads, (student_states, teacher_states), strict=True)
            )
            likely = {"teacher": p, "student": q}
            if rollout_head is not None and rollout_states is not None:
                likely["rollout's student"] = rollout_head.logits(rollout_states[part], size)
                moved += float(kl_and_gradient(q, likely["rollout's student"])[0].sum())
            kl, gradient = kl_and_gradient(q, p)
            full_kl, full_norm = full_kl + float(kl.sum()), full_norm + float(gradient.square().sum())
            for (source, k), total in sums.items():
                top = listed_log_probs(p, most_likely_tokens(likely[source], k), targets[part], 1.0)
                part_kl, part_gradient = kl_and_gradient(q, complete(top, q, 1.0))
                total[0] += float(part_kl.sum())
                total[1] += float((part_gradient - gradient).square().sum())
    found = {
        "tokens": len(targets),
        "reverse_kl_per_token": full_kl / len(targets),
        "top_k_of": {
            source: {
                k: {"kept": sums[source, k][0] / full_kl, "gradient_error": (sums[source, k][1] / full_norm) ** 0.5}
                for k in SIZES
            }
            for source in sources
        },
    }
    return found if rollout_head is None else found | {"moved": moved / len(targets)}


def train(
    student: PreTrainedModel,
    sequences: tuple[torch.Tensor, ...],
    teacher_states: torch.Tensor,
    teacher_head: LMHead,
    updates: int,
    learning_rate: float,
) -> None:
    """Train the student by the exact reverse KL of its tokens, with AdamW."""
    ids, mask, real = sequences
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    size = min(teacher_head.weight.shape[0], LMHead.of(student).weight.shape[0])
    for _ in range(updates):
        states = completion_hidden_states(student, ids, mask, real.shape[1])[real]
        for start in range(0, len(states), CHUNK):
            part = slice(start, start + CHUNK)
            log_q = LMHead.of(student).logits(states[part], size).log_softmax(-1)
            with torch.no_grad():
                log_p = teacher_head.logits(teacher_states[part], size).log_softmax(-1)
            loss = (log_q.exp() * (log_q - log_p)).sum() / len(states)
            loss.backward(retain_graph=start + CHUNK < len(states))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def compare(teacher: PreTrainedModel, student: PreTrainedModel, tokenizer, prompts, arguments) -> dict:
    """Return the measures of a student before and after updates on its samples."""
    sequences = sample(student, tokenizer, prompts, arguments.max_new_tokens)
    ids, mask, real = sequences
    targets = ids[:, -real.shape[1] :][real]
    before, of_teacher = (states_of(model, ids, mask, real.shape[1])[real] for model in (student, teacher))
    teacher_head, head = LMHead.of(teacher), LMHead.of(student)
    rollout_head = replace(head, weight=head.weight.detach().clone())
    found = measure(before, of_teacher, (rollout_head, teacher_head), targets)
    if arguments.updates:
        train(student, sequences, of_teacher, teacher_head, arguments.updates, arguments.learning_rate)
        after = states_of(student, ids, mask, real.shape[1])[real]
        heads = (LMHead.of(student), teacher_head)
        found["after_updates"] = measure(after, of_teacher, heads, targets, before, rollout_head)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--students", nargs="+", required=True)
    parser.add_argument("--names", nargs="+", required=True, help="a name for each student in the results")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--updates", type=int, default=4, help="updates on the samples; 0 for none")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = load_examples(arguments.dataset, split="train", max_rows=arguments.rows)["prompt"]
    prompts = encode_prompts(tokenizer, texts)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32).eval()
    results = {}
    for name, folder in zip(arguments.names, arguments.students, strict=True):
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        results[name] = compare(teacher, student, tokenizer, prompts, arguments)
        print(name, results[name], flush=True)
    write_record(
        "top_k_bias",
        ["torch", "transformers"],
        {
            "rows": arguments.rows,
            "max_new_tokens": arguments.max_new_tokens,
            "dataset": Path(arguments.dataset).name,
            "updates": arguments.updates,
            "learning_rate": arguments.learning_rate,
        },
        results,
        command="python benchmarks/top_k_bias.py --teacher TEACHER --students FOLDERS --names NAMES --dataset DATA",
    )


if __name__ == "__main__":
    main()
