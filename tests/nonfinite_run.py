"""Trains while one process of several meets a number that is not finite; started in several processes by the tests."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import torch
from test_trainer import make_trainer
from transformers import TrainerCallback

from minillm_trl import MiniLLMTrainer


def whole_weights(trainer: MiniLLMTrainer) -> torch.Tensor:
    """On the first process, where the weights may be spread over all."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return torch.cat([each.detach().float().flatten() for each in (state or {"": torch.zeros(0)}).values()])


def main(output: str, options: str = "{}") -> None:
    trainer = make_trainer(Path(output), max_steps=4, steps_per_generation=1, **json.loads(options))
    rank, seen = trainer.accelerator.process_index, []
    score = trainer._score_rollout

    def broken(batch, *args):
        scores = score(batch, *args)
        if rank == 1 and trainer.state.global_step == 2:
            scores.teacher_kd_logps[0, 0] = torch.nan
        return scores

    class Note(TrainerCallback):
        def on_train_begin(self, args, state, control, **unused):
            seen.append(whole_weights(trainer))

        def on_step_end(self, args, state, control, **unused):
            seen.append(whole_weights(trainer))

    trainer._score_rollout = broken
    trainer.add_callback(Note())
    trainer.train()
    moved = [not torch.equal(one, other) for one, other in pairwise(seen)]
    facts = {"moved": moved, "skipped": trainer._nonfinite_steps, "sum": seen[-1].double().sum().item()}
    Path(output, f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
