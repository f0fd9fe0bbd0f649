"""Question: how much of the reverse KL and of its gradient does the single step keep with a teacher's top k?

    python benchmarks/top_k_bias.py --teacher FOLDER --students FOLDER [FOLDER ...] --dataset FILE

Each student samples completions at temperature 1. At each token, the reverse KL over the whole vocabulary is compared
with the KL that treats all but k tokens and the sampled one as a single token: of the teacher's k most likely tokens
(what `teacher_server_top_k` does) and of the student's (an alternative that needs another request). `kept` is the
ratio of the sums over tokens, `gradient_error` the norm of the difference of the gradients with respect to the
logits, relative to the norm of the gradient over the whole vocabulary.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from measurement import write_record
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from minillm_trl.data import load_examples
from minillm_trl.models.encoding import encode_prompts
from minillm_trl.models.lm_head import LMHead, completion_hidden_states
from minillm_trl.rollouts.sampling import left_pad, sample_completions
from minillm_trl.teacher_server.top_k import TopK, complete

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


def listed(source: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, k: int) -> TopK:
    """Return the teacher's log-probs of the k most likely tokens of `source` and of the targets, and of the rest."""
    log_p = teacher_logits.log_softmax(-1)
    ids = torch.cat([source.topk(k, dim=-1).indices, targets[:, None]], dim=-1)
    return TopK(ids, log_p.gather(1, ids), log_p.scatter(1, ids, -torch.inf).logsumexp(-1))


def measure(student: PreTrainedModel, teacher: PreTrainedModel, tokenizer, prompts: list[list[int]], tokens: int):
    """Return, for each k and each source of the list, the kept share and the error of the gradient."""
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
    whole_ids, whole_mask = torch.cat([ids, sampled.ids], 1), torch.cat([mask, sampled.mask], 1)
    real = sampled.mask.bool()
    targets = sampled.ids[real]
    hidden = [states_of(model, whole_ids, whole_mask, real.shape[1])[real] for model in (student, teacher)]
    heads = [LMHead.of(student), LMHead.of(teacher)]
    size = min(head.weight.shape[0] for head in heads)
    full_kl, full_norm = 0.0, 0.0
    sums = {(source, k): [0.0, 0.0] for source in ("teacher", "student") for k in SIZES}
    with torch.no_grad():
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            q, p = (head.logits(states[part], size) for head, states in zip(heads, hidden, strict=True))
            kl, gradient = kl_and_gradient(q, p)
            full_kl, full_norm = full_kl + float(kl.sum()), full_norm + float(gradient.square().sum())
            for (source, k), total in sums.items():
                top = listed(p if source == "teacher" else q, p, targets[part], k)
                part_kl, part_gradient = kl_and_gradient(q, complete(top, q, 1.0))
                total[0] += float(part_kl.sum())
                total[1] += float((part_gradient - gradient).square().sum())
    return {
        "tokens": len(targets),
        "reverse_kl_per_token": full_kl / len(targets),
        "top_k_of": {
            source: {
                k: {"kept": sums[source, k][0] / full_kl, "gradient_error": (sums[source, k][1] / full_norm) ** 0.5}
                for k in SIZES
            }
            for source in ("teacher", "student")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--students", nargs="+", required=True)
    parser.add_argument("--names", nargs="+", required=True, help="a name for each student in the results")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = load_examples(arguments.dataset, split="train", max_rows=arguments.rows)["prompt"]
    prompts = encode_prompts(tokenizer, texts)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32).eval()
    results = {}
    for name, folder in zip(arguments.names, arguments.students, strict=True):
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        results[name] = measure(student, teacher, tokenizer, prompts, arguments.max_new_tokens)
        print(name, results[name], flush=True)
    write_record(
        "top_k_bias",
        ["torch", "transformers"],
        {"rows": arguments.rows, "max_new_tokens": arguments.max_new_tokens, "dataset": Path(arguments.dataset).name},
        results,
        command="python benchmarks/top_k_bias.py --teacher TEACHER --students FOLDERS --names NAMES --dataset DATA",
    )


if __name__ == "__main__":
    main()
