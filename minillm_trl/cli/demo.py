"""`minillm-trl demo`."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from ..errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The options of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="minillm-trl demo",
        description="Train a small teacher and a much smaller student from scratch on real restaurant descriptions "
        "(E2E NLG, ships with the package), distil the teacher into the student with MiniLLM, compare it with a "
        "student that was fine-tuned for as long, and write report.html and report.md. Runs on a CPU; a run that was "
        "stopped continues where it was.",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=None, help="run folder (default: runs/demo or runs/demo-quick)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="less of everything: minutes become seconds, gains smaller"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation, data order and rollouts")
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments and run the demo."""
    arguments = build_parser().parse_args(argv)
    if arguments.seed < 0:
        raise UserError(f"--seed must not be negative, got {arguments.seed}.")

    # threads that spin while they wait slow each other down on a machine that is busy with something else, too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ..demo import DemoSettings, run_demo  # torch and transformers take seconds, --help should not

    settings = replace(DemoSettings(), seed=arguments.seed)
    folder = arguments.output_dir or Path("runs") / ("demo-quick" if arguments.quick else "demo")
    run_demo(folder, settings.quick() if arguments.quick else settings)
    return 0
