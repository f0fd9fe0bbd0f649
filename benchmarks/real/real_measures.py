"""What `real_run.py` measures of a model on held-out prompts, in parts that can be added to a record one by one.

- `test`: every decoding on Dolly's test prompts, against the teacher; `answers`: the first greedy answers.
- `distinct`: distinct n-grams of all of these answers together.
- `forward_errors`: KL(teacher || model) at each token of samples from both, at temperature 1. On the teacher's samples
  this is the forward KL; both together give the exposure bias.
- `other_prompts`: SelfInst, Vicuna and Dolly's prompts with a context, decoded as in `OTHERS`, without the teacher.
"""

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from real_run import Benchmark

TEMPERATURES = ("1.0", "0.7", "0.4", "greedy")
OTHERS = {"selfinst": ("0.7", "greedy"), "vicuna": ("0.7", "greedy"), "context": ("greedy",)}
SEED = 10
ANSWERS = 10
NGRAMS = (1, 2, 3)
MAX_OTHER_PROMPT = 224  # tokens
WITH_CONTEXT = ("closed_qa", "information_extraction", "summarization")  # categories of Dolly
SOURCES = {
    "selfinst": "user_oriented_instructions.jsonl, from the folder human_eval of github.com/yizhongw/self-instruct",
    "vicuna": "a folder with question.jsonl and answer_gpt35.jsonl, from github.com/lm-sys/FastChat",
}

PerPrompt = dict[str, dict[str, list[float]]]  # by decoding and measure


