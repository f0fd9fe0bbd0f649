"""`minillm-trl compare`: compare models evaluated with the same settings in one table."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError
from ..evaluation.comparison import compare_models
from ..evaluation.report import Report, format_sections
from ..evaluation.report_files import write_report
from ..evaluation.results import EvaluatedModel, read_evaluation
from ..evaluation.training_history import EVALUATED, read_history, training_folder
from .arguments import PlainParser, parse_plain


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser(
        "compare",
        description="Put the results of `minillm-trl evaluate` side by side: models by tasks, with 95 % intervals, "
        "differences to a baseline with p-values, figures, and answers.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder that `evaluate` wrote, or NAME=FOLDER to name its row"
    )
    parser.add_argument("--baseline", metavar="NAME", help="row to compare the others with, paired by prompt")
    parser.add_argument("--teacher", metavar="NAME", help="row of the teacher, if no evaluation names it")
    parser.add_argument(
        "--training",
        nargs="+",
        default=[],
        metavar="NAME=OUTPUT_DIR",
        help="training run of a row, for its curves (default: the evaluated model's folder, if it is one of a run)",
    )
    parser.add_argument("--output_dir", type=Path, help="folder for report.html, report.md and comparison.csv")
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, read the results, print the table, and write the report if a folder is given."""
    arguments = parse_plain(build_parser(), argv)
    models = [read_evaluation(*named_folder(word)) for word in arguments.runs]
    histories = read_histories(models, _trainings(arguments.training, [model.name for model in models]))
    show(compare_models(models, arguments.baseline, arguments.teacher, histories), arguments.output_dir)
    return 0


def read_histories(
    models: Sequence[EvaluatedModel], folders: Mapping[str, Path]
) -> dict[str, dict[str, dict[int, float]]]:
    """Return the metrics that evaluations during training logged, by model.

    Args:
        models (`Sequence[EvaluatedModel]`): the compared models.
        folders (`Mapping[str, Path]`): folders of training runs by model. For other models it is the folder of the
            evaluated model, if that is the folder of a training run.

    Raises:
        ValueError: if a given folder holds no training run, or the run has logged no evaluation.
    """
    histories = {}
    for model in models:
        if model.name in folders:
            histories[model.name] = read_history(folders[model.name])
            if not histories[model.name]:
                raise UserError(
                    f"--training {model.name}={folders[model.name]}: none of {', '.join(EVALUATED)} was logged. Train "
                    "with eval_strategy, or leave this out."
                )
        else:
            found = [training_folder(result.settings) for result in model.tasks.values()]
            if (folder := next(filter(None, found), None)) is not None:
                histories[model.name] = read_history(folder)
    return histories


def show(report: Report, output_dir: Path | None) -> None:
    """Print the tables, and write the report's files if a folder is given."""
    print(f"\n{format_sections(report.sections)}\n\n{report.summary}")
    if output_dir is not None:
        write_report(output_dir, report)
        print(f"Report: {output_dir / 'report.html'}")


def _trainings(words: list[str], names: list[str]) -> dict[str, Path]:
    folders = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or name not in names:
            raise UserError(f"--training {word}: expected NAME=OUTPUT_DIR with a name of {', '.join(names)}.")
        folders[name] = Path(folder)
    return folders


def named_folder(word: str) -> tuple[str, Path]:
    """Return name and folder of `NAME=FOLDER`, or of a plain folder, which gives the name."""
    name, equals, folder = word.partition("=")
    if not equals or Path(word).is_dir():
        return Path(word).resolve().name, Path(word)
    return name, Path(folder)
