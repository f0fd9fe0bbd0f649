"""Record the runs of `whole_steps`; tests start this in several processes."""

import os
import pickle
import sys
from pathlib import Path

from whole_steps import CASES, record


def main(folder: str) -> None:
    process, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    recordings = {name: record(case, Path(folder), num_processes) for name, case in CASES.items()}
    Path(folder, f"recordings_{process}.pickle").write_bytes(pickle.dumps(recordings))


if __name__ == "__main__":
    main(*sys.argv[1:])
