"""`minillm-trl demo`: train, distil and report on a small example, on a CPU."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from .arguments import PlainParser, parse_plain


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser(
        "demo",
        description="Train a small teacher and a much smaller student from scratch on real restaurant descriptions "
        "(E2E NLG, ships with the package), distil the teacher into the student with MiniLLM, compare it with a "
        "student that was fine-tuned for as long, and write report.html and report.md. With --models smollm2, cut a "
        "real language model to two thirds of its size, heal it, distil, and show answers. Runs on a CPU; rerun the "
        "same command to resume a stopped run.",
    )
    parser.add_argument(
        "--models",
        choices=("e2e", "smollm2"),
        default="e2e",
        help="e2e: two small models from scratch (the default); smollm2: SmolLM2-135M-Instruct and a student of 92M, "
        "about 40 minutes on two CPU cores",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=None,
        help="run folder (default: runs/demo, with --full runs/demo-full, with --models smollm2 runs/demo-smollm2)",
    )
    parser.add_argument("--teacher", help="smollm2: folder of the teacher (default: from the hub)")
    parser.add_argument(
        "--dolly", type=Path, help="smollm2: copy of databricks-dolly-15k.jsonl (default: from the hub)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--quick",
        action="store_true",
        help="a few minutes of training on two CPU cores, in which no model converges (the default)",
    )
    length.add_argument(
        "--full",
        action="store_true",
        help="train about four times as long: all models are better, and MiniLLM's lead is clearer",
    )
    parser.add_argument("--seed", type=int, help="e2e: seed of initialisation, data order and rollouts (default: 0)")
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments and run the demo."""
    arguments = parse_plain(build_parser(), argv)
    if arguments.seed is not None and arguments.seed < 0:
        raise UserError(f"--seed must not be negative, got {arguments.seed}.")

    # threads that spin while they wait slow each other down on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _check_models(arguments)
    if arguments.models == "smollm2":
        from .real_demo import run_real_demo

        return run_real_demo(arguments.output_dir or Path("runs/demo-smollm2"), arguments.teacher, arguments.dolly)
    from ..demo import DemoSettings, run_demo  # torch and transformers take seconds to import

    settings = replace(DemoSettings(), seed=arguments.seed or 0)
    folder = arguments.output_dir or Path("runs") / ("demo-full" if arguments.full else "demo")
    run_demo(folder, settings if arguments.full else settings.quick())
    return 0


def _check_models(arguments: argparse.Namespace) -> None:
    """Check that no option belongs to the other models."""
    if arguments.models == "smollm2":
        names = {"--full": arguments.full, "--quick": arguments.quick, "--seed": arguments.seed is not None}
        if given := [name for name, is_given in names.items() if is_given]:
            raise UserError(f"{given[0]} has no effect with --models smollm2, whose recipe has its own. Drop it.")
    elif arguments.teacher is not None or arguments.dolly is not None:
        raise UserError("--teacher and --dolly belong to --models smollm2. Add it, or drop them.")
