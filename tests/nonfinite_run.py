"""Train while one of several processes gets NaN or infinite numbers; tests start this in several processes.

These are in a completion of the second step, and in the losses of the third and fourth step.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import torch
from test_trainer import make_trainer
from transformers import TrainerCallback

import minillm_trl.trainer
from minillm_trl import MiniLLMTrainer


def whole_weights(trainer: MiniLLMTrainer) -> torch.Tensor:
    """Return all weights on the first process, also if they are sharded."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return torch.cat([each.detach().float().flatten() for each in (state or {"": torch.zeros(0)}).values()])


def main(output: str, options: str = "{}") -> None:
    # float16 is refused on CPUs, which have no scaler of torch's; DeepSpeed's own runs on some
    minillm_trl.trainer.check_machine = lambda *unused: None
    trainer = make_trainer(Path(output), max_steps=5, steps_per_generation=1, **json.loads(options))
    rank, seen, scales = trainer.accelerator.process_index, [], []
    score_rollout, score = trainer.scoring.of_rollout, trainer.scoring.answer

    def is_due(*steps: int) -> bool:
        return rank == 1 and trainer.state.global_step in steps and trainer.model.training

    def broken_rollout(*args):
        scores = score_rollout(*args)
        if is_due(1):
            scores.teacher_kd_logps[0, 0] = torch.nan
        return scores

    def broken(model, *requests):
        scores = score(model, *requests)
        if is_due(2, 3) and scores[0].loss is not None:
            scores[0] = scores[0]._replace(loss=scores[0].loss * torch.nan)
        return scores

    class Note(TrainerCallback):
        def on_train_begin(self, args, state, control, **unused):
            seen.append(whole_weights(trainer))

        def on_step_end(self, args, state, control, **unused):
            seen.append(whole_weights(trainer))
            scales.append(getattr(getattr(trainer.model_wrapped, "optimizer", None), "cur_scale", None))

    trainer.scoring.of_rollout, trainer.scoring.answer = broken_rollout, broken
    trainer.add_callback(Note())
    trainer.train()
    moved = [not torch.equal(one, other) for one, other in pairwise(seen)]
    facts = {
        "moved": moved,
        "skipped": trainer.guard.skipped,
        "left_out": trainer.counts.left_out,
        "scales": scales,
        "overflows": None if trainer.counts.overflows is None else trainer.counts.overflows.skipped_steps,
        "sum": seen[-1].double().sum().item(),
    }
    Path(output, f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
