"""Claim: oneDNN takes about half the time of PyTorch's own products, packed for decoding, or not packed in an update.

    python benchmarks/packed_products.py

multiplies in float32 with weights of the sizes of SmolLM2-135M and GPT-2, with one thread. A decoding step has a few
rows: `torch.nn.functional.linear` (MKL on x86 CPUs) is compared with oneDNN and weights that were packed before. An
update has many rows, and gradients of states and weight: a linear layer is compared with itself after
`use_onednn_products`. Both alternate; results are ratios within a round. Writes `results/packed_products.json`.
"""

import argparse
from typing import Any

import torch
from measurement import alternate, percentiles, write_record

from minillm_trl.models.packed_weights import multiply, packs_weights
from minillm_trl.models.trained_products import use_onednn_products

# (outputs, inputs) of a weight
WEIGHTS = {"attention 576": (576, 576), "feed-forward 576": (1536, 576), "feed-forward 768": (3072, 768)}
ROWS = (8, 64)
PRODUCTS = 100  # in a measurement
UPDATE_ROWS, UPDATE_PRODUCTS = 530, 8  # rows that are padded to 544


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


def measure_update(shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    states = torch.randn(UPDATE_ROWS, shape[1], requires_grad=True)
    plain, onednn = (torch.nn.Linear(shape[1], shape[0]) for _ in range(2))
    onednn.load_state_dict(plain.state_dict())
    use_onednn_products(onednn)

    def gradients(layer: torch.nn.Linear) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(states).square().sum(), (states, layer.weight))

    for expected, found in zip(gradients(plain), gradients(onednn), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)

    def run(layer: torch.nn.Linear) -> None:
        for _ in range(UPDATE_PRODUCTS):
            gradients(layer)

    rounds = alternate({"plain": lambda: run(plain), "onednn": lambda: run(onednn)}, repeats)
    return {"rows": UPDATE_ROWS, "speedup": percentiles([times["plain"] / times["onednn"] for times in rounds])}


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
    updates = [{"weight": name, **measure_update(shape, arguments.repeats)} for name, shape in WEIGHTS.items()]
    for result in updates:
        print(f"update of {result['weight']}, {result['rows']} rows: {result['speedup'][1]:.2f}x as fast")
    settings = {"dtype": "float32", "products": PRODUCTS, "rounds": arguments.repeats, "seeds": [0]}
    settings["update_products"] = UPDATE_PRODUCTS
    write_record("packed_products", ("torch",), settings, {"decoding": results, "updates": updates})


if __name__ == "__main__":
    main()
