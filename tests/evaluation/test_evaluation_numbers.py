"""`evaluate_model` on samples of given texts and scores: means, seeds, buckets, parts, and what it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from minillm_trl.evaluation import evaluate as evaluation
from minillm_trl.evaluation.evaluate import Evaluation, evaluate_model
from minillm_trl.evaluation.exposure_bias import excess_accumulated_error
from minillm_trl.evaluation.metrics import distinct_ngrams, distinct_outputs, self_bleu
from minillm_trl.evaluation.statistics import MeanInterval

PROMPTS = ["a", "b", "c", "d", "e", "f"]
LENGTHS = [0, 5, 6, 10, 11, 40]  # of their references, at the limits of the buckets
OUTPUTS = {5: "the mill is a cheap pub", 6: "the mill is a river", None: "the mill"}
ERRORS = [[[1.0, 2.0]], [[0.5, 0.5]]]


class Task:
    """Stands in for `TaskMeasures`."""

    def __init__(
        self, model, teacher, tokenizer, dataset, decoding, teacher_temperature, no_repeat_ngram_size, shared
    ):
        self.given = (model, teacher, tokenizer, teacher_temperature, no_repeat_ngram_size, shared)
        self.decoding = decoding
        self.prompts = dataset["prompt"][:]
        self.references = [[prompt.upper()] for prompt in self.prompts] if "references" in dataset.features else None
        self.measured: list[tuple] = []

    def measure_samples(self, seed: int | None, bar: Any) -> list[dict[str, Any]]:
        self.measured.append(("samples", seed))
        bar.update(len(self.prompts))
        texts = [f"{OUTPUTS[seed]} {prompt if row % 2 else ''}" for row, prompt in enumerate(self.prompts)]
        scores = [{"length": row + (seed or 0)} for row in range(len(texts))]
        if self.references is not None:
            scores = [{**row, "rouge_l": 3.0 * row["length"] % 8} for row in scores]
        return [{"output": text, "scores": row} for text, row in zip(texts, scores, strict=True)]

    def measure_forward_kl(self, teacher: str, seed: int, bar: Any) -> list[dict[str, float]]:
        self.measured.append(("forward_kl", teacher, seed))
        return [{"forward_kl": 0.5 * row * seed} for row in range(len(self.prompts))]

    def measure_losses(self) -> list[float]:
        self.measured.append(("loss",))
        return [0.25 * row for row in range(len(self.prompts))]

    def measure_errors(self, teacher: str, samples: int, seed: int, progress: bool) -> list:
        self.measured.append(("errors", teacher, samples, seed, progress))
        return ERRORS

    def reference_lengths(self) -> list[int]:
        return LENGTHS[: len(self.prompts)]


class Bar:
    """Stands in for the progress bar."""

    def __init__(self, total: int, disable: bool, **_: Any):
        self.total, self.disable, self.n = total, disable, 0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, number: int) -> None:
        self.n += number


class Parts(dict):
    """Stands in for the parts on disk."""

    def put(self, name: str, part: Any) -> None:
        assert name not in self
        self[name] = part


@pytest.fixture
def run(monkeypatch):
    """Evaluate, and return the evaluation; `run.task` and `run.bar` are the last ones."""

    def evaluate(prompts: int = 6, references: bool = True, **options: Any) -> Evaluation:
        evaluate.task = evaluate.bar = None
        columns = {"prompt": PROMPTS[:prompts]}
        if references:
            columns["references"] = [["x"]] * prompts
        return evaluate_model("model", "tokenizer", Dataset.from_dict(columns), **{"max_new_tokens": 8, **options})

    def keep(name: str, kind: type) -> Any:
        def make(*arguments: Any, **options: Any) -> Any:
            setattr(evaluate, name, kind(*arguments, **options))
            return getattr(evaluate, name)

        return make

    monkeypatch.setattr(evaluation, "TaskMeasures", keep("task", Task))
    monkeypatch.setattr(evaluation, "tqdm", keep("bar", Bar))
    return evaluate


def scores_of(row: int, seeds: tuple = (5, 6)) -> dict[str, list[float]]:
    length = [row + (seed or 0) for seed in seeds]
    return {"length": length, "rouge_l": [3.0 * value % 8 for value in length]}


def outputs_of(row: int, seeds: tuple = (5, 6)) -> list[str]:
    return [f"{OUTPUTS[seed]} {PROMPTS[row] if row % 2 else ''}" for seed in seeds]


def test_each_prompt_has_its_mean_over_the_seeds_and_each_seed_its_mean_over_the_prompts(run):
    found = run(seeds=[5, 6])
    outputs = [outputs_of(row) for row in range(6)]
    assert found.samples == [
        {
            "prompt": PROMPTS[row],
            "references": [PROMPTS[row].upper()],
            "outputs": outputs[row],
            "scores": scores_of(row),
        }
        for row in range(6)
    ]
    for row, values in enumerate(found.per_prompt):
        scores = scores_of(row)
        assert values == {
            "length": row + 5.5,
            "rouge_l": sum(scores["rouge_l"]) / 2,
            "best_rouge_l": max(scores["rouge_l"]),
            "distinct_outputs": distinct_outputs(outputs[row]),
            "distinct_4grams": distinct_ngrams(outputs[row], 4),
            "self_bleu": self_bleu(outputs[row]),
            "loss": 0.25 * row,
        }
    rouge_l = [sum(scores_of(row)["rouge_l"][number] for row in range(6)) / 6 for number in range(2)]
    assert found.by_seed == {"length": [7.5, 8.5], "rouge_l": rouge_l}
    assert found.corpus == {"distinct_4grams": distinct_ngrams([text for row in outputs for text in row], 4)}
    assert found.summary.keys() == found.per_prompt[0].keys()
    for name, interval in found.summary.items():
        assert interval.mean == pytest.approx(sum(row[name] for row in found.per_prompt) / 6)
        assert interval.low <= interval.mean <= interval.high


def test_buckets_are_those_of_the_paper(run):
    buckets = run(seeds=[5]).buckets
    assert [(each["low"], each["high"], each["prompts"]) for each in buckets] == [(0, 5, 2), (6, 10, 2), (11, None, 2)]
    assert [each["summary"]["length"]["mean"] for each in buckets] == [5.5, 7.5, 9.5]
    assert all(MeanInterval(**each["summary"]["length"]).low <= each["summary"]["length"]["mean"] for each in buckets)
    assert [each["low"] for each in run(seeds=[5], prompts=3).buckets] == [0, 6]  # none is empty


def test_one_sample_has_no_diversity_and_prompts_alone_no_quality(run):
    one = run(seeds=[5])
    assert one.summary.keys() == {"length", "rouge_l", "loss"}
    assert one.by_seed == {
        "length": [7.5],
        "rouge_l": [sum(scores_of(row, (5,))["rouge_l"][0] for row in range(6)) / 6],
    }
    alone = run(seeds=[5, 6], references=False)
    assert alone.summary.keys() == {"length", "distinct_outputs", "distinct_4grams", "self_bleu"}
    assert alone.buckets == []
    assert [sample["references"] for sample in alone.samples] == [[]] * 6
    assert run.task.measured == [("samples", 5), ("samples", 6)]


def test_greedy_decoding_is_one_run_without_a_seed(run):
    found = run(seeds=None)
    assert run.task.measured == [("samples", None), ("loss",)]
    assert (found.settings["seeds"], found.settings["greedy"]) == ([], True)
    assert [sample["outputs"] for sample in found.samples] == [outputs_of(row, (None,)) for row in range(6)]


def test_references_have_no_loss_on_request(run):
    assert "loss" not in run(seeds=[5], loss=False).summary
    assert run.task.measured == [("samples", 5)]


def test_teacher_adds_what_is_asked_of_it(run):
    assert run(seeds=[5], teacher="teacher").exposure_bias is None
    assert run.task.measured == [("samples", 5), ("loss",)]
    found = run(seeds=[5, 6], teacher="teacher", forward_kl=True)
    assert found.exposure_bias is None
    assert [row["forward_kl"] for row in found.per_prompt] == [0.5 * row * 5.5 for row in range(6)]
    assert found.by_seed["forward_kl"] == [0.5 * 2.5 * seed for seed in (5, 6)]
    assert [row["length"] for row in found.per_prompt] == [row + 5.5 for row in range(6)]
    assert run(seeds=[5, 6], teacher="teacher", exposure_bias_samples=1).exposure_bias == excess_accumulated_error(
        *ERRORS
    )
    assert run.task.measured[-1] == ("errors", "teacher", 1, 5, True)


def test_task_is_given_the_request_and_the_settings_name_it(run):
    found = run(seeds=[5, 6])
    with pytest.raises(AttributeError):
        found.settings = {}
    assert run.task.given == ("model", None, "tokenizer", 1.0, 0, None)
    decoding = {"max_new_tokens": 8, "temperature": 1.0, "batch_size": 64}
    assert run.task.decoding == {**decoding, "eos_tokens": None, "chat_template_kwargs": None}
    settings = {"seeds": [5, 6], "greedy": False, "temperature": 1.0, "teacher_temperature": 1.0}
    settings |= {"no_repeat_ngram_size": 0, "max_new_tokens": 8, "prompts": 6, "exposure_bias_samples": 0}
    assert found.settings == settings
    options = {"temperature": 0.5, "no_repeat_ngram_size": 6, "teacher": "teacher", "exposure_bias_samples": 2}
    others = {"batch_size": 3, "eos_tokens": ["<end>"], "chat_template_kwargs": {"thinks": False}}
    found = run(seeds=[5, 6], **options, **others, shared="shared")
    assert run.task.given == ("model", "teacher", "tokenizer", 0.5, 6, "shared")
    assert run.task.decoding == {"max_new_tokens": 8, "temperature": 0.5, **others}
    options.pop("teacher")
    assert found.settings == {**settings, **options, "teacher_temperature": 0.5}
    assert run(seeds=[5], temperature=0.5, teacher_temperature=2.0).settings["teacher_temperature"] == 2.0
    assert run.task.given[3] == 2.0


def test_parts_are_measured_once(run):
    options = {"teacher": "teacher", "forward_kl": True, "exposure_bias_samples": 1, "progress": False}
    parts = Parts()
    first = run(seeds=[5], parts=parts, **options)
    assert parts.keys() == {"seed-5", "forward_kl-5", "loss", "exposure_bias"}
    assert run(seeds=[5], parts=parts, **options) == first
    assert run.task.measured == []
    both = run(seeds=[5, 6], parts=parts, **options)
    assert run.task.measured == [("samples", 6), ("forward_kl", "teacher", 6)]
    assert both == run(seeds=[5, 6], **options)
    run(seeds=None, parts=parts)
    assert "greedy" in parts


def test_only_the_main_process_writes_parts(run, monkeypatch):
    monkeypatch.setattr(evaluation, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    parts = Parts()
    assert run(seeds=[5], parts=parts) == run(seeds=[5])
    assert parts == {}


@pytest.mark.parametrize("forward_kl", [False, True])
def test_progress_is_of_all_samples_and_of_stored_ones(run, forward_kl: bool):
    parts = Parts()
    for seeds in ([5], [5, 6, 6]):
        run(seeds=seeds, parts=parts, teacher="teacher", forward_kl=forward_kl)
        assert run.bar.total == run.bar.n == 6 * len(seeds) * (2 if forward_kl else 1)
        assert not run.bar.disable
    run(seeds=[5], progress=False)
    assert run.bar.disable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [5], "prompts": 0}, "Nothing to evaluate: 0 prompts and 1 seeds"),
        ({"seeds": None, "prompts": 0}, "Nothing to evaluate: 0 prompts and 0 seeds"),
        ({"seeds": []}, "Nothing to evaluate: 6 prompts and 0 seeds"),
        ({"seeds": [5], "forward_kl": True}, "need a teacher"),
        ({"seeds": [5], "exposure_bias_samples": 1}, "need a teacher"),
        ({"seeds": None, "forward_kl": True, "teacher": "teacher"}, "seeds=None decodes greedily"),
        ({"seeds": None, "exposure_bias_samples": 1, "teacher": "teacher"}, "seeds=None decodes greedily"),
    ],
)
def test_request_without_a_meaning_is_refused_before_the_models_are_used(run, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert run.task is None


def test_evaluation_without_samples_has_no_measures_of_a_corpus():
    found = Evaluation({}, [], [], {}, {})
    assert (found.corpus, found.buckets, found.exposure_bias, found.calibration) == ({}, [], None, None)


def test_one_prompt_and_one_seed_are_enough(run):
    assert run(seeds=[5], prompts=1).settings["prompts"] == 1
    assert run(seeds=None, prompts=1, teacher="teacher").settings["greedy"]
