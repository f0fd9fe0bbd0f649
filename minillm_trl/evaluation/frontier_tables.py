"""Build tables, figures and records of models that were evaluated at several temperatures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from .comparison_tables import COLUMNS, measured
from .decodings import PAPER, VALIDATION, Decoding
from .frontier_results import ENTROPY, EqualEntropyDifference, chosen_decoding, compared_decoding, entropies_of
from .plots import Curve, Plot
from .report import Cell, Column, Record, Row, Table, make_record
from .results import DecodingResults, TaskResult
from .statistics import MeanInterval

USE = "Where people decode"  # heading
CHOSEN_ROUGE_L = "chosen:rouge_l"  # a column of this table
MEASURES = ("rouge_l", "reverse_kl")  # of the figures and of the differences at equal entropy
_CHOSEN_TEMPERATURE = Column("chosen_temperature", "Chosen T", None)
_SHARED = Column("shared", "Shared entropies", None)
_DIFFERENCE_FIELDS = ("difference", "difference_low", "difference_high")
_USE_MEASURES = {
    "paper": ("rouge_l", "reverse_kl"),
    "chosen": ("rouge_l", "reverse_kl", ENTROPY),
    "greedy": ("rouge_l",),
}
_COVERAGE = dict.fromkeys(("paper", "chosen"), ("best_rouge_l", "distinct_4grams", "self_bleu", "forward_kl"))
_AT = {
    "paper": "at T\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}1",
    "chosen": "at chosen\N{NO-BREAK SPACE}T",
    "greedy": "greedy",
}

EqualEntropy = Mapping[str, Mapping[str, EqualEntropyDifference]]


def decoding_tables(
    results: Mapping[str, TaskResult],
    decodings: Mapping[str, DecodingResults],
    teachers: set[str],
    differences: EqualEntropy,
    baseline: str | None,
) -> dict[str, Table]:
    """Return the tables of one task by heading: where people decode, differences at equal entropy, diversity.

    Args:
        results (`Mapping[str, TaskResult]`): results for tables of one decoding, by model.
        decodings (`Mapping[str, DecodingResults]`): results at all temperatures, by model; without any there are no
            tables.
        teachers (`set[str]`): names of the teachers.
        differences (`EqualEntropy`): by measure and model; empty without a baseline.
        baseline (`str`, *optional*): name of the model that the others are compared with.
    """
    if not decodings:
        return {}
    chosen = {name: chosen_decoding(by_decoding) for name, by_decoding in decodings.items()}
    views: dict[str, dict[str, TaskResult]] = {
        "paper": {name: result for name, result in results.items() if result.decoding == PAPER},
        "chosen": {name: decodings[name].test[decoding] for name, decoding in chosen.items() if decoding is not None},
        "greedy": {
            name: by_decoding.test[Decoding(None)]
            for name, by_decoding in decodings.items()
            if Decoding(None) in by_decoding.test
        },
    }
    use = _with_chosen_temperature(_view_table(list(results), views, _USE_MEASURES, teachers), chosen)
    tables = {USE: replace(use, note=_choice_note(decodings, chosen))}
    if differences:
        heading = f"Difference from {baseline} at equal entropy"
        tables[heading] = _difference_table(decodings, differences, teachers, str(baseline))
    tables["Coverage and diversity where people decode"] = _view_table(list(results), views, _COVERAGE, teachers)
    return {heading: table for heading, table in tables.items() if table.columns}


def _view_table(
    names: Sequence[str],
    views: Mapping[str, Mapping[str, TaskResult]],
    measures: Mapping[str, Sequence[str]],
    teachers: set[str],
) -> Table:
    """Return models by measures of each view; keys of columns are `VIEW:MEASURE`."""
    rows, columns = [], []
    for name in names:
        cells: dict[str, Cell] = {
            f"{view}:{measure}": views[view][name].summary[measure]
            for view, keys in measures.items()
            for measure in keys
            if name in views[view] and measure in views[view][name].summary
        }
        rows.append(Row(name, cells, name in teachers))
    for view, keys in measures.items():
        for measure in keys:
            key, known = f"{view}:{measure}", COLUMNS[measure]
            if any(key in row.cells for row in rows):
                columns.append(replace(known, key=key, label=f"{known.label} {_AT[view]}"))
    return Table(columns, rows)


def _with_chosen_temperature(table: Table, chosen: Mapping[str, Decoding | None]) -> Table:
    """Insert the column of chosen temperatures before the measures there."""
    temperatures = {name: decoding.temperature for name, decoding in chosen.items() if decoding is not None}
    if not temperatures:
        return table
    rows = [
        replace(row, cells=row.cells | {_CHOSEN_TEMPERATURE.key: f"{temperatures[row.name]:g}"})
        if row.name in temperatures
        else row
        for row in table.rows
    ]
    keys = [column.key.partition(":")[0] for column in table.columns]
    place = keys.index("chosen") if "chosen" in keys else len(keys)
    return Table([*table.columns[:place], _CHOSEN_TEMPERATURE, *table.columns[place:]], rows)


def _choice_note(decodings: Mapping[str, DecodingResults], chosen: Mapping[str, Decoding | None]) -> str:
    missing = [name for name, decoding in chosen.items() if decoding is None]
    if len(missing) == len(chosen):
        return (
            "No chosen temperature: it is chosen on a validation split, never on the test data. Rerun `evaluate` with "
            "--validation_split added; finished results are kept."
        )
    splits = {
        str(result.settings["split"]) for results in decodings.values() for result in results.validation.values()
    }
    note = f"Chosen T: the sampled temperature with the highest Rouge-L on split {', '.join(sorted(splits))}."
    return f"{note} None for {', '.join(missing)}: evaluate with --validation_split too." if missing else note


def _difference_table(
    decodings: Mapping[str, DecodingResults], differences: EqualEntropy, teachers: set[str], baseline: str
) -> Table:
    rows, columns = [], []
    for name in decodings:
        found = {measure: by_model[name] for measure, by_model in differences.items() if name in by_model}
        if found:
            rows.append(Row(name, _difference_cells(found), name in teachers))
    at = next(iter(next(iter(differences.values())).values())).at
    for measure in differences:
        known = COLUMNS[measure]
        columns.append(Column(f"{measure}:at", f"{known.label} at {at:.2f} nats/token", known.better))
        columns.append(Column(f"{measure}:mean", f"{known.label}, mean over shared entropies", known.better))
    columns.append(_SHARED)
    columns = [column for column in columns if any(column.key in row.cells for row in rows)]
    note = (
        f"{at:.2f} nats/token is the entropy of {baseline} at {compared_decoding(decodings[baseline])}. Between the "
        "temperatures of a model, its curve is interpolated."
    )
    if any(len(row.cells) < len(columns) for row in rows) or len(columns) < 2 * len(differences) + 1:
        note += " A value is missing where the temperatures of both models do not reach the entropy."
    return Table(columns, rows, note)


def _difference_cells(found: Mapping[str, EqualEntropyDifference]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for measure, difference in found.items():
        for place, interval in (("at", difference.difference), ("mean", difference.mean_difference)):
            if interval is not None:
                mean, low, high = (f"{value:+z.{COLUMNS[measure].digits}f}" for value in interval[:3])
                cells[f"{measure}:{place}"] = f"{mean} [{low}, {high}]"
        if difference.shared is not None:
            cells[_SHARED.key] = "{:.2f}–{:.2f}".format(*difference.shared)
    return cells


def decoding_figures(task: str, decodings: Mapping[str, DecodingResults], names: Sequence[str]) -> list[Plot]:
    """Return plots of Rouge-L and of reverse KL over entropy, a line for each model with intervals of the measure.

    Args:
        task (`str`): its name.
        decodings (`Mapping[str, DecodingResults]`): results at all temperatures, by model.
        names (`Sequence[str]`): all models of the report, which fixes their colours.
    """
    plots: list[Plot] = []
    for measure in MEASURES:
        lines = {name: line for name, results in decodings.items() if (line := _line(results, measure))}
        if lines:
            series = {name: (line.entropies, [point.mean for point in line.points]) for name, line in lines.items()}
            intervals = {
                name: ([point.low for point in line.points], [point.high for point in line.points])
                for name, line in lines.items()
            }
            label = COLUMNS[measure].label
            title = f"{task}: {label} over entropy"
            x_label = "entropy (nats per token)"
            plots.append(Curve(title, x_label, label, series, order=names, intervals=intervals))
    return plots


class _Line(NamedTuple):
    entropies: list[float]
    points: list[MeanInterval]


def _line(results: DecodingResults, measure: str) -> _Line | None:
    """Return a measure by increasing entropy; None if no decoding has both."""
    found = []
    for decoding, result in results.test.items():
        entropies = entropies_of(decoding, result)
        if entropies is not None and measure in result.summary:
            found.append((sum(entropies) / len(entropies), result.summary[measure]))
    found.sort()
    return _Line([entropy for entropy, _ in found], [point for _, point in found]) if found else None


def decoding_records(task: str, decodings: Mapping[str, DecodingResults], differences: EqualEntropy) -> list[Record]:
    """Return the numbers of the decodings that tables of one decoding do not show, for `comparison.csv`.

    These are all measures of the other decodings and of the validation split, the chosen temperatures, and values and
    differences at equal entropy.
    """
    records = []
    for name, results in decodings.items():
        splits = {"": results.test, f"{VALIDATION}/": results.validation}
        for prefix, by_decoding in splits.items():
            for decoding, result in by_decoding.items():
                if result is not results.table_result:
                    place = f"{prefix}{decoding.folder}"
                    records += [
                        make_record(name, task, measure, cell, place)
                        for measure, cell in measured(result, None).items()
                    ]
        chosen = chosen_decoding(results)
        if chosen is not None and chosen.temperature is not None:
            place = chosen.folder
            records.append(Record(name, task, _CHOSEN_TEMPERATURE.key, chosen.temperature, decoding=place))
    for measure, by_model in differences.items():
        for name, found in by_model.items():
            places = (
                (f"entropy_{found.at:.4g}", found.value, found.difference),
                ("shared_entropies", found.mean_value, found.mean_difference),
            )
            for place, value, interval in places:
                if value is not None and interval is not None:
                    difference = dict(zip(_DIFFERENCE_FIELDS, interval[:3], strict=True))
                    record = Record(name, task, measure, value, n=interval.n, decoding=place, **difference)
                    records.append(record)
    return records
