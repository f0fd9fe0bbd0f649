"""Write the tables in `benchmarks/README.md` and the picture `results/speed.png` from the results.

There are tables for the CPU (`results/`) and for the GPU (`results/gpu/`), where some results are missing.

python benchmarks/report.py
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measurement import RESULTS
from recipe_memory import MODELS

from minillm_trl.hardware.memory_estimate import Workload, estimate_memory

README = Path(__file__).with_name("README.md")
PICTURE = RESULTS / "speed.png"
GPU = RESULTS / "gpu"
GIB = 2**30
_COLLAPSE = {"entropy": 1, "gradient_norm": 0}  # decimals of their first values


@dataclass(frozen=True)
class Measured:
    """A result with its target.

    Attributes:
        what, case: texts for the table.
        script: the benchmark that measured it.
        values: 20th, 50th and 80th percentile over rounds, or a single value.
        aim: the target.
        at_least: whether more is better.
        unit: "x" for times, "%" for shares.
    """

    what: str
    case: str
    script: str
    values: list[float]
    aim: float
    at_least: bool = True
    unit: str = "x"

    @property
    def middle(self) -> float:
        return self.values[len(self.values) // 2]

    @property
    def reached(self) -> bool:
        return self.middle >= self.aim if self.at_least else self.middle <= self.aim

    def written(self, value: float) -> str:
        return f"{value:.2f}x" if self.unit == "x" else f"{100 * value:.0f} %"

    def row(self, folder: str) -> str:
        measured = self.written(self.middle)
        if len(self.values) > 1:
            measured += f" ({self.written(self.values[0])} to {self.written(self.values[-1])})"
        aim = f"{'at least' if self.at_least else 'at most'} {self.written(self.aim)}"
        script = f"[{self.script}]({self.script}.py) [json]({folder}/{self.script}.json)"
        return f"| {self.what} | {self.case} | {measured} | {aim} | {'yes' if self.reached else '**no**'} | {script} |"


def read(name: str, folder: Path = RESULTS) -> Any:
    return json.loads((folder / f"{name}.json").read_text())["results"]


def by_size(folder: Path, name: str, what: str, aims: tuple[float, float]) -> Iterator[Measured]:
    for result, aim in zip(read(name, folder), aims, strict=True):
        yield Measured(what, f"teacher {result['parameter_ratio']:.1f}x", name, result["speedup"], aim)


def sampling() -> Iterator[Measured]:
    results = read("sampling")
    for result in results:
        case = f"teacher {result['parameter_ratio']:.1f}x, batch {result['batch_size']}"
        aim = 2.5 if result["parameter_ratio"] < 10 else 3.3
        what = "teacher-mixed sampling against mixing at every step"
        yield Measured(what, case, "sampling", result["speedup_over_mixing_every_step"], aim)
    for result in results:
        case = f"teacher {result['parameter_ratio']:.1f}x, batch {result['batch_size']}"
        values = result["time_over_student_plus_alpha_teacher"]
        yield Measured("its time over the least possible", case, "sampling", values, 1.25, at_least=False)


def rollouts_real() -> Iterator[Measured]:
    for case, result in read("rollouts_real").items():
        what = "rollouts of SmolLM2 and its 64M student against those before slots and packed weights"
        if case == "speculative":
            case = "speculative against own coins before"
        case = case if case == "alpha 0" else f"alpha 0.2, {case}"
        yield Measured(what, case, "rollouts_real", result["speedup"], 2.0)


def iteration_real() -> Iterator[Measured]:
    values = read("iteration_real")["4 passes, mixed"]["speedup"]
    what = "iteration of SmolLM2's 64M student against as many updates of TRL's DistillationTrainer"
    yield Measured(what, "4 passes, mixed", "iteration_real", values if len(set(values)) > 1 else values[:1], 5.0)


def update_phase(folder: Path) -> Iterator[Measured]:
    what = "four inner passes against a teacher forward in each"
    return by_size(folder, "update_phase", what, (2.3, 3.5))


def optimizer_step(folder: Path) -> Iterator[Measured]:
    aims = {"ours, 1 pass": 1.0, "ours, 4 passes": 2.5, "ours, 4 passes, mixed": 2.5}
    results = read("optimizer_step", folder)
    for setting, aim in aims.items():
        what = "optimizer step of the whole loop against TRL 1.14.2's MiniLLMTrainer"
        case = setting.removeprefix("ours, ")
        values = results[setting]["speedup_over_trl"]
        yield Measured(what, case, "optimizer_step", values if len(set(values)) > 1 else values[:1], aim)


def memory(folder: Path) -> Iterator[Measured]:
    for precision, results in read("head_memory", folder).items():
        case = f"8 x 512 tokens, 151,936 rows, {precision}"
        share, growth = results["share_of_full_logits"], results["growth_when_the_vocabulary_doubles"]
        yield Measured("memory of the loss over full logits", case, "head_memory", [share], 1 / 8, False, "%")
        yield Measured("its growth when the vocabulary doubles", case, "head_memory", [growth], 0.1, False, "%")


def same_kl() -> Iterator[Measured]:
    for architecture, result in read("same_kl").items():
        ratios = [ratio for ratio in result["ratios"] if ratio is not None]
        values = ratios if len(ratios) == len(result["ratios"]) else [float("inf")]
        what = "seconds to the reverse KL and Rouge-L of TRL's DistillationTrainer"
        yield Measured(what, f"{architecture}-shaped", "same_kl", sorted(values), 0.5, at_least=False)


def scaling_time() -> Iterator[Measured]:
    for phase, ratios in read("scaling")["time_per_token_relative_to_the_smallest_batch"].items():
        yield Measured("time per token, batch 64 over batch 8", phase, "scaling", [ratios[-1]], 1.0, False)


def scaling_memory(folder: Path) -> Iterator[Measured]:
    for name, value in read("scaling", folder)["memory_deviation_from_linear"].items():
        yield Measured(
            "peak memory's distance from a straight line", f"over {name}", "scaling", [value], 0.1, False, "%"
        )


def measured() -> list[Measured]:
    return [
        *sampling(),
        *by_size(RESULTS, "rollout_phase", "rollout phase against the authors' schedule", (3.0, 4.0)),
        *rollouts_real(),
        *update_phase(RESULTS),
        *optimizer_step(RESULTS),
        *iteration_real(),
        *same_kl(),
        *memory(RESULTS),
        *scaling_time(),
        *scaling_memory(RESULTS),
    ]


def measured_on_gpu() -> list[Measured]:
    return [*update_phase(GPU), *optimizer_step(GPU), *memory(GPU), *scaling_memory(GPU)]


def table(figures: list[Measured], folder: str = "results") -> str:
    head = "| what | case | measured | aim | reached | script |\n|---|---|---|---|---|---|\n"
    return head + "".join(figure.row(folder) + "\n" for figure in figures)


def precision_table(folder: Path) -> str:
    """Return the results of each precision in `mixed_precision.py`, as a Markdown table."""
    names = {"full": "whole student", "qlora_nf4": "QLoRA student, NF4 teacher"}
    head = "| way | precision | updates | skipped | every number finite | reverse KL, first 20 → last 20 |\n"
    rows = [
        f"| {names[result['way']]} | {result['precision']} | "
        f"{result['steps']}{', then stopped' if result.get('stopped') else ''} | {result['skipped_steps']:.0f} | "
        f"{'yes' if result['all_finite'] else '**no**'} | "
        f"{result['reverse_kl_first_20']:.2f} → {result['reverse_kl_last_20']:.2f} |\n"
        for result in read("mixed_precision", folder)
    ]
    return head + "|---|---|---:|---:|---|---|\n" + "".join(rows)


def seeds_table() -> str:
    """Return the spread over seeds in `precision_seeds.py` for each weight precision, as a Markdown table."""
    head = "| learning rate, updates | way | reverse KL, first 20 | reverse KL, last 20 | unchanged weights |\n"
    groups: dict[tuple[float, int, str], list[dict[str, Any]]] = {}
    for result in read("precision_seeds", RESULTS):
        groups.setdefault((result["learning_rate"], result["steps"], result["way"]), []).append(result)

    def spread(runs: list[dict[str, Any]], name: str) -> str:
        return " / ".join(f"{result[name]:.1f}" for result in runs)

    rows = [
        f"| {rate:g}, {steps} | {way} | {spread(runs, 'reverse_kl_first_20')} | "
        f"{spread(runs, 'reverse_kl_last_20')} | "
        f"{100 * sum(result['weights_unchanged'] for result in runs) / len(runs):.1f} % |\n"
        for (rate, steps, way), runs in sorted(groups.items(), key=lambda group: (-group[0][0], group[0][2]))
    ]
    return head + "|---|---|---:|---:|---:|\n" + "".join(rows)


def collapse_table() -> str:
    """Return reverse KL, entropy and gradient norm in the first updates of `mixed_precision.py`'s shapes, by seed."""
    rows = [
        f"| {result['way']} | {result['seed']} | "
        + " | ".join(f"{result[name][0]:.{digits}f} → {result[name][-1]:.2g}" for name, digits in _COLLAPSE.items())
        + f" | {result['reverse_kl_first_20']:.1f} | {result['reverse_kl'][-1]:.1f} |\n"
        for result in read("precision_seeds_first", RESULTS)
    ]
    head = "| way | trainer seed | entropy, nats a token | gradient norm | reverse KL, first 20 | last |\n"
    return head + "|---|---:|---:|---:|---:|---:|\n" + "".join(rows)


