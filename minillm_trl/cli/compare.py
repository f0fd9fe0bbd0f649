"""`minillm-trl compare`: one table of models that were evaluated alike."""

import argparse
from pathlib import Path

from ..evaluation.comparison import compare_models, read_evaluation
from ..evaluation.report import Report, format_table, write_report
from .arguments import parse_plain


def build_parser() -> argparse.ArgumentParser:
    """The options of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="minillm-trl compare",
        description="Put the results of `minillm-trl evaluate` side by side: models by tasks, with 95 %% intervals.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder that `evaluate` wrote, or NAME=FOLDER to name its row"
    )
    parser.add_argument("--baseline", metavar="NAME", help="row to which differences, paired by prompt, are shown")
    parser.add_argument("--teacher", metavar="NAME", help="row of the teacher, if no evaluation names it")
    parser.add_argument("--output_dir", type=Path, help="folder for report.md and report.html")
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, read the results, print the table, and write the report if a folder is given."""
    arguments = parse_plain(build_parser(), argv)
    models = [read_evaluation(*named_folder(word)) for word in arguments.runs]
    show(compare_models(models, arguments.baseline, arguments.teacher), arguments.output_dir)
    return 0


def show(report: Report, output_dir: Path | None) -> None:
    """Print the tables, and write `report.md` and `report.html`."""
    print(f"\n{format_table(report.table)}")
    for heading, table in report.details.items():
        print(f"\n{heading}\n{format_table(table)}")
    print(f"\n{report.summary}")
    if output_dir is not None:
        write_report(output_dir, report)
        print(f"Report: {output_dir / 'report.html'}")


def named_folder(word: str) -> tuple[str, Path]:
    """Name and folder of `NAME=FOLDER`, or of a folder alone, whose name it is."""
    name, equals, folder = word.partition("=")
    if not equals or Path(word).is_dir():
        return Path(word).resolve().name, Path(word)
    return name, Path(folder)
