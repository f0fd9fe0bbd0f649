"""Sample with a teacher that is sharded over two processes; test_sharded_teacher.py starts this.

Then train with a tool that only one process calls: with complete models, a sharded teacher and a sharded student.
"""

import datetime
import os
import sys
from itertools import product

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from conftest import build_model
from test_tool_scores import build_trainer
from test_trainer_options import ScriptedFirstTurn

from minillm_trl import MiniLLMTrainer
from minillm_trl.models.teacher import is_sharded, shard_blocks
from minillm_trl.rollouts.sampling import sample_prompts

PROMPTS = [[[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]]]  # of each process
# Keys are chosen so that the completions of the first process end long before those of the second
KEYS = [[(0, 10), (0, 24)], [(0, 46), (0, 16)]]
# Shared coins and batch size: a batch of one row has one row of coins too, which the processes do not share
CASES = list(product((True, False), (2, 1)))
# Rows of each process: where one has none, its coins are nobody's
ROWS = [(2, 2), (2, 1), (0, 2)]


def sample(
    rank: int, teacher, shared_coins: bool, batch_size: int, num_rows: int = 2, on_every_process=None
) -> list[list[int]]:
    return sample_prompts(
        build_model("gpt2", vocab_size=40, seed=0),
        PROMPTS[rank][:num_rows],
        keys=KEYS[rank][:num_rows],
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


# Rows that call the tool in the first turn, and after its answer: of each process, at each step
CALLS = [{0: [(0, 1), (0,)]}, {0: [(1,)], 1: [(0, 1), (1,)]}]


class ScriptedCalls(ScriptedFirstTurn):
    """Call the tool in rows of one process alone in the first step, in more rows of the other in the second."""

    def __init__(self, *args, **kwargs):
        if "ACCELERATE_USE_FSDP" in os.environ:  # accelerate takes FSDP for a matter of GPUs
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(*args, **kwargs)
        self.eos_token_ids = [*self.eos_token_ids, *range(100, 130)]  # short completions: a token takes long here
        self.rows = []

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        turn = self._rollout.turn
        completions, logps = MiniLLMTrainer._generate_single_turn(self, prompt_ids, *args, **kwargs)
        self.rows.append(len(prompt_ids))
        calls = CALLS[self.state.global_step].get(self.accelerator.process_index, [])
        if turn < len(calls):
            call = self._tokenizer(self.CALL)["input_ids"]
            completions = [call if row in calls[turn] else ids for row, ids in enumerate(completions)]
        return completions, logps


def train_with_tools(folder: str, **options) -> dict:
    """Return the completions of the steps, the rows of their turns, and the loss."""
    trainer = build_trainer(
        folder,
        ScriptedCalls,
        max_steps=len(CALLS),
        max_completion_length=500,
        per_device_train_batch_size=2,
        steps_per_generation=1,
        sampling_batch_size=1,  # two rows are two batches for one process, and none for the other
        teacher_mixed_alpha=0.3,
        shared_coins=False,
        **options,
    )
    found, score = [], trainer.scoring.training_batch

    def recorded(model, batch, *args):
        found.append(batch["completion_ids"].tolist())
        return score(model, batch, *args)

    trainer.scoring.training_batch = recorded
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"completions": found, "rows": trainer.rows, "losses": losses}


def start_fsdp() -> None:
    """Make trainers that are built from now on shard their student, as `accelerate launch` does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "CPU_RAM_EFFICIENT_LOADING": "false"}
    os.environ |= {f"FSDP_{name}": value for name, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}


def main(folder: str) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    teacher = build_teacher()
    assert is_sharded(shard_blocks(teacher, "cpu"))

    def on_every_process(flag: bool) -> bool:
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return int(flags) == world

    result = [sample(rank, teacher, *case, rows[rank], on_every_process) for case, rows in product(CASES, ROWS)]
    torch.save(result, f"{folder}/{rank}.pt")
    trained = [train_with_tools(folder, shard_teacher=shard) for shard in (False, True)]
    start_fsdp()
    trained.append(train_with_tools(folder))
    torch.save(trained, f"{folder}/tools-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
