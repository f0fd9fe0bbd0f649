"""Claim: the memory of the loss does not grow with the vocabulary.

    python benchmarks/head_memory.py

takes the loss of log-probs and full-vocabulary reverse KL, with its gradient, of 8 x 512 tokens from hidden states of
student and teacher, with heads of 75,968 and 151,936 rows: through the chunked head, and with the full logits of both.
Each case runs in a process of its own and reports its peak resident memory beyond what stands before, which are the
hidden states and the heads' weights, and beyond their gradients. Writes `results/head_memory.json`.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
from measurement import write_record

from minillm_trl.fused_head import ScoreRequest, score_hidden_states
from minillm_trl.lm_head import LMHead
from minillm_trl.objectives import reverse_kl

ROWS, LENGTH, STUDENT_WIDTH, TEACHER_WIDTH = 8, 512, 256, 512
VOCABULARIES = (75_968, 151_936)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loss_of(logps: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
    return 0.3 * logps + divergence


def chunked(hidden, weight, teacher_hidden, teacher_weight, ids, mask) -> torch.Tensor:
    request = ScoreRequest(
        ids, mask, mask, 1.0, teacher_hidden, loss=lambda scores, _: loss_of(scores.logps, scores.divergence)
    )
    heads = LMHead(weight, None), LMHead(teacher_weight, None)
    return score_hidden_states(hidden, heads[0], request, len(weight), heads[1]).loss


def full_logits(hidden, weight, teacher_hidden, teacher_weight, ids, mask) -> torch.Tensor:
    log_probs = torch.log_softmax(hidden @ weight.T, dim=-1)
    with torch.no_grad():
        teacher_log_probs = torch.log_softmax(teacher_hidden @ teacher_weight.T, dim=-1)
    logps = log_probs.gather(2, ids[..., None]).squeeze(2)
    return loss_of(logps, reverse_kl(log_probs, teacher_log_probs)).sum()


METHODS = {"chunked": chunked, "full_logits": full_logits}


def measure(method: str, vocab: int) -> None:
    torch.manual_seed(0)
    # filled in place: a temporary would count as peak memory before the loss, and hide the loss's
    hidden = torch.empty(ROWS, LENGTH, STUDENT_WIDTH).normal_().requires_grad_()
    weight = torch.empty(vocab, STUDENT_WIDTH).normal_(std=0.05).requires_grad_()
    teacher_hidden = torch.empty(ROWS, LENGTH, TEACHER_WIDTH).normal_()
    teacher_weight = torch.empty(vocab, TEACHER_WIDTH).normal_(std=0.05)
    ids, mask = torch.randint(vocab, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.bool)
    before = peak_bytes()
    loss = METHODS[method](hidden, weight, teacher_hidden, teacher_weight, ids, mask)
    loss.backward()
    gradients = sum(each.grad.nbytes for each in (hidden, weight))
    checksum = [loss.item(), hidden.grad.norm().item(), weight.grad.norm().item()]
    print(json.dumps({"bytes": peak_bytes() - before - gradients, "checksum": checksum}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "VOCAB"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], int(arguments.measure[1]))
        return
    results = {}
    for vocab in VOCABULARIES:
        for method in METHODS:
            command = [sys.executable, __file__, "--measure", method, str(vocab)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[f"{method}, {vocab}"] = json.loads(output)
            print(f"{method}, {vocab} rows: {results[f'{method}, {vocab}']['bytes'] / 2**20:.0f} MiB", flush=True)
    small, large = (results[f"chunked, {vocab}"]["bytes"] for vocab in VOCABULARIES)
    full = results[f"full_logits, {VOCABULARIES[1]}"]["bytes"]
    record = {
        "cases": results,
        "growth_when_the_vocabulary_doubles": large / small - 1,
        "share_of_full_logits": large / full,
    }
    settings = {"tokens": [ROWS, LENGTH], "widths": {"student": STUDENT_WIDTH, "teacher": TEACHER_WIDTH}}
    write_record("head_memory", ("torch",), settings, record)
    print(f"vocabulary doubled: {large / small - 1:+.0%}; share of full logits: {large / full:.3f}")


if __name__ == "__main__":
    main()
