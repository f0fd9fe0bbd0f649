"""Claim: the memory of the loss does not grow with the vocabulary.

    python benchmarks/head_memory.py

computes the loss from log-probs and full-vocabulary reverse KL, with its gradient, for 8 x 512 tokens from the hidden
states of student and teacher. The heads have 75,968 and 151,936 rows. It uses the chunked head, and full logits of
both models; in float32, and on a GPU also in mixed precision (the teacher's states and head in half precision, the
student's in autocast). Each case reports its peak memory (allocated on a GPU; resident on a CPU, in a separate
process) without the hidden states, the heads' weights, and their gradients. Writes `results/head_memory.json`.
"""

import argparse
import json
from typing import Any

import torch
from measurement import DEVICE, ON_GPU, bytes_before, in_own_process, peak_bytes, write_record

from minillm_trl.models.fused_head import ScoreRequest, score_hidden_states
from minillm_trl.models.lm_head import LMHead
from minillm_trl.objectives import reverse_kl

ROWS, LENGTH, STUDENT_WIDTH, TEACHER_WIDTH = 8, 512, 256, 512
VOCABULARIES = (75_968, 151_936)
PRECISIONS = ("float32", "float16", "bfloat16") if ON_GPU else ("float32",)


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


def measure(precision: str, method: str, vocab: int) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = getattr(torch, precision)
    with torch.device(DEVICE):
        # filled in place: a temporary would count as peak memory before the loss, and hide the loss's
        hidden = torch.empty(ROWS, LENGTH, STUDENT_WIDTH).normal_().requires_grad_()
        weight = torch.empty(vocab, STUDENT_WIDTH).normal_(std=0.05).requires_grad_()
        teacher_hidden = torch.empty(ROWS, LENGTH, TEACHER_WIDTH, dtype=dtype).normal_()
        teacher_weight = torch.empty(vocab, TEACHER_WIDTH, dtype=dtype).normal_(std=0.05)
        ids, mask = torch.randint(vocab, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.bool)
    before = bytes_before()
    with torch.autocast(DEVICE.type, dtype, enabled=precision != "float32"):
        loss = METHODS[method](hidden, weight, teacher_hidden, teacher_weight, ids, mask)
    loss.backward()
    gradients = sum(tensor.grad.nbytes for tensor in (hidden, weight))
    checksum = [loss.item(), hidden.grad.norm().item(), weight.grad.norm().item()]
    return {"bytes": peak_bytes() - before - gradients, "checksum": checksum}


def compare(precision: str) -> dict[str, Any]:
    """Measure all cases in one precision, and return their verdict on the claim."""
    cases = {}
    for vocab in VOCABULARIES:
        for method in METHODS:
            cases[f"{method}, {vocab}"] = case = in_own_process(measure, precision, method, vocab)
            print(f"{precision}, {method}, {vocab} rows: {case['bytes'] / 2**20:.0f} MiB", flush=True)
    small, large = (cases[f"chunked, {vocab}"]["bytes"] for vocab in VOCABULARIES)
    share = large / cases[f"full_logits, {VOCABULARIES[1]}"]["bytes"]
    print(f"vocabulary doubled: {large / small - 1:+.0%}; share of full logits: {share:.3f}")
    return {"cases": cases, "growth_when_the_vocabulary_doubles": large / small - 1, "share_of_full_logits": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=3, metavar=("PRECISION", "METHOD", "VOCAB"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        precision, method, vocab = arguments.measure
        print(json.dumps(measure(precision, method, int(vocab))))
        return
    results = {precision: compare(precision) for precision in PRECISIONS}
    settings = {"tokens": [ROWS, LENGTH], "widths": {"student": STUDENT_WIDTH, "teacher": TEACHER_WIDTH}}
    write_record("head_memory", ("torch",), settings, results)


if __name__ == "__main__":
    main()