def prepare_test_sets(benchmark: "Benchmark") -> None:
    """Prepare the other test sets, without prompts that the models are trained or chosen on."""
    from minillm_trl.cli import main as cli
    from minillm_trl.data import load_examples

    seen = {
        json.dumps(prompt)
        for split in ("train", "validation")
        for prompt in load_examples(benchmark.data, split=split)["prompt"]
    }
    for name, words in _preparations(benchmark).items():
        prepared = benchmark.folder / "data" / "prepared" / name
        words += ["--template", "chat", "--tokenizer", str(benchmark.model("teacher")), "--overwrite", "true"]
        words += ["--max_prompt_length", str(MAX_OTHER_PROMPT), "--output_dir", str(prepared)]
        if cli(["prepare-data", *words]) != 0:
            raise SystemExit(f"preparing {name} failed")
        lines = (prepared / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        held_out = [line for line in lines if json.dumps(json.loads(line)["prompt"]) not in seen]
        if not held_out:
            raise SystemExit(f"{name}: the models are trained or chosen on all {len(lines)} prompts")
        path = test_set(benchmark, name) / "test.jsonl"
        path.parent.mkdir(exist_ok=True)
        text = "".join(held_out)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # results must not be older than their data
            path.write_text(text, encoding="utf-8")
        print(f"{name}: {len(held_out)} of {len(lines)} prompts are held out")


def _preparations(benchmark: "Benchmark") -> dict[str, list[str]]:
    """Return the words of `prepare-data` for each other test set."""
    if not benchmark.task.has_other_tests:
        return {}
    dolly = [] if benchmark.dolly is None else ["--source", str(benchmark.dolly)]
    rows = ["--test_rows", str(benchmark.scale.test_rows), "--validation_rows", "0"]
    words = {"context": ["--task", "dolly", *dolly, "--context", "with", "--categories", *WITH_CONTEXT, *rows]}
    for name, source in benchmark.test_sets.items():
        files = [source / "question.jsonl", source / "answer_gpt35.jsonl"] if name == "vicuna" else [source]
        options = zip(("--source", "--answers"), map(str, files), strict=False)
        words[name] = ["--task", name, *chain.from_iterable(options)]
    return words


def test_set(benchmark: "Benchmark", name: str) -> Path:
    """Return the folder with the prompts of another test set."""
    return benchmark.folder / "data" / f"smollm2_{name}"


def missing_parts(benchmark: "Benchmark", name: str) -> dict[str, Callable[["Benchmark", str], Any]]:
    """Return the parts that the record of a tested model lacks, with the function that measures each."""
    record = benchmark.record(name)
    parts = {"test": evaluate_test, "answers": first_answers, "distinct": distinct, "forward_errors": forward_errors}
    if name == benchmark.task.teacher:
        del parts["forward_errors"]  # it makes no error
    missing = {part: measure for part, measure in parts.items() if part not in record}
    if set(_preparations(benchmark)) - record.get("other_prompts", {}).keys():
        missing["other_prompts"] = other_prompts
    return missing


def evaluation_folder(benchmark: "Benchmark", prompts: str, name: str) -> Path:
    """Return the folder with the results of a model on these prompts, without those of a former model of this name."""
    folder = benchmark.own / "measures" / prompts / name
    weights = [
        path for model in (name, benchmark.task.teacher) for path in benchmark.model(model).glob("*.safetensors")
    ]
    newest = max((path.stat().st_mtime_ns for path in weights), default=0)
    if any(path.stat().st_mtime_ns < newest for path in folder.glob("**/results.json")):
        shutil.rmtree(folder)
    return folder


def evaluate(benchmark: "Benchmark", name: str, split: str) -> PerPrompt:
    """Evaluate a model at every temperature with `minillm-trl evaluate`; on the test prompts also against the teacher.

    Returns:
        `dict`: for each decoding the measures of each prompt, by measure.
    """
    rows = benchmark.scale.test_rows if split == "test" else benchmark.scale.validation_rows
    words = ["--dataset", str(benchmark.data), "--split", split, "--max_rows", str(rows)]
    if split == "test" and name != benchmark.task.teacher:
        words += ["--teacher", str(benchmark.model(benchmark.task.teacher))]
    output = evaluation_folder(benchmark, split, name)
    _evaluate(benchmark, name, output, TEMPERATURES, words)
    return {decoding: _per_prompt(output, decoding) for decoding in TEMPERATURES}


def evaluate_test(benchmark: "Benchmark", name: str) -> PerPrompt:
    """Evaluate a model on Dolly's test prompts."""
    return evaluate(benchmark, name, "test")


def _evaluate(benchmark: "Benchmark", name: str, output: Path, decodings: tuple[str, ...], words: list[str]) -> None:
    """Run `minillm-trl evaluate`, which keeps finished results."""
    from minillm_trl.cli import main as cli

    common = ["--model", str(benchmark.model(name)), "--output_dir", str(output), "--temperatures", *decodings]
    common += ["--no_repeat_ngram_size", "0", "--max_new_tokens", str(benchmark.scale.answer_tokens)]
    common += ["--batch_size", "50", "--no_loss"]
    if decodings != ("greedy",):
        common += ["--seeds", str(SEED)]
    if cli(["evaluate", *common, *words]) != 0:
        raise SystemExit(f"evaluation of {name} failed")


def _results(output: Path, decoding: str, file: str) -> Path:
    folder = "greedy" if decoding == "greedy" else f"temperature_{decoding}"
    return output / folder / file


def _per_prompt(output: Path, decoding: str) -> dict[str, list[float]]:
    rows = json.loads(_results(output, decoding, "results.json").read_text())["per_prompt"]
    return {name: [round(row[name], 5) for row in rows] for name in rows[0]}


def _samples(benchmark: "Benchmark", name: str, decoding: str) -> list[dict[str, Any]]:
    """Return prompts and outputs of the test; they are sampled again if the folder of the evaluation is gone."""
    path = _results(evaluation_folder(benchmark, "test", name), decoding, "samples.jsonl")
    if not path.is_file():
        evaluate(benchmark, name, "test")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def first_answers(benchmark: "Benchmark", name: str) -> list[dict[str, str]]:
    """Return the first test prompts with the model's greedy answers."""
    samples = _samples(benchmark, name, "greedy")[:ANSWERS]
    return [{"prompt": sample["prompt"][-1]["content"], "answer": sample["outputs"][0]} for sample in samples]


def distinct(benchmark: "Benchmark", name: str) -> dict[str, dict[str, float]]:
    """Return distinct-n of all answers to the test prompts together, by decoding and n."""
    from minillm_trl.evaluation.metrics import distinct_ngrams

    found = {}
    for decoding in TEMPERATURES:
        texts = [sample["outputs"][0] for sample in _samples(benchmark, name, decoding)]
        found[decoding] = {str(n): round(distinct_ngrams(texts, n), 5) for n in NGRAMS}
    return found


def forward_errors(benchmark: "Benchmark", name: str) -> dict[str, list[list[float]]]:
    """Return KL(teacher || model) in nats at each token of samples from the model and from the teacher.

    Returns:
        `dict[str, list[list[float]]]`: `on_model` and `on_teacher`, one list for each of the first test prompts, at
        temperature 1.
    """
    from minillm_trl.evaluation.divergence import token_divergences
    from minillm_trl.models.encoding import encode_prompts
    from minillm_trl.models.loading import load_model, load_tokenizer
    from minillm_trl.models.teacher import shared_vocab_size
    from minillm_trl.rollouts.prompts import generate_completions

    prompts = _first_prompts(benchmark)
    folders = str(benchmark.model(benchmark.task.teacher)), str(benchmark.model(name))
    tokenizer, (teacher, model) = load_tokenizer(folders[1]), map(load_model, folders)
    prompt_ids = encode_prompts(tokenizer, prompts)
    options = {"batch_size": 50, "temperature": 1.0}
    own = generate_completions(
        model, tokenizer, prompts, seed=SEED, max_new_tokens=benchmark.scale.answer_tokens, **options
    )
    samples = {
        "on_model": [completion.token_ids for completion in own],
        "on_teacher": teacher_samples(benchmark, teacher, tokenizer, prompts),
    }
    vocab_size = shared_vocab_size(model, teacher, tokenizer)
    return {
        source: [
            [round(value, 4) for value in values]
            for values in token_divergences(
                teacher.eval(), model.eval(), prompt_ids, token_ids, vocab_size=vocab_size, **options
            )
        ]
        for source, token_ids in samples.items()
    }


def _first_prompts(benchmark: "Benchmark") -> list[Any]:
    from minillm_trl.data import load_examples, unique_prompts

    rows = unique_prompts(load_examples(benchmark.data, split="test"))
    return rows["prompt"][: benchmark.scale.test_rows // 2]


def teacher_samples(benchmark: "Benchmark", teacher: Any, tokenizer: Any, prompts: list[Any]) -> list[list[int]]:
    """Return the tokens of the teacher's samples at temperature 1, which all models of the benchmark share."""
    from resumable_jobs import read_record, write_record_of_run

    from minillm_trl.rollouts.prompts import generate_completions

    path = benchmark.own / "measures" / "teacher_samples.json"
    identity = {"prompts": prompts, "seed": SEED, "max_new_tokens": benchmark.scale.answer_tokens}
    if (record := read_record(path)).get("identity") != identity:
        completions = generate_completions(
            teacher, tokenizer, prompts, seed=SEED, max_new_tokens=benchmark.scale.answer_tokens, batch_size=50
        )
        record = {"identity": identity, "token_ids": [completion.token_ids for completion in completions]}
        write_record_of_run(path, record)
    return record["token_ids"]


def other_prompts(benchmark: "Benchmark", name: str) -> dict[str, PerPrompt]:
    """Evaluate a model on the other test sets that the record lacks.

    Returns:
        `dict`: for each test set and decoding the measures of each prompt, by measure.
    """
    found = benchmark.record(name).get("other_prompts", {})
    tasks = [task for task in _preparations(benchmark) if task not in found]
    output = evaluation_folder(benchmark, "other", name)
    groups = (["context"], benchmark.scale.test_rows), (list(SOURCES), benchmark.scale.test_rows // 2)
    for group, rows in groups:  # one command, and one loaded model, for each
        if not (together := [task for task in group if task in tasks]):
            continue
        decodings = OTHERS[together[0]]
        words = ["--tasks", *(f"{task}={test_set(benchmark, task)}" for task in together), "--max_rows", str(rows)]
        _evaluate(benchmark, name, output, decodings, words)
        found |= {
            task: {decoding: _per_prompt(output / task, decoding) for decoding in decodings} for task in together
        }
    return found
