"""Kill training runs at random moments, restart them with the same command, compare with an uninterrupted run.

    python tests/tools/killing.py --work FOLDER --command minillm --kills 25 --seed 0 [--processes 2]

The command line runs in forked children, so a start costs no imports. A child counts moments (tokens drawn, rollouts
scored, losses, gradients, every file that is written, renamed or removed, and the middle of every file), and kills
itself with SIGKILL at a number drawn from the seed. Prints a JSON: the activity at each kill, and the largest
difference of weights and logged values.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, of the models
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

import safetensors.torch
import torch
import transformers.modeling_utils
from conftest import build_model, build_tokenizer
from safetensors.torch import load_file
from trl import GRPOTrainer

from minillm_trl import MiniLLMTrainer
from minillm_trl.baselines import FineTuningTrainer, KDTrainer, seqkd
from minillm_trl.cli import main as command_line
from minillm_trl.rollouts import sampling
from minillm_trl.training import checkpoints, reliable_trainer
from minillm_trl.training.checkpoints import newest_whole_checkpoint
from minillm_trl.training.rollout_scoring import RolloutScoring

for _module in ("generate", "kd", "minillm", "recording", "seqkd", "sft", "training"):
    import_module(f"minillm_trl.cli.{_module}")  # so that the children, which are forked, need not wait for imports

MOMENTS = (
    "start",
    "token",
    "rollout",
    "loss",
    "step",
    "file",
    "half a file",
    "rename",
    "remove",
    "log",
    "batch",
    "evaluation",
)
STEPS, SAVE_EVERY = 44, 4
TIMES = ("runtime", "per_second", "step_time", "seconds")  # times


class Counts:
    """Moments that a child has passed, in memory that outlives it: their number, and the kind of the last."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 16)

    def read(self) -> tuple[int, str]:
        number, kind = struct.unpack("qq", self.memory[:16])
        return number, MOMENTS[kind]

    def add(self, kind: str) -> int:
        number = self.read()[0] + 1
        self.memory[:16] = struct.pack("qq", number, MOMENTS.index(kind))
        return number


