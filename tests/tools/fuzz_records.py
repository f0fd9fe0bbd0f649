"""Broken outputs of subcommands, for the subcommands that read them; for `fuzzing.py`."""

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml
from datasets import Dataset
from evaluation_results import write_results
from fuzz_data import check_examples
from fuzz_input import Input, command, spoil_file

from minillm_trl.baselines.teacher_data import TeacherCompletion, TeacherData
from minillm_trl.cli import main
from minillm_trl.data import load_examples
from minillm_trl.evaluation.parts import Parts


def small_recipe(folder: Path) -> Path:
    """Return a small recipe whose stages write into `folder`."""
    recipe = folder / "recipe"
    recipe.mkdir()
    stages = {
        "recipe": {
            "stages": {"data": "prepare-data", "sft": "sft"},
            "evaluate": {"config": "eval.yaml", "models": ["sft"], "output_dir": str(folder / "evaluation")},
        },
        "data": {"task": "examples", "source": "x.jsonl", "output_dir": str(folder / "data")},
        "sft": {"dataset": str(folder / "data"), "model_name_or_path": "m", "output_dir": str(folder / "sft")},
        "eval": {"dataset": str(folder / "data")},
    }
    for name, values in stages.items():
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return recipe


def _evaluation(folder: Path, **options: Any) -> Path:
    values = {"rouge_l": [10.0, 20.0, 30.0], "length": [3.0, 4.0, 5.0]}
    return write_results(folder, values, bucket_of=[0, 1, 2], **options)


def evaluation_results(random: Random, folder: Path) -> Input:
    """Make results of `evaluate` for `compare`, and the state of a training, with one broken file."""
    runs = [_evaluation(folder / name, excess_error=[1.0, None, 2.0], corpus={"distinct_4": 0.5}) for name in "ab"]
    state = folder / "train" / random.choice(("checkpoint-5", "checkpoint-5", "checkpoint-x")) / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"log_history": [{"step": 1, "eval_rouge_l": 10.0}, {"step": 2, "loss": 1.0}]}))
    spoilt = spoil_file(random, [*runs[0].glob("*"), state])
    words = ["compare", *runs, "--training", f"b={folder / 'train'}"]
    if random.random() < 0.5:
        words += ["--baseline", "b"]
    if random.random() < 0.05:
        words += ["--output_dir", folder / "report"]
    return command(*words, names=(spoilt.parent, state.parents[1], "a and b"))


def verdicts(random: Random, folder: Path) -> Input:
    """Make verdicts of a judge, and the results that it judges."""
    run, output = _evaluation(folder / "a"), folder / "judged"
    output.mkdir()
    verdict = {"key": "k", "scores": [8.0, 7.0], "reply": "8 7", "asked": 1, "retries": 0, "model": "m"}
    verdict |= {"prompt_tokens": 5, "completion_tokens": 2}
    (output / "verdicts.jsonl").write_text("".join(json.dumps(verdict) + "\n" for _ in range(2)))
    spoilt = spoil_file(random, [run / "results.json", run / "samples.jsonl", *[output / "verdicts.jsonl"] * 2])
    words = ("judge", run, "--base_url", "http://localhost:9/v1", "--judge_model", "m", "--output_dir", output)
    return command(*words, "--dry_run", names=(spoilt.parent, "a, dolly"))


def teacher_data(random: Random, folder: Path) -> Input:
    """Make the folder in which `seqkd` collects a teacher's completions."""
    path = folder / "teacher_data"
    data = TeacherData(path, {"teacher": "t", "num_generations": 1})
    data.open_share(0)([TeacherCompletion(row, 0, f"answer {row}", 3, True) for row in range(3)])
    prompts = Dataset.from_dict({"prompt": ["a", "b", "c"]})
    data.finish(prompts, False)
    spoil_file(random, list(path.glob("*")))

    def go_on() -> dict[str, Any]:
        data = TeacherData(path, {"teacher": "t", "num_generations": 1})
        data.read(), data.finished_with
        return data.finish(prompts, random.random() < 0.5)

    return Input(go_on, (path,), lambda _: check_examples(load_examples(path / "train.jsonl")))


def records(random: Random, folder: Path) -> Input:
    """Make records of finished work: of prepared data, of a recipe's stages, of an unfinished evaluation."""
    kind = random.randrange(3)
    if kind == 0:
        source, output = folder / "x.jsonl", folder / "out"
        source.write_text('{"prompt": "a", "completion": "b"}\n')
        words = ("prepare-data", "--task", "examples", "--source", str(source), "--output_dir", str(output))
        main(list(words))
        spoil_file(random, [output / "statistics.json"])
        return command(*words, names=(output,))
    if kind == 1:
        parts = Parts(folder / "unfinished", {"seeds": [1]})
        parts.put("seed-1", [{"a": 1}])
        spoil_file(random, list(parts.folder.glob("*")))
        return Input(lambda: Parts(parts.folder, {"seeds": [1]}).get("seed-1"), (parts.folder,))
    recipe = small_recipe(folder)
    for name in ("data", "sft"):
        (folder / name).mkdir()
    main(["recipe", str(recipe), "--accept", "data", "sft"])  # marks them as done
    spoilt = spoil_file(random, [folder / "data" / "stage.json", folder / "sft" / "stage.json"])
    return command("recipe", recipe, "--list", names=(spoilt.parent,))
