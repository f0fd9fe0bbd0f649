"""Claim: products of a decoding step with packed weights take at most half the time of PyTorch's own.

    python benchmarks/packed_products.py

multiplies a few rows with weights of the sizes of SmolLM2-135M and GPT-2 in float32, with one thread: as
`torch.nn.functional.linear` does (MKL on x86 CPUs), and with oneDNN and weights that were packed before. Both
alternate; results are ratios within a round. Writes `results/packed_products.json`.
"""

import argparse
from typing import Any

import torch
from measurement import alternate, percentiles, write_record

from minillm_trl.models.packed_weights import multiply, packs_weights

# (outputs, inputs) of a weight
WEIGHTS = {"attention 576": (576, 576), "feed-forward 576": (1536, 576), "feed-forward 768": (3072, 768)}
ROWS = (8, 64)
PRODUCTS = 100  # in a measurement


@torch.no_grad()
def measure(rows: int, shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    states, weight = torch.randn(rows, shape[1]), torch.randn(shape)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    torch.testing.assert_close(multiply(states, packed), states @ weight.T, rtol=1e-4, atol=1e-3)

    def plain() -> None:
        for _ in range(PRODUCTS):
            torch.nn.functional.linear(states, weight)

    def with_packed() -> None:
        for _ in range(PRODUCTS):
            multiply(states, packed)

    rounds = alternate({"plain": plain, "packed": with_packed}, repeats)
    return {"rows": rows, "speedup": percentiles([times["plain"] / times["packed"] for times in rounds])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not packs_weights():
        raise SystemExit("This machine has no oneDNN kernels that take packed weights.")
    results = [
        {"weight": name, **measure(rows, shape, arguments.repeats)} for name, shape in WEIGHTS.items() for rows in ROWS
    ]
    for result in results:
        print(f"{result['weight']}, {result['rows']} rows: {result['speedup'][1]:.2f}x as fast")
    settings = {"dtype": "float32", "products": PRODUCTS, "rounds": arguments.repeats, "seeds": [0]}
    write_record("packed_products", ("torch",), settings, results)


if __name__ == "__main__":
    main()
