"""Train on fixed rollouts, and save model and logs; tests start this in several processes."""

import json
import sys
from pathlib import Path

from fixed_rollouts import train


def main(output: str, batch_size: str, accumulation: str, options: str) -> None:
    trainer = train(output, int(batch_size), int(accumulation), **json.loads(options))
    if trainer.accelerator.is_main_process:
        facts = {"history": trainer.state.log_history, "strategy": str(trainer.accelerator.distributed_type)}
        Path(output, "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
