"""Compare decoding and updates with the limits of the GPU: memory bandwidth, and the rate of matrix products.

    python benchmarks/hardware_limits.py [--repeats 5]

first measures both limits of the card, with a copy of 4 GiB (bytes read and written) and a product of bf16 matrices.

Decoding: samples 64 tokens after a prompt of 64 from a student alone. Its weights are in float32 under autocast, in a
half-precision copy (`half_precision_rollouts`), or in this copy with compiled steps (`compile_rollouts`). The time per
token covers all steps after the first, and is compared with the time to read the weights once in half precision. The
methods alternate; speed-ups are ratios within a round.

New shapes: the first rollout of a batch size and a second one, with cuDNN's attention, and without it as in the
trainers.

Updates: loss and gradient of 16 rows of 256 prompt and 256 completion tokens in bf16 autocast, with cached hidden
states of the teacher. Operations are counted for matrix products and attention, including those repeated by gradient
checkpointing, and divided by time and rate. GPT-2 shapes with random weights. Writes
`results/gpu/hardware_limits.json`; without a GPU, `--try_out` runs tiny shapes and writes nothing.
"""

import argparse
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from measurement import DEVICE, ON_GPU, SHAPES, alternate, build, percentiles, seconds, write_record
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from minillm_trl.models.fused_head import ScoreRequest, add_scoring
from minillm_trl.models.lm_head import LMHead
from minillm_trl.models.student_copy import RolloutCopy
from minillm_trl.rollouts.compiled_steps import CompiledDecoding
from minillm_trl.rollouts.sampling import sample_completions

PROMPT, TOKENS, VOCAB = 64, 64, 50257
ROWS, LENGTH = 16, 512
DECODING = {"gpt2": (8, 64), "gpt2-large": (8,)}
UPDATES = ("gpt2", "gpt2-large")
TEACHER_WIDTH = 1600


