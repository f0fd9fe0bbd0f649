"""Which prompts a comparison shows with the models' answers, and what it says of each answer."""

import random
from types import SimpleNamespace

import pytest

from minillm_trl.evaluation.answers import side_by_side

RANDOM = "Drawn at random (seed 0)"
DRAWN = sorted(random.Random(0).sample(range(8), 2))
LEFT = [row for row in range(8) if row not in DRAWN]


def result(name: str, rouge_l: list[float] | None, count: int = 8) -> SimpleNamespace:
    samples = [
        {"prompt": f"x{row}", "references": [f"r{row}"], "outputs": [f"{name} {row}", "of another seed"]}
        for row in range(count)
    ]
    rows = [{} for _ in range(count)] if rouge_l is None else [{"rouge_l": value} for value in rouge_l]
    return SimpleNamespace(samples=samples, per_prompt=rows, summary=rows[0])


def spread(**gains: float) -> list[float]:
    """Rouge-L of 10 for each prompt, and more for some, such as `x3=5.0`."""
    return [10.0 + gains.get(f"x{row}", 0.0) for row in range(8)]


def prompts(groups: dict) -> dict[str, list[str]]:
    return {heading: [sample.prompt for sample in samples] for heading, samples in groups.items()}


def test_random_prompts_are_in_their_order_with_each_model_s_first_answer():
    found = side_by_side({"a": result("a", None), "b": result("b", None)}, ["a", "b"], 2)
    assert prompts(found) == {RANDOM: [f"x{row}" for row in DRAWN]}
    for row, sample in zip(DRAWN, found[RANDOM], strict=True):
        assert sample.references == [f"r{row}"]
        assert sample.outputs == {"a": f"a {row}", "b": f"b {row}"}
        assert sample.scores == {"a": "", "b": ""}


@pytest.mark.parametrize("count", [8, 9])
def test_there_are_no_more_than_the_prompts(count: int):
    assert prompts(side_by_side({"a": result("a", None)}, ["a"], count)) == {RANDOM: [f"x{row}" for row in range(8)]}


def test_others_are_those_that_differ_most_and_were_not_drawn():
    one, two, three = LEFT[3], LEFT[0], LEFT[4]
    higher = {f"x{one}": 0.5, f"x{two}": 0.25, f"x{three}": -7.0, f"x{DRAWN[0]}": 90.0}
    results = {"a": result("a", spread()), "b": result("b", spread(**higher)), "c": result("c", spread())}
    heading = "Where the students differ most in Rouge-L, mean over seeds"
    found = prompts(side_by_side(results, ["a", "b", "c"], 2))
    assert found[heading] == [f"x{three}", f"x{one}"]
    few = {name: each for name, each in results.items() if name != "c"}
    assert prompts(side_by_side(few, ["a", "b"], 2))[heading] == found[heading]
    assert prompts(side_by_side(few, ["a", "b"], 4))[RANDOM] != found[RANDOM]
    equal = {"a": results["a"], "c": results["c"]}
    assert prompts(side_by_side(equal, ["a", "c"], 2)) == {RANDOM: found[RANDOM]}


def test_all_that_differ_are_shown_with_equal_differences_in_their_order():
    gains = {f"x{row}": 3.0 for row in LEFT[:3]}
    found = side_by_side({"a": result("a", spread()), "b": result("b", spread(**gains))}, ["a", "b"], 2)
    assert prompts(found)["Where the students differ most in Rouge-L, mean over seeds"] == [
        f"x{row}" for row in LEFT[:2]
    ]


@pytest.mark.parametrize(("students", "kind", "row"), [(["a", "b"], "students", 0), (["a"], "models", 1)])
def test_students_are_compared_where_there_are_two(students: list[str], kind: str, row: int):
    ours, theirs = {f"x{LEFT[0]}": 3.0}, {f"x{LEFT[1]}": 9.0}
    results = {"t": result("t", spread(**theirs)), "a": result("a", spread()), "b": result("b", spread(**ours))}
    found = prompts(side_by_side(results, students, 2))
    assert found[f"Where the {kind} differ most in Rouge-L, mean over seeds"][0] == f"x{LEFT[row]}"


def test_models_without_rouge_l_are_shown_but_not_compared():
    gains = {f"x{LEFT[0]}": 3.0}
    results = {"a": result("a", spread()), "b": result("b", None), "c": result("c", spread(**gains))}
    (heading, differing) = list(side_by_side(results, ["a", "b", "c"], 2).items())[1]
    assert heading == "Where the students differ most in Rouge-L, mean over seeds"
    assert [sample.prompt for sample in differing] == [f"x{LEFT[0]}"]
    assert list(differing[0].outputs) == ["a", "b", "c"]


def test_classification_has_no_answers():
    labels = result("a", None)
    labels.samples = [{**sample, "outputs": []} for sample in labels.samples]
    assert side_by_side({"a": labels}, ["a"], 2) == {}


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ({"rouge_l": [20.0, 45.26], "length": [7, 9]}, "Rouge-L 20.0 (all seeds 32.6), 7 tokens"),
        ({"rouge_l": [20.0], "length": [7]}, "Rouge-L 20.0, 7 tokens"),
        ({"rouge_l": [0.0, 6.0, 3.0]}, "Rouge-L 0.0 (all seeds 3.0)"),
        ({"length": [7, 9]}, "7 tokens"),
        ({"rouge_l": [], "length": []}, ""),
    ],
)
def test_answer_is_the_first_seed_s_with_its_scores(scores: dict, text: str):
    one = result("a", None, count=1)
    one.samples[0]["scores"] = scores
    assert side_by_side({"a": one}, ["a"], 1)[RANDOM][0].scores == {"a": text}
