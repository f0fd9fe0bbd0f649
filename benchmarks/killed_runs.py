"""Claim: a training run that is killed and restarted with the same command loses nothing.

    python benchmarks/killed_runs.py [--kills 25] [--work FOLDER]

runs `tests/tools/killing.py` for MiniLLM (full fine-tuning, LoRA, and two processes of which one dies), SFT, KD, and
SeqKD with the teacher's generation. SIGKILL kills each run this many times, at moments drawn from a seed. The result
is compared with an uninterrupted run. Writes `results/killed_runs.json`: the activity at each kill, the largest
difference of the weights, and the logs that differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measurement import write_record

KILLER = Path(__file__).parents[1] / "tests" / "tools" / "killing.py"
LORA = ("use_peft=true", "lora_target_modules=all-linear")
RUNS = (
    ("--command", "minillm"),
    ("--command", "minillm", "--options", *LORA),
    ("--command", "minillm", "--processes", "2"),
    ("--command", "minillm", "--processes", "2", "--options", *LORA),
    ("--command", "sft"),
    ("--command", "kd"),
    ("--command", "seqkd"),
    ("--command", "seqkd", "--options", "generate_only=true"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="of each kind of run")
    parser.add_argument("--work", type=Path, help="folder of the runs; a temporary one by default")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for words in RUNS:
            command = [sys.executable, str(KILLER), "--work", str(arguments.work or folder), *words]
            done = subprocess.run([*command, "--kills", str(arguments.kills)], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(words)} ended with {done.returncode}; see its output above.")
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(results[-1], flush=True)
    settings = {"kills": arguments.kills, "dtype": "torch.float32"}
    print(write_record("killed_runs", ("torch", "transformers", "trl", "accelerate", "peft"), settings, results))


if __name__ == "__main__":
    main()