def speculative_table() -> str:
    """Return the table of speculative mixing against coins."""
    lines = [
        "| teacher / student | drafts kept | batch | against shared coins | against coins of each row | `auto` | "
        "its time over shared coins |",
        "|---:|---:|---:|---:|---:|---|---:|",
    ]
    for row in read("speculative_small"):
        cells = [f"{row['parameter_ratio']:.0f}", f"{100 * row['kept']:.0f} %", f"{row['batch_size']}"]
        cells += [f"{row[f'speedup_over_{way}'][1]:.2f}x" for way in ("shared_coins", "own_coins")]
        cells += [row["auto"], f"{row['auto_over_shared_coins'][1]:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def decoding_table() -> str:
    """Return milliseconds per step and tokens per second of each decoding method, as a Markdown table."""
    head = "| student, batch | way | a step | tokens a second | against the copy | over reading the weights |\n"
    rows = [
        f"| {result['student']}, {result['batch_size']} | {way} | {1e3 * found['seconds_per_step'][1]:.2f} ms | "
        f"{found['tokens_per_second']:,.0f} | {found['speedup_over_half_precision'][1]:.2f}x | "
        f"{found['time_over_reading_the_weights'][1]:.0f}x |\n"
        for result in read("hardware_limits", GPU)["decoding"]
        for way, found in result["ways"].items()
    ]
    return head + "|---|---|---:|---:|---:|---:|\n" + "".join(rows)


def rate_table() -> str:
    """Return the share of the matrix-product rate that updates reach, as a Markdown table."""
    head = "| student | gradient checkpointing | a micro-batch | share of the rate |\n|---|---|---:|---:|\n"
    rows = [
        f"| {result['student']} | {'yes' if result['gradient_checkpointing'] else 'no'} | "
        f"{1e3 * result['seconds'][1]:.0f} ms | {100 * result['share_of_matrix_product_rate'][1]:.0f} % |\n"
        for result in read("hardware_limits", GPU)["updates"]
    ]
    return head + "".join(rows)


def memory_errors() -> Iterator[tuple[str, str, float, float]]:
    """Yield case, phase, measured peak and current estimate, in bytes."""
    for result in read("memory_estimate", GPU):
        if "failed" not in result:
            models = MODELS[result["student"]], MODELS[result["teacher"]]
            estimated = estimate_memory(*models, Workload(**result["load"]))
            for phase, value in result["measured"].items():
                yield result["case"], phase, value, estimated[phase]


def memory_table() -> str:
    """Return the memory estimate next to the measured peak, as a Markdown table."""
    head = "| case | phase | measured | estimate | off by |\n|---|---|---:|---:|---:|\n"
    return head + "".join(
        f"| {case} | {phase} | {value / GIB:.2f} GiB | {estimate / GIB:.2f} GiB | {estimate / value - 1:+.0%} |\n"
        for case, phase, value, estimate in memory_errors()
    )


def tables() -> dict[str, str]:
    """Return every table of the page, by the name in its markers."""
    return {
        "table": table(measured()),
        "precisions": precision_table(RESULTS),
        "seeds": seeds_table(),
        "collapse": collapse_table(),
        "gpu": table(measured_on_gpu(), "results/gpu"),
        "gpu precisions": precision_table(GPU),
        "speculative": speculative_table(),
        "decoding": decoding_table(),
        "rate": rate_table(),
        "memory": memory_table(),
    }


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: made by report.py -->\n", f"<!-- end of {name} -->\n"


def draw(figures: list[Measured]) -> None:
    """Draw speed-ups as bars, with their spread over rounds and a mark at each aim."""
    bars = [bar for bar in figures if bar.at_least][::-1]
    figure = Figure(figsize=(8.5, 0.42 * len(bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    for number, bar in enumerate(bars):
        axes.barh(number, bar.middle, height=0.6, color="#2a7f9e" if bar.reached else "#c98b2b")
        axes.plot([bar.values[0], bar.values[-1]], [number, number], color="black", linewidth=1.5)
        axes.plot([bar.aim, bar.aim], [number - 0.38, number + 0.38], color="#b0302f", linewidth=2)
        axes.text(0.08, number, f"{bar.middle:.2f}x", va="center", fontsize=9, color="white", fontweight="bold")
    axes.set_yticks(range(len(bars)), [f"{bar.what}\n{bar.case}" for bar in bars], fontsize=8)
    axes.set_xlabel("times as fast (black: 20th to 80th percentile; red: the aim)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    for name, made in tables().items():
        start, end = marks(name)
        before, rest = README.read_text().split(start)
        README.write_text(before + start + made + end + rest.split(end)[1])
    draw(measured())


if __name__ == "__main__":
    main()
