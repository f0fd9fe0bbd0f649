"""The comparison of methods: each trains, the numbers are what they say, and the tables are those of the results."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset, DatasetDict

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))

import sizes  # noqa: E402 - lies in a folder that is no package
import summarize  # noqa: E402
from methods import METHODS, generate_seqkd_data, train  # noqa: E402
from run import FIRST_RATES, LEARNING_RATES, SEEDS, Run, best_learning_rates, identity, rates_to_try, validation_scores  # noqa: E402
from tasks import TASKS, Task  # noqa: E402


class SmallTask(Task):
    def load_data(self, folder: Path) -> DatasetDict:
        rows = [{"prompt": f"the mill {i}\n", "completion": f"is a pub {i}"} for i in range(160)]
        return DatasetDict({"train": Dataset.from_list(rows)})


SMALL = SmallTask(**{**vars(TASKS["e2e"]), "max_completion_length": 8, "seqkd_samples": 2})


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_the_student_and_leaves_the_teacher(tmp_path, name):
    tokenizer = build_tokenizer()
    student, teacher = (build_model("llama", len(tokenizer), seed).float() for seed in (0, 1))
    before = weights(student), weights(teacher)
    generate_seqkd_data(SMALL, tmp_path, _ends_at_once(teacher, tokenizer), tokenizer)
    train(replace(METHODS[name], updates=2), SMALL, tmp_path / "run", student, teacher, tokenizer, 1e-2, 0)
    assert not torch.equal(weights(student), before[0])
    assert torch.equal(weights(teacher), before[1])


def _ends_at_once(teacher, tokenizer):
    """The teacher, which as it is would not end within the limit."""
    ending = build_model("llama", len(tokenizer), 1)
    head = ending.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    with torch.no_grad():
        head.bias[tokenizer.eos_token_id] = 8.0
    return ending


def test_ablations_differ_from_minillm_in_what_they_say():
    base = METHODS["minillm"]
    changed = {
        "no_mixing": {"teacher_mixed_alpha": 0.0},
        "no_single_step": {"single_step_decomposition": False, "include_current_reward": True},
        "no_length_norm": {"length_normalization": False},
        "lpt": {},
    }
    for name, expected in changed.items():
        other = METHODS[name]
        difference = {key: value for key, value in other.options.items() if base.options.get(key) != value}
        assert difference == expected
        assert other.corpus == (name == "lpt")
        assert other.updates == base.updates


def test_learning_rates_are_chosen_by_validation_rouge_l_of_the_first_seed(tmp_path):
    for method, best in (("sft", 1e-2), ("minillm", 1e-3)):
        for rate in LEARNING_RATES[FIRST_RATES]:
            run = Run("e2e", method, rate, SEEDS[0])
            path = tmp_path / run.name / "train.json"
            path.parent.mkdir()
            score = 50.0 + (rate == best)
            path.write_text(json.dumps({"identity": identity(run), "validation": {"rouge_l": score}}))
    assert best_learning_rates(tmp_path, "e2e", ["sft", "minillm"]) == {"sft": 1e-2, "minillm": 1e-3}
    assert validation_scores(tmp_path, "e2e", "sft") == {1e-4: 50.0, 3e-4: 50.0, 1e-3: 50.0, 3e-3: 50.0, 1e-2: 51.0}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({}, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
        ({1e-4: 50.0, 3e-4: 50.0, 1e-3: 50.0, 1e-2: 49.0}, [3e-3]),
        (dict(zip(LEARNING_RATES, [50.0, 50.0, 52.0, 51.0, 50.0], strict=False)), []),
        (dict(zip(LEARNING_RATES, [53.0, 50.0, 52.0, 51.0, 50.0], strict=False)), []),
        (dict(zip(LEARNING_RATES, [50.0, 50.0, 50.0, 51.0, 52.0], strict=False)), [3e-2]),
        (dict(zip(LEARNING_RATES, [50.0, 50.0, 50.0, 51.0, 52.0, 53.0, 54.0], strict=True)), []),  # the ladder ends
    ],
)
def test_five_rates_are_tried_and_higher_ones_while_the_best_is_the_highest(scores, expected):
    assert rates_to_try(scores) == expected


class TestIntervals:
    def test_without_variance_it_is_a_point(self):
        assert summarize.interval(np.full((3, 20), 2.0)) == [2.0, 2.0, 2.0]

    def test_training_seeds_count_as_well_as_prompts(self):
        generator = np.random.default_rng(1)
        prompts = generator.normal(size=200)
        same = summarize.interval(np.tile(prompts, (3, 1)))
        apart = summarize.interval(np.stack([prompts - 1, prompts, prompts + 1]))
        # of prompts alone: 1.96 standard errors on either side
        assert same[2] - same[1] == pytest.approx(2 * 1.96 * prompts.std() / np.sqrt(200), rel=0.1)
        # of seeds alone: those of a mean of three draws from -1, 0, 1
        assert apart[2] - apart[1] > 1.2
        assert apart[0] == pytest.approx(prompts.mean())


@pytest.mark.parametrize(
    "path", sorted((QUALITY.parent / "results").glob("quality_*.json")), ids=lambda path: path.stem
)
def test_tables_are_those_of_the_results(path: Path):
    name = path.stem.removeprefix("quality_")
    results = json.loads(path.read_text())["results"]
    expected = sizes.table(results["sizes"], results["teacher"]) if name == "sizes" else summarize.table(results)
    text = (QUALITY / "README.md").read_text()
    start, end = f"<!-- {name}: made by a script -->\n", f"\n<!-- end of {name} -->"
    assert text.split(start)[1].split(end)[0] == expected
