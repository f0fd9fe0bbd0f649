"""Build the demo's report from its records."""

from dataclasses import replace

from ..evaluation.comparison_tables import COLUMNS
from ..evaluation.plots import Curve, Plot
from ..evaluation.report import Report, Row, Sample, Section, Table
from ..evaluation.statistics import MeanInterval, paired_bootstrap
from .settings import DemoSettings

NAMES = {
    "teacher": "Teacher",
    "sft": "SFT student",
    "control": "SFT continued (control)",
    "minillm": "MiniLLM student",
}
_MEASURES = ("rouge_l", "reverse_kl", "length", "eos_rate", "repeated_4grams", "distinct_outputs")


def build_report(
    records: dict[str, dict], evaluations: dict[str, dict], settings: DemoSettings, sizes: dict[str, int]
) -> Report:
    """Build a [`Report`] from the stages' records and the evaluations of the four models."""
    table = Table([COLUMNS[key] for key in _MEASURES], [_row(name, evaluations[name]) for name in NAMES])
    prompts = evaluations["minillm"]["settings"]["prompts"]
    gains = {name: _gains(evaluations, name) for name in ("sft", "control")}
    return Report(
        title="A small student learns from its teacher",
        summary=("" if _is_full(settings) else _SHORTENED) + _summary(gains),
        facts=[
            ("Teacher", f"{sizes['teacher'] / 1e6:.2f}M parameters, {records['teacher']['updates']} SFT updates"),
            ("Student", f"{sizes['sft'] / 1e6:.2f}M parameters, {records['sft']['updates']} SFT updates"),
            ("MiniLLM", f"{records['minillm']['updates']} updates in {records['minillm']['seconds']:.0f} s"),
            ("Control", f"{records['control']['updates']} more SFT updates in {records['control']['seconds']:.0f} s"),
            ("Data", f"E2E NLG (CC BY-SA 4.0), {prompts} test prompts that no model has seen"),
            ("Seed", str(settings.seed)),
        ],
        sections=[
            Section("Results", {"": table}, notes=_notes(gains, settings, prompts)),
            Section("Training", figures=_curves(records["minillm"]["history"], evaluations)),
            Section("Answers side by side", samples={"": _samples(evaluations)}),
        ],
    )


_SHORTENED = "A short run, in which no model has converged; minillm-trl demo --full trains about four times as long. "


def _is_full(settings: DemoSettings) -> bool:
    return settings == replace(DemoSettings(), seed=settings.seed)


def _row(name: str, evaluation: dict) -> Row:
    summary = evaluation["summary"]
    # the teacher has no reverse KL
    cells: dict[str, MeanInterval | float | str] = {
        key: MeanInterval(*summary[key]) for key in _MEASURES if key in summary
    }
    return Row(NAMES[name], cells, is_teacher=name == "teacher")


def _gains(evaluations: dict[str, dict], baseline: str) -> dict[str, MeanInterval]:
    """Return MiniLLM minus the baseline, paired by prompt."""

    def values(name: str, key: str) -> list[float]:
        return [row[key] for row in evaluations[name]["per_prompt"]]

    return {key: paired_bootstrap(values("minillm", key), values(baseline, key)) for key in ("rouge_l", "reverse_kl")}


def _summary(gains: dict[str, dict[str, MeanInterval]]) -> str:
    control = gains["control"]
    rouge, kl = control["rouge_l"], control["reverse_kl"]
    better = [gain["rouge_l"].low > 0 and gain["reverse_kl"].high < 0 for gain in gains.values()]
    verdict = (
        "MiniLLM beats both the SFT student and the same student fine-tuned for longer"
        if all(better)
        else "MiniLLM does not beat both the SFT student and the longer fine-tuned one by more than the interval"
    )
    return (
        f"{verdict}: against the control, Rouge-L {rouge.mean:+.1f} [{rouge.low:+.1f}, {rouge.high:+.1f}] and reverse "
        f"KL {kl.mean:+.1f} [{kl.low:+.1f}, {kl.high:+.1f}] nats per completion."
    )


def _notes(gains: dict[str, dict[str, MeanInterval]], settings: DemoSettings, prompts: int) -> list[str]:
    rouge, kl = gains["sft"]["rouge_l"], gains["sft"]["reverse_kl"]
    return [
        f"Means over {prompts} test prompts and {len(settings.sampling_seeds)} sampling seeds (temperature 1, nothing "
        "else shapes the distribution), with 95 % bootstrap intervals over prompts. ↑ higher is better, ↓ lower, "
        "≈ closer to the teacher's. The best student is in bold.",
        f"Against the SFT student, paired by prompt: Rouge-L {rouge.mean:+.1f} [{rouge.low:+.1f}, {rouge.high:+.1f}], "
        f"reverse KL {kl.mean:+.1f} [{kl.low:+.1f}, {kl.high:+.1f}].",
        "Rouge-L is against all human references of a prompt (maximum). Reverse KL is KL(student || teacher) over "
        "whole completions. Length, ends, repetition and distinct outputs should be like the teacher's: reverse KL "
        "alone also falls when texts degenerate.",
        "The control spends on supervised updates the time that MiniLLM spent on sampling, scoring and updates.",
    ]


def _curves(history: list[dict], evaluations: dict[str, dict]) -> list[Plot]:
    steps = [entry["step"] for entry in history]
    teacher = evaluations["teacher"]["summary"]
    plotted = [
        ("Reverse KL", "nats per completion", "eval_objective/reverse_kl", None),
        ("Rouge-L", "Rouge-L", "eval_rouge_l", "rouge_l"),
        ("Length", "tokens", "eval_completions/mean_length", "length"),
        ("Ends by itself", "share of completions", "eval_rollout/eos_rate", "eos_rate"),
        ("Repetition", "repeated 4-grams", "eval_rollout/repeated_4grams", "repeated_4grams"),
        ("Entropy", "nats per token", "eval_entropy", None),
    ]
    return [
        Curve(
            f"{title} on validation prompts",
            "MiniLLM update",
            label,
            {"student": (steps, [entry[key] for entry in history])},
            {"teacher (test prompts)": teacher[reference][0]} if reference else {},
            y_min=0.0 if reference in ("eos_rate", "repeated_4grams") else None,
        )
        for title, label, key, reference in plotted
    ]


def _samples(evaluations: dict[str, dict]) -> list[Sample]:
    all_samples = {name: evaluation["samples"] for name, evaluation in evaluations.items()}
    total = len(all_samples["teacher"])
    rows = range(0, total, max(1, total // 10))
    return [
        Sample(
            all_samples["teacher"][row]["prompt"],
            all_samples["teacher"][row]["references"],
            {NAMES[name]: all_samples[name][row]["outputs"][0] for name in ("teacher", "sft", "minillm")},
        )
        for row in list(rows)[:10]
    ]
