"""Trains on fixed rollouts and saves the outcome; started by test_distributed.py with one process and with two."""

import json
import sys

import torch
from fixed_rollouts import train


def main(output: str, batch_size: str, accumulation: str, options: str) -> None:
    result = train(output, int(batch_size), int(accumulation), **json.loads(options))
    if result.pop("main"):
        torch.save(result, f"{output}/result.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