def limits(size: int) -> dict[str, float]:
    """Measure the peak bytes and operations per second, with a copy and a matrix product; medians of ten."""
    source = torch.randn(size**2, device=DEVICE)
    target = torch.empty_like(source)
    moved = median(seconds(lambda: target.copy_(source)) for _ in range(11))
    a, b = (torch.randn(size // 4, size // 4, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    multiplied = median(seconds(lambda: a @ b) for _ in range(10))
    return {
        "bytes_per_second": 2 * source.nbytes / moved,
        "bf16_operations_per_second": 2 * (size // 4) ** 3 / multiplied,
    }


def decoding(name: str, batch_size: int, repeats: int, backends: tuple[str, ...], bandwidth: float) -> dict[str, Any]:
    """Measure the time per token of each decoding method."""
    student = build(name, torch.float32)
    half = torch.float16 if ON_GPU else torch.bfloat16
    copied = RolloutCopy(student, half).model
    weight_bytes = sum(parameter.nbytes for parameter in copied.parameters())
    prompts = torch.randint(VOCAB, (batch_size, PROMPT), device=DEVICE)
    uniforms = torch.rand(batch_size, TOKENS, dtype=torch.float64, device=DEVICE)

    def sample(model: PreTrainedModel, tokens: int, compiled: CompiledDecoding | None = None) -> None:
        with torch.autocast(DEVICE.type, half, enabled=model is student):
            sample_completions(
                model,
                prompts,
                torch.ones_like(prompts),
                max_new_tokens=tokens,
                eos_token_ids=[],
                pad_token_id=0,
                uniforms=uniforms[:, :tokens],
                keep_states=True,
                compiled=compiled,
            )

    ways = {"float32 weights, autocast": (student, None), "half-precision copy": (copied, None)}
    ways |= {f"half-precision copy, {backend}": (copied, CompiledDecoding(copied, backend)) for backend in backends}
    for model, compiled in ways.values():  # compiled code runs once, is recorded, and is then replayed
        for _ in range(2):
            sample(model, 4, compiled)
    rounds = alternate(
        {
            f"{way}, {tokens}": lambda model=model, compiled=compiled, tokens=tokens: sample(model, tokens, compiled)
            for way, (model, compiled) in ways.items()
            for tokens in (1, TOKENS)
        },
        repeats,
    )
    per_token = {
        way: [(seconds[f"{way}, {TOKENS}"] - seconds[f"{way}, 1"]) / (TOKENS - 1) for seconds in rounds]
        for way in ways
    }
    baseline = per_token["half-precision copy"]
    return {
        way: {
            "seconds_per_step": percentiles(times),
            "tokens_per_second": batch_size / median(times),
            "speedup_over_half_precision": percentiles(
                [plain / own for plain, own in zip(baseline, times, strict=True)]
            ),
            "time_over_reading_the_weights": percentiles([own / (weight_bytes / bandwidth) for own in times]),
        }
        for way, times in per_token.items()
    }


def first_rollouts(name: str, cudnn: bool, batch_size: int) -> list[float]:
    """Measure the first and the second rollout of a shape, with and without cuDNN's attention, in seconds."""
    student = build(name, torch.bfloat16)
    prompts = torch.randint(VOCAB, (batch_size, PROMPT), device=DEVICE)
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    uniforms = torch.rand(batch_size, TOKENS, dtype=torch.float64, device=DEVICE)
    options = {"max_new_tokens": TOKENS, "eos_token_ids": [], "pad_token_id": 0, "uniforms": uniforms}
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    sample = sample_completions.__wrapped__ if cudnn else sample_completions  # which turns it off
    times = [seconds(lambda: sample(student, prompts, mask, **options)) for _ in range(2)]
    torch.backends.cuda.enable_cudnn_sdp(False)
    return times


def update(name: str, repeats: int, checkpointing: bool, rate: float) -> dict[str, Any]:
    """Measure the time of a micro-batch, and its share of the rate of matrix products."""
    student = build(name, torch.float32).train()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    head = torch.randn(VOCAB, TEACHER_WIDTH, dtype=torch.bfloat16, device=DEVICE).mul_(0.02)
    add_scoring(student, VOCAB, LMHead(head, None))
    ids = torch.randint(VOCAB, (ROWS, LENGTH), device=DEVICE)
    mask = torch.ones(ROWS, LENGTH // 2, dtype=torch.bool, device=DEVICE)
    states = torch.randn(ROWS, LENGTH // 2, TEACHER_WIDTH, dtype=torch.bfloat16, device=DEVICE)
    request = ScoreRequest(
        ids,
        torch.ones_like(ids),
        mask,
        teacher_hidden_states=states,
        loss=lambda scores, _: 0.3 * scores.logps + scores.divergence,
    )

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            (scores,) = student(score_requests=[request])
        scores.loss.backward()

    with FlopCounterMode(display=False) as counter:
        step()
    times = [seconds(step) for _ in range(repeats + 1)][1:]
    operations = counter.get_total_flops()
    return {
        "seconds": percentiles(times),
        "operations": operations,
        "share_of_matrix_product_rate": percentiles([operations / seconds / rate for seconds in times]),
    }


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    tiny, repeats = arguments.try_out, arguments.repeats
    found = limits(256 if tiny else 32768)
    yield "limits", found
    name = "tiny" if tiny else "gpt2"
    first_rollouts(name, False, 2)  # warms up
    for cudnn, batch_size in ((False, 9), (True, 11)):
        first, again = first_rollouts(name, cudnn, batch_size)
        yield "new_shapes", {"student": name, "cudnn_attention": cudnn, "first_seconds": first, "again_seconds": again}
    backends = ("eager",) if tiny else ("cudagraphs", "inductor")
    for name, batch_sizes in {"tiny": (2,)}.items() if tiny else DECODING.items():
        for batch_size in batch_sizes:
            result = decoding(name, batch_size, repeats, backends, found["bytes_per_second"])
            yield "decoding", {"student": name, "batch_size": batch_size, "ways": result}
    for name in ("tiny",) if tiny else UPDATES:
        for checkpointing in (False, True):
            result = update(name, repeats, checkpointing, found["bf16_operations_per_second"])
            yield "updates", {"student": name, "gradient_checkpointing": checkpointing, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--try_out", action="store_true", help="tiny shapes, and no record")
    arguments = parser.parse_args()
    if not (ON_GPU or arguments.try_out):
        parser.error("there is no GPU to measure: --try_out runs tiny shapes without one")
    results: dict[str, Any] = {"new_shapes": [], "decoding": [], "updates": []}
    settings = {
        "decoding": {"prompt_tokens": PROMPT, "new_tokens": TOKENS, "dtype": "float16"},
        "updates": {"rows": ROWS, "tokens": LENGTH, "completion_tokens": LENGTH // 2, "dtype": "bfloat16"},
        "shapes": {name: SHAPES[name] for name in {*DECODING, *UPDATES}},
        "repeats": arguments.repeats,
    }
    for part, result in measure(arguments):
        print(part, result, flush=True)
        if part == "limits":
            results[part] = result
        else:
            results[part].append(result)
        if not arguments.try_out:  # each as it comes
            write_record("hardware_limits", ("torch", "transformers", "triton"), settings, results)


if __name__ == "__main__":
    main()