def count_moments(counts: Counts, kill_at: int | None) -> None:
    """Make this process count its moments, and die at one of them."""

    def passes(kind: str) -> None:
        kind = "evaluation" if kind == "token" and counts.read()[1] == "evaluation" else kind
        if counts.add(kind) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(owner: Any, name: str, kind: str) -> None:
        function = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            passes(kind)
            return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    def torn(owner: Any, name: str, argument: int) -> None:
        """Wrap a function that writes a file, to kill before, in the middle, or after."""
        function = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            passes("file")
            path = args[argument] if len(args) > argument else kwargs.get("filename")
            if isinstance(path, str | os.PathLike):
                if counts.read()[0] + 1 == kill_at:
                    function(*args, **kwargs)
                    os.truncate(path, os.path.getsize(path) // 2)
                passes("half a file")
            return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    counted(sampling, "draw_tokens", "token")
    counted(MiniLLMTrainer, "_compute_loss", "loss")
    counted(FineTuningTrainer, "compute_loss", "loss")
    counted(KDTrainer, "compute_loss", "loss")
    counted(reliable_trainer.ReliableTrainer, "_get_grad_norm", "step")
    counted(reliable_trainer.ReliableTrainer, "log", "log")
    counted(RolloutScoring, "training_batch", "rollout")
    open_share = seqkd.TeacherData.open_share

    def open_counted(self: seqkd.TeacherData, process: int) -> Any:
        append = open_share(self, process)
        return lambda completions: (passes("batch"), append(completions))[1]

    seqkd.TeacherData.open_share = open_counted
    counted(GRPOTrainer, "prediction_step", "evaluation")
    counted(FineTuningTrainer, "_sample_metrics", "evaluation")
    counted(os, "rename", "rename")
    counted(os, "replace", "rename")
    counted(shutil, "rmtree", "remove")
    torn(torch, "save", 1)
    torn(safetensors.torch, "save_file", 1)
    torn(transformers.modeling_utils, "safe_save_file", 1)
    torn(transformers.TrainerState, "save_to_json", 1)
    counted(checkpoints, "_checksum", "file")


def child(
    argv: list[str], counts: Counts, kill_at: int | None, rank: int, processes: int, port: int, log: Path
) -> None:
    """Run the command line to its end in this forked process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    count_moments(counts, kill_at)
    status = command_line(argv)
    os._exit(status)


def run(
    argv: list[str], log: Path, kill_at: int | None = None, processes: int = 1, victim: int = 0
) -> tuple[str, int]:
    """Run the command to its end or a kill. The other processes are then killed, as a launcher does.

    Returns:
        the kind of the last moment (`"end"` if it came to its end), and the victim's number of moments.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    counts, pids = Counts(), []
    sys.stdout.flush()
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            try:
                mine = counts if rank == victim else Counts()
                child(argv, mine, kill_at if rank == victim else None, rank, processes, port, log)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(70)
        pids.append(pid)
    statuses: dict[int, int] = {}
    while len(statuses) < processes:
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if statuses[pid] != 0:
            time.sleep(0.2)
            for other in set(pids) - set(statuses):
                os.kill(other, signal.SIGKILL)
    number, kind = counts.read()
    if set(statuses.values()) == {0}:
        return "end", number
    if kill_at is None or number < kill_at:
        raise RuntimeError(f"{argv[0]} ended with {statuses}:\n{log.read_text()[-3000:]}")
    return kind, number


def make_inputs(work: Path) -> Path:
    """Write tiny models and data, and the YAMLs of the commands."""
    if (work / "minillm.yaml").exists():
        return work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    for name, seed, width in (("student", 0, 32), ("teacher", 1, 48)):
        build_model("llama", len(tokenizer), seed, width=width).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    rows = [{"prompt": f"the punter {i} near\n", "completion": f"the river {i} is cheap"} for i in range(20)]
    for name, part in (("train", rows[:14]), ("validation", rows[14:])):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (work / "corpus.txt").write_text("the mill is a cheap family friendly pub\n" * 12)
    common = {
        "dataset": work / "train.jsonl",
        "eval_dataset": work / "validation.jsonl",
        "model_name_or_path": work / "student",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.003,
        "max_completion_length": 8,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": SAVE_EVERY,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rouge_l",
        "early_stopping_patience": 50,
        "resume_from_checkpoint": True,
        "max_steps": STEPS,
    }
    baselines = {"predict_with_generate": True, "max_length": 64, "gradient_accumulation_steps": 2}
    teacher = {"teacher_model_name_or_path": work / "teacher"}
    rollouts = {"steps_per_generation": 2, "num_iterations": 3, "lm_dataset": work / "corpus.txt", "lm_max_length": 16}
    commands = {
        "minillm": {**common, **teacher, **rollouts, "log_completions": False},
        "sft": {**common, **baselines},
        "kd": {**common, **teacher, **baselines},
        "seqkd": {**common, **teacher, **baselines, "generation_batch_size": 2, "keep_unfinished": True},
    }
    for name, options in commands.items():
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in options.items()}
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in plain.items())
        (work / f"{name}.yaml").write_text(text)
    return work


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Return the weights of the final model and of the last step, and the logs without times."""
    last = Path(newest_whole_checkpoint(folder, checksums=True))
    name = "adapter_model.safetensors" if (folder / "adapter_model.safetensors").exists() else "model.safetensors"
    weights = {
        f"{where.name}/{key}": value for where in (folder, last) for key, value in load_file(where / name).items()
    }
    weights = {key.replace(folder.name, "chosen"): value for key, value in weights.items()}
    state = json.loads((last / "trainer_state.json").read_text())
    kept = [{key: value for key, value in each.items() if not key.endswith(TIMES)} for each in state["log_history"]]
    return weights, [*kept, {name: state[name] for name in ("best_metric", "best_global_step", "global_step")}]


def differences(one: Path, other: Path) -> dict[str, Any]:
    """Return the largest difference of two runs' weights, and the number of logs that differ.

    For a run that only generated teacher data, return the number of lines that differ.
    """
    if not list(one.glob("*.safetensors")):
        answers, others = ((folder / "data" / "train.jsonl").read_text().splitlines() for folder in (one, other))
        return {"answers_that_differ": sum(map(str.__ne__, answers, others)) + abs(len(answers) - len(others))}
    (weights, logs), (others, other_logs) = outcome(one), outcome(other)
    assert weights.keys() == others.keys()
    lost = sum(a != b for a, b in zip(logs, other_logs, strict=False)) + abs(len(logs) - len(other_logs))
    return {
        "weights": max((weights[name] - others[name]).abs().max().item() for name in weights),
        "logs_that_differ": lost,
        "logs": len(logs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--command", choices=("minillm", "sft", "kd", "seqkd"), default="minillm")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--options", nargs="*", default=[], metavar="NAME=VALUE", help="further options of the command"
    )
    arguments = parser.parse_args()
    work = make_inputs(arguments.work.resolve())
    name = "-".join([arguments.command, str(arguments.processes), *arguments.options]).replace("/", "_")
    options = [word for each in arguments.options for word in ("--" + each.split("=")[0], each.split("=")[1])]

    def command(folder: Path) -> list[str]:
        more = ["--teacher_data_dir", str(folder / "data")] if arguments.command == "seqkd" else []
        yaml = ["--config", str(work / f"{arguments.command}.yaml")]
        return [arguments.command, *yaml, "--output_dir", str(folder), *more, *options]

    alone = work / f"{name}-alone"
    shutil.rmtree(alone, ignore_errors=True)
    _, moments = run(command(alone), work / "alone.log", processes=arguments.processes)
    draw, killed_at, found = random.Random(arguments.seed), [], []
    reach = max(2, moments // 3)  # some starts make no progress; a run dies about six times
    while len(killed_at) < arguments.kills:
        killed = work / f"{name}-killed-{arguments.seed}-{len(found)}"
        shutil.rmtree(killed, ignore_errors=True)
        kind = ""
        while kind != "end":
            kill_at = draw.randrange(1, reach) if len(killed_at) < arguments.kills else None
            victim = draw.randrange(arguments.processes)
            kind, _ = run(command(killed), work / "killed.log", kill_at, arguments.processes, victim)
            killed_at += [kind] if kind != "end" else []
        found.append(differences(alone, killed))
    result = {
        "command": arguments.command,
        "processes": arguments.processes,
        "options": arguments.options,
        "seed": arguments.seed,
        "moments_of_a_run": moments,
        "runs": len(found),
        "kills": len(killed_at),
        "killed_at": dict(Counter(killed_at)),
        **{key: max(each[key] for each in found) for key in found[0]},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
