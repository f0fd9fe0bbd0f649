"""The benchmark on real models, with a tiny teacher: stages, every method, both tables; finished runs stay."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from chat_models import save_small_smollm2, write_small_dolly
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm_trl.evaluation.exposure_bias import excess_accumulated_error

REAL = Path(__file__).parents[2] / "benchmarks" / "real"
sys.path.insert(0, str(REAL))

import demo_time  # noqa: E402 - lies in a folder that is no package
import real_measures  # noqa: E402
import real_methods  # noqa: E402
import real_run  # noqa: E402
import real_summary  # noqa: E402
import real_tables  # noqa: E402

SMALL = replace(
    real_methods.SCALES["cpu"],
    batch=2,
    answer_tokens=4,
    seconds=0,
    validation_rows=3,
    test_rows=10,
    recipe={
        "dolly": {"validation_rows": 10, "test_rows": 10},
        "answers": {"max_completion_length": 4},
        "heal": {"max_steps": 1},
    },
)

FEW_STEPS = {"max_steps": 1, "save_steps": 1}
SMALL_CONTEXT = replace(
    SMALL,
    task="context",
    test_rows=2,
    recipe=SMALL.recipe
    | {"context": {"validation_rows": 1, "test_rows": 2}, "context_answers": {"max_completion_length": 4}}
    | {"context_teacher": FEW_STEPS, "context_start": FEW_STEPS},
)


@pytest.fixture
def benchmark(tmp_path, monkeypatch) -> real_run.Benchmark:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(real_methods.SCALES, "small", SMALL)
    monkeypatch.setitem(real_methods.SCALES, "small_context", SMALL_CONTEXT)
    monkeypatch.setattr(real_run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(real_summary, "RESULTS", tmp_path / "results")
    for module in (real_run, real_summary):
        monkeypatch.setattr(module, "LEARNING_RATES", (1e-3,))
        monkeypatch.setattr(module, "SEEDS", (3, 4))
    monkeypatch.setattr(real_run, "PROBE_UPDATES", 1)
    teacher = save_small_smollm2(tmp_path / "teacher")
    folder = tmp_path / "runs"
    folder.mkdir()
    dolly = write_small_dolly(tmp_path, 40)
    kinds = [("it is", "closed_qa"), ("", "closed_qa"), ("it is", "open_qa"), ("it is", "summarization")]
    kinds += [("it is", "information_extraction")] * 9
    rows = [
        {"instruction": f"read {number}", "context": context, "response": "it", "category": category}
        for number, (context, category) in enumerate(kinds)
    ]
    write_lines(dolly, [*rows, *map(json.loads, dolly.read_text().splitlines())])
    test_sets = {"selfinst": write_small_selfinst(tmp_path), "vicuna": write_small_vicuna(tmp_path / "vicuna")}
    return real_run.Benchmark(folder, "small", str(teacher), dolly, test_sets)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_small_selfinst(folder: Path) -> Path:
    rows = [{"instruction": f"name {row}", "instances": [{"input": "", "output": f"{row}"}]} for row in range(7)]
    return write_lines(folder / "user_oriented_instructions.jsonl", rows)


def write_small_vicuna(folder: Path) -> Path:
    write_lines(
        folder / "question.jsonl", [{"question_id": 1, "turns": ["why"]}, {"question_id": 2, "turns": ["how"]}]
    )
    answers = [{"question_id": "2", "text": "so"}, {"question_id": "1", "text": "since"}]
    return write_lines(folder / "answer_gpt35.jsonl", answers).parent


@pytest.fixture
def measured(benchmark) -> real_run.Benchmark:
    """A benchmark with teacher, healed student and test prompts, but no records."""
    for seed, name in enumerate(("teacher", "heal")):
        torch.manual_seed(seed)
        save_small_smollm2(benchmark.model(name))
        model = AutoModelForCausalLM.from_pretrained(benchmark.model(name))
        model.get_input_embeddings().weight.data *= 30  # so that the models differ; the head is tied
        model.save_pretrained(benchmark.model(name))
    prompts = [[{"role": "user", "content": f"say {row}"}] for row in range(12)]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "it is"}]} for prompt in prompts]
    data = benchmark.folder / "data" / "smollm2_dolly"
    data.parent.mkdir()
    for split, chosen in (("test", rows[:10]), ("validation", rows[10:11]), ("train", rows[11:])):
        write_lines(data / f"{split}.jsonl", chosen)
    return benchmark


def work_all(benchmark: real_run.Benchmark, methods: list[str]) -> None:
    real_run.work(lambda: real_run.jobs(benchmark, methods), benchmark.folder / "locks")


@pytest.mark.slow
def test_whole_benchmark(benchmark, capsys):
    real_run.run_stages(benchmark, list(real_methods.METHODS))
    real_run.prepare_test_sets(benchmark)
    work_all(benchmark, list(real_methods.METHODS))
    assert not list(real_run.jobs(benchmark, list(real_methods.METHODS)))
    assert set(benchmark.record("heal")["healing"]) == {"seconds", "forward_kl"}
    record = benchmark.record("minillm-0.001-4")
    assert {name: len(found["greedy"]["rouge_l"]) for name, found in record["other_prompts"].items()} == {
        "context": 8,
        "selfinst": 5,
        "vicuna": 2,
    }
    assert len(record["forward_errors"]["on_model"]) == 5
    summary = real_summary.summarize("small")
    assert list(summary["rows"]) == ["teacher", "heal", *real_methods.METHODS]
    assert summary["rows"]["minillm"]["seeds"] == [3, 4]
    assert summary["rows"]["minillm"]["updates"] == real_methods.METHODS["minillm"].multiple
    measures = summary["rows"]["minillm"]["measures"]
    assert measures.keys() >= real_tables.QUALITY.keys() | real_tables.DIVERGENCE.keys()
    (position,) = {summary["exposure_bias_position"]} & set(range(1, 5))
    errors = [benchmark.record(f"minillm-0.001-{seed}")["forward_errors"] for seed in (3, 4)]
    biases = [excess_accumulated_error(run["on_model"], run["on_teacher"]).excess_error for run in errors]
    assert measures["exposure_bias"][0] == pytest.approx(np.mean([bias[position - 1] for bias in biases]))
    greedy = summary["rows"]["sft"]["decodings"]["greedy"]
    logp = summary["rows"]["sft"]["measures"]["greedy_teacher_logp"][0]
    assert logp == pytest.approx(-greedy["reverse_kl_per_token"][0])
    for parts in real_tables.pages(summary, "cpu").values():
        assert all("MiniLLM" in part for part in parts.values())
    assert len(summary["answers"]["rows"]) == real_measures.ANSWERS
    real_tables.plot(summary, benchmark.folder / "figure.png")


@pytest.mark.slow
def test_whole_benchmark_on_prompts_with_a_context(benchmark):
    benchmark, methods = replace(benchmark, scale_name="small_context", test_sets={}), ["sft", "minillm", "healing"]
    real_run.run_stages(benchmark, methods)
    real_run.prepare_test_sets(benchmark)
    work_all(benchmark, methods)
    assert not list(real_run.jobs(benchmark, methods))
    models = {path.name for path in (benchmark.folder / "context" / "models").iterdir()}
    assert models == {f"{method}-0.001-{seed}" for method in methods for seed in (3, 4)}
    assert not (benchmark.folder / "models").exists()  # those of the other task
    record = benchmark.record("minillm-0.001-3")
    assert "other_prompts" not in record
    assert all("it is" in answer["prompt"] for answer in record["answers"])
    summary = real_summary.summarize("small_context")
    assert list(summary["rows"]) == ["context_teacher", "context_start", "sft", "healing", "minillm"]
    assert set(summary["rows"]["minillm"]["minus"]) == {"context_start", "sft", "healing"}
    (parts,) = real_tables.pages(summary, "cpu_context").values()
    assert "SelfInst" not in parts["context quality"]  # a column without a value


def test_answers_of_the_teacher_are_made_where_a_method_takes_them(benchmark, monkeypatch):
    benchmark, stages = replace(benchmark, scale_name="small_context"), []
    monkeypatch.setattr("minillm_trl.cli.main", lambda words: stages.append(Path(words[2]).stem) or 0)
    real_run.run_stages(benchmark, ["sft", "kd"])
    assert stages == ["teacher", "dolly", "start", "answers", "heal", "context", "context_teacher", "context_start"]
    real_run.run_stages(benchmark, ["seqkd"])
    assert stages[8:] == ["context_answers"]
    stages.clear()
    (benchmark.folder / "stages" / "answers.json").unlink()
    real_run.run_stages(replace(benchmark, scale_name="small"), ["sft"])
    assert stages == ["answers"]  # they heal the student


def test_stage_of_data_reads_the_given_copy_of_dolly(benchmark, monkeypatch):
    benchmark, sources = replace(benchmark, scale_name="small_context"), {}

    def run(words: list[str]) -> int:
        sources[Path(words[2]).stem] = yaml.safe_load(Path(words[2]).read_text()).get("source")
        return 0

    monkeypatch.setattr("minillm_trl.cli.main", run)
    real_run.run_stages(benchmark, ["sft"])
    assert {stage for stage, source in sources.items() if source == str(benchmark.dolly)} == {"dolly", "context"}


def test_forward_errors_are_the_divergences_of_the_samples(measured):
    errors = real_measures.forward_errors(measured, "heal")
    tokens = json.loads((measured.folder / "measures" / "teacher_samples.json").read_text())["token_ids"]
    tokenizer = AutoTokenizer.from_pretrained(measured.model("heal"))
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(measured.model(name)).double() for name in ("teacher", "heal")
    )
    assert [len(values) for values in errors["on_teacher"]] == [len(ids) for ids in tokens]
    assert len(errors["on_model"]) == len(tokens) == 5
    for row, (ids, found) in enumerate(zip(tokens, errors["on_teacher"], strict=True)):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"say {row}"}], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            p, q = (
                model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for model in (teacher, student)
            )
        assert found == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=6e-5)
        assert min(found) > 0.1
    assert errors["on_model"] != errors["on_teacher"]


def test_teacher_is_sampled_once(measured, monkeypatch):
    found = real_measures.forward_errors(measured, "heal")["on_teacher"]
    path = measured.folder / "measures" / "teacher_samples.json"
    record = json.loads(path.read_text())
    record["token_ids"] = [ids[:2] for ids in record["token_ids"]]
    path.write_text(json.dumps(record))
    assert real_measures.forward_errors(measured, "heal")["on_teacher"] == [values[:2] for values in found]
    monkeypatch.setattr(real_measures, "SEED", 11)  # the samples are of another seed
    assert max(map(len, real_measures.forward_errors(measured, "heal")["on_teacher"])) == 4


def test_distinct_ngrams_are_those_of_all_answers(benchmark):
    for decoding in real_measures.TEMPERATURES:
        folder = "greedy" if decoding == "greedy" else f"temperature_{decoding}"
        rows = [{"outputs": ["a b a"]}, {"outputs": ["a b"]}] if decoding == "greedy" else [{"outputs": ["a b c"]}]
        path = benchmark.folder / "measures" / "test" / "heal" / folder / "samples.jsonl"
        path.parent.mkdir(parents=True)
        write_lines(path, rows)
    found = real_measures.distinct(benchmark, "heal")
    assert found["greedy"] == {"1": 2 / 5, "2": 0.66667, "3": 1.0}
    assert found["0.7"] == {"1": 1.0, "2": 1.0, "3": 1.0}


def test_lacking_measures_are_added_while_the_model_exists(benchmark, monkeypatch, capsys):
    run = real_run.Run("sft", 1e-3, 3)
    old = {"identity": real_run.identity(benchmark, run), "validation": {}, "test": {"1.0": {"rouge_l": [7.0]}}}
    benchmark.write(run.name, old)
    assert not list(real_run._runs(benchmark, [run], test=True))
    real_run.print_incomplete(benchmark)
    assert "sft-0.001-3 lacks answers, distinct, forward_errors, other_prompts" in capsys.readouterr().out
    benchmark.model(run.name).mkdir(parents=True)
    real_run.print_incomplete(benchmark)
    assert not capsys.readouterr().out
    for part in ("first_answers", "distinct", "forward_errors", "other_prompts"):
        values = {"context": {}, "selfinst": {}, "vicuna": {}} if part == "other_prompts" else {}
        monkeypatch.setattr(real_measures, part, lambda benchmark, name, values=values: values)
    ((name, job),) = real_run._runs(benchmark, [run], test=True)
    job()
    record = benchmark.record(name)
    assert record.keys() >= {"answers", "distinct", "forward_errors", "other_prompts"}
    assert record["test"] == old["test"]
    assert not list(real_run._runs(benchmark, [run], test=True))
    real_run.print_incomplete(benchmark)
    assert not capsys.readouterr().out


def test_record_of_another_student_does_not_count(benchmark):
    benchmark.write("heal", {"validation": {}})
    assert "validation" in benchmark.record("heal")
    scale = replace(SMALL, recipe=SMALL.recipe | {"start": {"num_layers": 12, "layers": None}})
    vars(benchmark)["scale"] = scale  # a cached property
    del vars(benchmark)["recipe"]
    assert benchmark.record("heal") == {}


def test_results_of_a_former_model_do_not_stay(measured):
    path = real_measures.evaluation_folder(measured, "test", "heal") / "greedy" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert real_measures.evaluation_folder(measured, "test", "heal") == path.parent.parent
    assert path.is_file()
    os.utime(path, ns=(0, 0))
    real_measures.evaluation_folder(measured, "test", "heal")
    assert not path.exists()


def test_further_test_set_is_added_to_a_record(benchmark):
    parts = {part: {} for part in ("test", "answers", "distinct")}
    benchmark.write("teacher", parts | {"other_prompts": {"context": {}, "selfinst": {}}})
    assert list(real_measures.missing_parts(benchmark, "teacher")) == ["other_prompts"]
    assert not real_measures.missing_parts(replace(benchmark, test_sets={"selfinst": Path()}), "teacher")


def test_other_test_sets_are_held_out(measured, capsys):
    def chosen() -> dict[str, list[str]]:
        real_measures.prepare_test_sets(measured)
        files = {name: real_measures.test_set(measured, name) / "test.jsonl" for name in real_measures.OTHERS}
        rows = {name: map(json.loads, path.read_text().splitlines()) for name, path in files.items()}
        return {name: [row["prompt"][0]["content"] for row in found] for name, found in rows.items()}

    with_context = [f"read {number}\n\nit is" for number in (0, *range(3, 12))]
    found = {"context": with_context, "selfinst": [f"name {row}" for row in range(7)], "vicuna": ["why", "how"]}
    assert chosen() == found
    for split, prompt in (("train", with_context[0]), ("validation", "how")):
        question = [{"role": "user", "content": prompt}]
        row = {"prompt": question, "completion": [{"role": "assistant", "content": "it is"}]}
        write_lines(measured.folder / "data" / "smollm2_dolly" / f"{split}.jsonl", [row])
    assert chosen() == found | {"context": with_context[1:], "vicuna": ["why"]}
    assert "context: 9 of 10 prompts are held out" in capsys.readouterr().out
    write_lines(measured.test_sets["selfinst"], [{"instruction": "how", "instances": [{"output": "it is"}]}])
    with pytest.raises(SystemExit, match="selfinst: the models are trained or chosen on all 1 prompts"):
        real_measures.prepare_test_sets(measured)


@pytest.mark.parametrize("words", [[], ["--selfinst", "a", "--skip", "selfinst", "vicuna"], ["--skip", "vicuna"]])
def test_test_sets_are_given_or_skipped(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["real_run.py", *words])
    with pytest.raises(SystemExit) as raised:
        real_run.main()
    assert raised.value.code == 2
    assert "give either --selfinst" in capsys.readouterr().err


def test_best_rate_is_that_of_the_validation_prompts(benchmark, monkeypatch):
    monkeypatch.setattr(real_run, "LEARNING_RATES", (1e-4, 3e-4))
    for rate, score in ((1e-4, 20.0), (3e-4, 30.0)):
        assert real_run.best_rate(benchmark, "sft") is None
        run = real_run.Run("sft", rate, 3)
        found = {decoding: {"rouge_l": [score, score + 2]} for decoding in ("1.0", "greedy")}
        benchmark.write(run.name, {"identity": real_run.identity(benchmark, run), "validation": found})
    assert real_run.best_rate(benchmark, "sft") == 3e-4


def test_record_of_other_settings_is_not_taken(benchmark, monkeypatch):
    run = real_run.Run("minillm", 1e-3, 3)
    benchmark.write(run.name, {"identity": real_run.identity(benchmark, run), "validation": {}})
    assert real_run.trained(benchmark, run)
    changed = replace(real_methods.METHODS["minillm"], options={"teacher_mixed_alpha": 0.5})
    monkeypatch.setitem(real_methods.METHODS, "minillm", changed)
    assert not real_run.trained(benchmark, run)


def test_entropies_are_those_that_all_runs_reach():
    def run(*entropies: float) -> dict:
        values = zip(real_summary.SAMPLED, entropies, strict=True)
        return {"test": {decoding: {"entropy_per_token": [value, value]} for decoding, value in values}}

    entropies = real_summary.shared_entropies([run(3.0, 2.0, 1.0), run(2.5, 1.5, 0.5)])
    assert np.allclose([entropies[0], entropies[-1]], [1.0, 2.5])


def test_failed_job_does_not_stop_the_others(benchmark, monkeypatch, capsys):
    done = []

    def jobs(benchmark, methods):
        yield from ((name, partial(run, name)) for name in ("a", "b") if name not in done)

    def run(name):
        if name == "a":
            raise RuntimeError("no memory")
        done.append(name)

    monkeypatch.setattr(real_run, "jobs", jobs)
    with pytest.raises(SystemExit, match="failed: a"):
        work_all(benchmark, [])
    assert done == ["b"]
    assert "no memory" in capsys.readouterr().err


def test_pages_say_what_was_measured():
    root = REAL.parents[1]
    results = root / "benchmarks" / "results"
    healing = json.loads((results / "real" / "cpu" / "heal.json").read_text())["healing"]
    minutes = {stage: round(seconds / 60) for stage, seconds in healing["seconds"].items()}
    page = " ".join((root / "recipes" / "smollm2-92m" / "README.md").read_text().split())
    assert f"the healing took {minutes['heal']} minutes." in page
    first, last = healing["forward_kl"][0], healing["forward_kl"][-1]
    assert f"from {first:.1f} nats a token in the first ten updates to {last:.1f} in the last ten" in page
    rows = json.loads((results / "real_cpu.json").read_text())["results"]["rows"]
    front = " ".join((root / "README.md").read_text().split())
    page = " ".join((REAL / "README.md").read_text().split())

    def fall(name: str, rival: str, measure: str) -> str:
        mean, low, high = (-value for value in rows[name]["minus"][rival][measure])
        return f"{mean:.2f} [{high:.2f}, {low:.2f}]"

    def with_unit(text: str) -> str:
        return text.replace(" [", " nats a token [")

    paper, low_variance = (fall(name, "heal", "reverse_kl_per_token") for name in ("minillm", "low_variance_cool"))
    assert f"lowers the reverse KL by {with_unit(paper)}" in front
    assert f"by {with_unit(paper)} with the paper's MiniLLM and by {low_variance}" in page
    equal, low_variance, sft, seqkd = (
        fall(name, rival, "equal_entropy_reverse_kl")
        for name, rival in (
            ("minillm", "heal"),
            ("low_variance_cool", "heal"),
            ("minillm", "sft"),
            ("minillm", "seqkd"),
        )
    )
    assert f"at equal entropy by {equal}" in front
    assert f"at equal entropy they are {equal} and {low_variance} below the start" in page
    assert f"it is {sft} above the paper's MiniLLM, and SeqKD is {seqkd} above it" in page
    forward = [
        "{:.2f} [{:.2f}, {:.2f}]".format(*rows[name]["minus"]["heal"]["forward_kl_per_token"])
        for name in ("minillm", "low_variance_cool")
    ]
    assert "rises by {} with the paper's MiniLLM, and by {}".format(*forward) in page
    seconds = {name: row["seconds"] for name, row in rows.items() if "seconds" in row}
    less = [round(100 - 100 * seconds[name] / seconds["minillm"]) for name in ("sft", "seqkd", "kd")]
    assert (
        "SFT trained for {} % fewer seconds than the paper's MiniLLM, SeqKD for {} %, KD for {} %".format(*less)
        in page
    )
    higher = {name for name, row in rows.items() if row.get("learning_rate") == max(real_run.LEARNING_RATES)}
    assert higher == {"sft", "gkd", "distillation_cool"}  # "the higher one was chosen for ..."
    differences = [
        interval
        for name in ("minillm", "low_variance_cool")
        for found in rows[name]["minus"].values()
        for measure, interval in found.items()
        if measure in real_tables.QUALITY
    ]
    clear = [interval for interval in differences if interval[1] > 0 or interval[2] < 0]
    assert len(clear) <= len(differences) / 20  # "about as many ... as chance would give"
    method = " ".join((root / "docs" / "method.md").read_text().split())
    means = [rows[name]["measures"]["reverse_kl_per_token"][0] for name in ("minillm", "low_variance_cool")]
    assert "({:.2f} nats a token against {:.2f} at temperature 1)".format(*means) in method


def test_page_says_what_a_longer_fine_tuned_start_gave():
    rows = json.loads((REAL.parent / "results" / "real_cpu_context_long.json").read_text())["results"]["rows"]
    page = " ".join((REAL / "README.md").read_text().split())
    start, sft = (rows["low_variance_cool"]["minus"][rival] for rival in ("context_sft", "sft"))
    mean, low, high = start["equal_entropy_rouge_l"]
    assert f"MiniLLM gains {mean:.1f} Rouge-L [{low:.1f}, {high:.1f}] on this start at equal entropy" in page
    assert sft["equal_entropy_rouge_l"][1] < 0 < sft["equal_entropy_rouge_l"][2]  # "as SFT continued does"
    less = 100 - 100 * rows["sft"]["seconds"] / rows["low_variance_cool"]["seconds"]
    assert f"From the longer start, SFT trained for {less:.0f} % fewer." in page
    mean, high, low = (-value for value in start["equal_entropy_reverse_kl"])
    assert f"falls by {mean:.2f} nats a token [{low:.2f}, {high:.2f}] at equal entropy" in page
    mean, high, low = (-value for value in sft["equal_entropy_reverse_kl"])
    assert f"ends {mean:.2f} [{low:.2f}, {high:.2f}] below SFT's" in page


def test_page_on_prompts_with_a_context_says_what_was_measured():
    summary = json.loads((REAL.parent / "results" / "real_cpu_context.json").read_text())["results"]
    rows = summary["rows"]
    page = " ".join((REAL / "README.md").read_text().split())
    front = " ".join((REAL.parents[1] / "README.md").read_text().split())
    gaps = [
        rows["context_teacher"]["decodings"][decoding]["rouge_l"][0]
        - rows["context_start"]["decodings"][decoding]["rouge_l"][0]
        for decoding in ("greedy", "1.0")
    ]
    assert "{:.1f} Rouge-L apart with greedy decoding, and {:.1f} at temperature 1".format(*gaps) in page

    def difference(rival: str, measure: str, sign: int = 1, digits: int = 2) -> str:
        mean, *ends = (sign * value for value in rows["low_variance_cool"]["minus"][rival][measure])
        return f"{mean:.{digits}f} [{min(ends):.{digits}f}, {max(ends):.{digits}f}]"

    def in_nats(text: str) -> str:
        return text.replace(" [", " nats a token [")

    kl = difference("context_start", "reverse_kl_per_token", -1)
    equal = {rival: difference(rival, "equal_entropy_reverse_kl", -1) for rival in ("context_start", "sft", "kd")}
    assert f"lowers the reverse KL by {in_nats(kl)} at temperature 1" in page
    assert f"at equal entropy by {equal['context_start']}. There, it is {equal['sft']} below SFT continued" in page
    assert f"and {equal['kd']} below KD" in page
    assert f"likelier, by {in_nats(difference('context_start', 'greedy_teacher_logp'))}" in page
    bias = difference("context_start", "exposure_bias", -1, digits=0).replace(" [", " points [")
    assert f"exposure bias falls by {bias}" in page
    assert f"forward KL rises by {difference('context_start', 'forward_kl_per_token')}" in page
    seconds = {name: row["seconds"] for name, row in rows.items() if "seconds" in row}
    less = [100 - 100 * seconds[name] / seconds["low_variance_cool"] for name in ("sft", "kd", "distillation_cool")]
    assert f"trained for {min(less):.0f} to {max(less):.0f} % fewer seconds than MiniLLM" in page
    sft = difference("sft", "greedy_rouge_l", -1, digits=1)
    assert f"SFT continued is {sft.replace(' [', ' ahead of it [')}" in page
    quality = [
        found[measure]
        for found in rows["low_variance_cool"]["minus"].values()
        for measure in real_tables.QUALITY
        if measure in found
    ]
    assert all(low <= 0 <= high for _, low, high in quality)  # "no difference of MiniLLM is clear"
    assert f"by {in_nats(kl)}, at equal entropy by {equal['context_start']}" in front
    assert f"SFT continued is ahead by {sft.replace(' [', ' Rouge-L [')}" in front


def test_page_says_what_the_first_student_gave():
    results = REAL.parent / "results"
    rows = json.loads((results / "real_cpu_first.json").read_text())["results"]["rows"]
    page = " ".join((REAL / "README.md").read_text().split())

    def fall(name: str, rival: str, measure: str) -> str:
        middle, low, high = rows[name]["minus"][rival][measure]
        digits = 2 if measure == "reverse_kl_per_token" else 1
        values = [f"{-value:.{digits}f}" for value in (middle, high, low)]
        return "{} [{}, {}]".format(*values)

    ours = ("minillm", "low_variance_cool")
    (kl, cool_kl), (start, cool_start), (sft, cool_sft) = (
        [fall(name, rival, measure) for name in ours]
        for rival, measure in (("heal", "reverse_kl_per_token"), ("heal", "greedy_rouge_l"), ("sft", "greedy_rouge_l"))
    )
    assert f"lowered the reverse KL, by {kl.replace(' [', ' nats a token [')} and {cool_kl}" in page
    assert f"by {start.replace(' [', ' Rouge-L [')} and {cool_start}. SFT continued led them greedily by {sft}" in page
    assert f"and {cool_sft}. We replaced" in page
    greedy = [
        json.loads((results / f"{name}.json").read_text())["results"]["rows"]["heal"]["decodings"]["greedy"]["rouge_l"]
        for name in ("real_cpu", "real_cpu_first")
    ]
    assert "{:.1f} Rouge-L with greedy decoding, against {:.1f}".format(*(value[0] for value in greedy)) in page


def test_time_of_the_demo_counts_the_memory_of_its_processes(monkeypatch):
    monkeypatch.setattr(demo_time, "SECONDS_BETWEEN_SAMPLES", 0.05)
    allocate = "values = b'x' * 150_000_000; import time; time.sleep(0.5)"
    found = demo_time.measure(["sh", "-c", f'{sys.executable} -S -c "{allocate}"; true'])
    assert 150e6 < found["peak_bytes"] < 400e6
    assert 0.5 < found["seconds"] < 60
    with pytest.raises(subprocess.CalledProcessError):
        demo_time.measure(["false"])


def test_page_of_the_recipe_says_how_long_the_demo_took():
    root = REAL.parents[1]
    results = json.loads((root / "benchmarks" / "results" / "real_demo.json").read_text())["results"]
    page = " ".join((root / "recipes" / "smollm2-92m" / "README.md").read_text().split())
    minutes = {stage: round(seconds / 60) for stage, seconds in results["stages"].items()}
    assert "answers took {answers} minutes, healing {heal}, SFT {sft} and MiniLLM {minillm}".format(**minutes) in page
    assert f"The peak memory was {results['peak_bytes'] / 1e9:.1f} GB" in page
    if results["seconds"] is not None:
        assert f"all stages took {round(results['seconds'] / 60)} minutes" in page
