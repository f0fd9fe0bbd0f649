"""Compare the results of two commits bit for bit: four short runs with fixed seeds.

    python tests/tools/same_results.py COMMIT_A COMMIT_B

The runs are `sft`, `minillm` (teacher mixing, a corpus, a baseline, checkpoints in the middle of a rollout buffer;
again from such a checkpoint; with other settings), `kd` and `evaluate`, of tiny models on the CPU with one thread.
The script compares the weights of every checkpoint, the logged values, the samples and `results.json`. It prints
what differs, or "none differs"; the exit status is 1 if something does. The commit `.` is the working tree.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
TIMES = ("runtime", "per_second", "step_time", "seconds", "memory")  # values that depend on clock and machine
RESUMED = "checkpoint-3"  # in the middle of a rollout buffer

COMMON = {
    **{"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False},
    **{"seed": 7, "logging_steps": 1, "learning_rate": 3e-3, "max_steps": 6, "save_steps": 3},
    **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 3},
}
MINILLM = {
    **{"max_completion_length": 8, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
    **{"teacher_mixed_alpha": 0.3, "lm_max_length": 16, "num_generations": 2, "advantage_baseline": "group"},
    **{"log_completions": True, "num_completions_to_print": 0, "sampling_batch_size": 4},
}

# These settings use other scores: rewards of both distributions, a coin for each row, no states of the teacher
EXPECTED = {
    **{"reward_estimator": "expected", "importance_weighting": "prefix", "shared_coins": False, "beta": 0.1},
    **{"teacher_hidden_states": "recompute"},
}


def write_inputs(folder: Path) -> None:
    """Write the models and the data that all runs read."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import WORDS, build_model, build_tokenizer

    tokenizer = build_tokenizer()
    for name, seed, width in (("student", 0, 32), ("teacher", 1, 48)):
        build_model("llama", len(tokenizer), seed, width=width).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = WORDS.split()
    rows = [
        {"prompt": f"the {words[i % len(words)]} {i}\n", "completion": " ".join(words[i % 7 : i % 7 + 5])}
        for i in range(28)
    ]
    for name, part in (("train", rows[:22]), ("validation", rows[22:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "corpus.txt").write_text(f"{WORDS}\n" * 12)


def command(subcommand: str, **options: object) -> list[str]:
    """Return the words of a command line."""
    return [subcommand, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def run_chain(inputs: Path, output: Path) -> None:
    """Run the four commands in this process, with the package on the path."""
    import torch

    from minillm_trl.cli import main

    def run(subcommand: str, **options: object) -> None:
        torch.manual_seed(0)
        if status := main(command(subcommand, **options)):
            raise SystemExit(f"{subcommand} ended with status {status}")

    torch.set_num_threads(1)
    training = {"dataset": inputs / "train.jsonl", "eval_dataset": inputs / "validation.jsonl", **COMMON}
    teacher = {"teacher_model_name_or_path": inputs / "teacher"}
    run("sft", model_name_or_path=inputs / "student", output_dir=output / "sft", **training)
    minillm = {"model_name_or_path": output / "sft", **teacher, **training, **MINILLM}
    run("minillm", output_dir=output / "minillm", lm_dataset=inputs / "corpus.txt", **minillm)
    shutil.copytree(output / "minillm" / RESUMED, output / "resumed" / RESUMED)
    resumed = {"output_dir": output / "resumed", "resume_from_checkpoint": output / "resumed" / RESUMED}
    run("minillm", lm_dataset=inputs / "corpus.txt", **minillm, **resumed)
    run("minillm", output_dir=output / "expected", **minillm, **EXPECTED)
    run("kd", model_name_or_path=inputs / "student", output_dir=output / "kd", **teacher, **training)
    run(
        "evaluate",
        **{"model": output / "minillm", "teacher": inputs / "teacher", "dataset": inputs / "validation.jsonl"},
        **{"output_dir": output / "evaluation", "max_new_tokens": 8},
    )


def _hash(commit: str) -> str:
    words = ["git", "rev-parse", commit]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def check_out(commit: str, folder: Path) -> Path:
    """Write the files of a commit to `folder`; `.` is the working tree."""
    if commit == ".":
        return ROOT
    archive = subprocess.run(["git", "archive", commit, "minillm_trl"], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def read(path: Path) -> dict[str, Any]:
    """Return the results in a file by name: tensors as bytes, and values without times and paths."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: tensor.contiguous().numpy().tobytes() for name, tensor in load_file(path).items()}
    if path.name == "samples.jsonl":
        return dict(enumerate(path.read_text().splitlines()))
    content = json.loads(path.read_text())
    return dict(flatten(content["log_history"] if path.name == "trainer_state.json" else content))


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested dicts and lists by path, without times and properties of the machine."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if not str(key).endswith(TIMES):
                yield from flatten(part, f"{name}/{key}")
    elif not (isinstance(value, str) and os.sep in value):
        yield name, value


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a chain of runs, by file."""
    patterns = ("*.safetensors", "trainer_state.json", "results.json", "samples.jsonl")
    paths = sorted(path for pattern in patterns for path in folder.rglob(pattern))
    return {str(path.relative_to(folder)): read(path) for path in paths}


def differences(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return the names of values that differ between two chains, or are missing in one, by file."""
    missing = object()
    different = {}
    for file in sorted(one.keys() | other.keys()):
        values, others = one.get(file, {}), other.get(file, {})
        names = sorted(values.keys() | others.keys(), key=str)
        found = [str(name) for name in names if repr(values.get(name, missing)) != repr(others.get(name, missing))]
        different |= {file: found} if found else {}
    return different


def compare(commits: list[str]) -> int:
    """Run the chain under each of two commits, and print the differences."""
    hashes = [commit if commit == "." else _hash(commit) for commit in commits]  # a branch may move in the meantime
    with tempfile.TemporaryDirectory() as work:
        inputs, found = Path(work) / "inputs", []
        inputs.mkdir()
        write_inputs(inputs)
        for number, commit in enumerate(hashes):
            # the same path for both, as the seeds of some orders and the names of datasets may depend on it
            output, kept = Path(work) / "output", Path(work) / f"output-{number}"
            package = check_out(commit, Path(work) / f"package-{number}")
            environment = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package)}
            log = Path(work) / "log"
            with log.open("w") as stream:
                words = [sys.executable, __file__, "--chain", str(inputs), str(output)]
                status = subprocess.run(words, env=environment, cwd=work, stdout=stream, stderr=stream).returncode
            if status:
                print(f"{commit}: the runs ended with status {status}:\n{log.read_text()[-3000:]}")
                return 2
            output.rename(kept)
            found.append(results(kept))
    different = differences(*found)
    for file, names in different.items():
        print(f"{file}: {len(names)} differ: {', '.join(names[:5])}")
    if not different:
        print(f"none differs ({sum(map(len, found[0].values()))} values in {len(found[0])} files)")
    return int(bool(different))


def main() -> int:
    """Compare two commits; with `--chain`, run the chain of one, as the comparison does in subprocesses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--chain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.chain:
        run_chain(*map(Path, arguments.commits))
        return 0
    return compare(arguments.commits)


if __name__ == "__main__":
    sys.exit(main())
