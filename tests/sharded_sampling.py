"""Samples with a teacher that is sharded over two processes; started by test_sharded_teacher.py."""

import datetime
import sys
from itertools import product

import torch
import torch.distributed as dist
from conftest import build_model

from minillm_trl.models.teacher import is_sharded, shard_blocks
from minillm_trl.rollouts.sampling import sample_prompts

PROMPTS = [[[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]]]  # of each process
# Keys are chosen so that the completions of the first process end long before those of the second
KEYS = [[(0, 10), (0, 24)], [(0, 46), (0, 16)]]
# Shared coins and batch size: a batch of one row has one row of coins too, which the processes do not share
CASES = list(product((True, False), (2, 1)))


def sample(rank: int, teacher, shared_coins: bool, batch_size: int, on_every_process=None) -> list[list[int]]:
    return sample_prompts(
        build_model("gpt2", vocab_size=40, seed=0),
        PROMPTS[rank],
        keys=KEYS[rank],
        max_new_tokens=20,
        eos_token_ids=[0, 3],
        pad_token_id=1,
        batch_size=batch_size,
        teacher=teacher,
        alpha=0.4,
        coin_key=(5,),
        shared_coins=shared_coins,
        keep_states=True,
        on_every_process=on_every_process,
    )


def build_teacher():
    return build_model("gpt2", vocab_size=40, seed=1, width=48)


def main(folder: str) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    teacher = build_teacher()
    assert is_sharded(shard_blocks(teacher, "cpu"))

    def on_every_process(flag: bool) -> bool:
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return int(flags) == world

    result = [sample(rank, teacher, *case, on_every_process) for case in CASES]
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
