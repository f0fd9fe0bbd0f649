"""`minillm-trl compare`: one table of models that were evaluated alike."""

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
    """The options of the subcommand."""
    parser = PlainParser(
        "compare",
        description="Put the results of `minillm-trl evaluate` side by side: models by tasks, with 95 % intervals, "
        "differences to a baseline with p-values, figures, and answers.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder that `evaluate` wrote, or NAME=FOLDER to name its row"
    )
    parser.add_argument("--baseline", metavar="NAME", help="row to which differences, paired by prompt, are shown")
    parser.add_argument("--teacher", metavar="NAME", help="row of the teacher, if no evaluation names it")
    parser.add_argument(
        "--training",
        nargs="+",
        default=[],
        metavar="NAME=OUTPUT_DIR",
        help="training of a row, for its curves; found by itself where the model that was evaluated is such a folder",
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
    """What the evaluations during training logged, by model.

    Args:
        models (`Sequence[EvaluatedModel]`): those that are compared.
        folders (`Mapping[str, Path]`): folders of trainings by model; of the others they are found where the model
            that was evaluated is the folder of its training.

    Raises:
        ValueError: if a folder is no training's, or its training has logged no evaluation; one that was found by
            itself may have logged none.
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
    """Name and folder of `NAME=FOLDER`, or of a folder alone, whose name it is."""
    name, equals, folder = word.partition("=")
    if not equals or Path(word).is_dir():
        return Path(word).resolve().name, Path(word)
    return name, Path(folder)
