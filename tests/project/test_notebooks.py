"""The notebooks: clean in git, pinned as the package is, and right from top to bottom."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
notebook_test = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def install_cell(path: Path) -> str:
    (source,) = [cell.source for cell in read(path).cells if "%pip" in cell.source]
    return source


def test_all_five_are_there_and_in_the_table():
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_"]
    assert re.findall(r"\]\((\d\d_\w+\.ipynb)\)", (FOLDER / "README.md").read_text()) == [p.name for p in NOTEBOOKS]


@notebook_test
def test_nothing_but_the_source_is_in_git(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert cell.metadata in ({}, {"tags": ["parameters"]})
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@notebook_test
def test_links_and_files_that_it_names_exist(path: Path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (FOLDER / target).exists(), target
    for name in re.findall(r"`((?:docs|benchmarks|recipes)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name


@notebook_test
def test_versions_that_it_installs_are_the_tested_ones(path: Path):
    found = re.findall(r"[\w-]+[=<>]=[\d.]+(?:,<[\d.]+)?(?:; sys_platform == 'linux')?", install_cell(path))
    lines = (ROOT / "constraints" / "v100.txt").read_text().splitlines()
    tested = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert set(map(Requirement, found)) == {pin for pin in tested if pin.name != "deepspeed"}


@notebook_test
@pytest.mark.parametrize("installed", [True, False])
def test_pip_runs_only_where_the_package_is_missing(path: Path, installed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    magics: list[tuple[str, str]] = []
    shell = SimpleNamespace(run_line_magic=lambda *words: magics.append(words))
    exec(TransformerManager().transform_cell(install_cell(path)), {"get_ipython": lambda: shell})
    assert [name for name, _ in magics] == ([] if installed else ["pip"])


def execute(name: str, folder: Path, results: str, figures: int, **parameters: int) -> dict:
    """Run a notebook in `folder` with other values for names of its cell of parameters.

    Returns:
        `dict`: `results`, a dict display, evaluated at the end.
    """
    (path,) = FOLDER.glob(f"{name}_*.ipynb")
    notebook = read(path)
    if parameters:
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        for key, value in parameters.items():
            cell.source, found = re.subn(rf"^{key} = \S+", f"{key} = {value}", cell.source, flags=re.MULTILINE)
            assert found == 1, key
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({results}))"))
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "error" not in {output.output_type for output in outputs}  # commands show theirs and go on
    assert sum("image/png" in output.get("data", {}) for output in outputs) == figures
    return json.loads(outputs[-1].text)


@pytest.mark.notebooks
def test_quickstart_and_comparison_find_a_better_student(tmp_path: Path):
    # in one folder, where the second finds the teacher and the student of the first
    fine_tuning = {"TEACHER_STEPS": 300, "STUDENT_STEPS": 150}
    quickstart = execute(
        "01",
        tmp_path,
        "{'gains': gains, 'merge_error': merge_error, 'curve': [entry['eval_objective/reverse_kl'] for entry in "
        "trainer.state.log_history if 'eval_objective/reverse_kl' in entry]}",
        figures=1,
        UPDATES=48,
        **fine_tuning,
    )
    assert quickstart["curve"][-1] < quickstart["curve"][0]
    _, _, highest, prompts, _ = quickstart["gains"]["reverse_kl"]
    assert highest < 0
    assert prompts == 100
    assert quickstart["merge_error"] < 1e-4

    trained = (tmp_path / "runs" / "pair" / "teacher" / "stage.json").stat().st_mtime_ns
    rows = execute("04", tmp_path, "differences.to_dict('records')", figures=1, UPDATES=32, PROMPTS=40, **fine_tuning)
    assert (tmp_path / "runs" / "pair" / "teacher" / "stage.json").stat().st_mtime_ns == trained
    assert {row["student"] for row in rows} == {"MiniLLM", "KD"}
    (reverse,) = [row for row in rows if row["student"] == "MiniLLM" and row["measure"] == "reverse_kl"]
    assert reverse["high"] < 0
    assert reverse["p"] < 0.05
    assert (tmp_path / "runs" / "compare" / "report" / "comparison.csv").is_file()


@pytest.mark.notebooks
def test_pictures_of_how_it_works_show_what_the_text_says(tmp_path: Path):
    found = execute(
        "02",
        tmp_path,
        "{'fits': {name: path[max(STEPS)].tolist() for name, path in fits.items()}, 'errors': errors, "
        "'lm_error': lm_error, 'table': list(table.values()), 'teacher_length': teacher_length, "
        "'curves': [runs.mean(dim=0).tolist() for runs in curves.values()], "
        "'lengths': {name: series[0, -1].item() for name, series in weak_students.items()}, "
        "'kl': {name: series[1, -1].item() for name, series in weak_students.items()}}",
        figures=5,
    )
    forward, left, right = (mean for mean, _ in found["fits"].values())
    assert abs(forward) < 1
    assert (left, right) == pytest.approx((-2.5, 2.5), abs=0.1)
    assert found["errors"]["single step + long term"] < 1e-9
    assert min(found["errors"][name] for name in ("single step alone", "own reward counted twice")) > 0.1
    assert found["lm_error"] < 1e-9
    gradient, split, token, prefix, sequence = found["table"]
    assert max(row[0] for row in (gradient, split, sequence)) < 1e-9
    assert min(token[0], prefix[0]) > 0.05
    assert split[1] < gradient[1]
    assert sequence[1] > token[1]
    alone, mixed, half = (curve[80] for curve in found["curves"])
    assert half < mixed < 0.6 * alone
    assert found["lengths"]["sum"] < found["lengths"]["mean"] < found["teacher_length"]
    assert found["kl"]["sum"] < found["kl"]["mean"]


@pytest.mark.notebooks
def test_qlora_trains_the_adapter_alone_over_four_bit_weights(tmp_path: Path):
    found = execute(
        "03",
        tmp_path,
        "{'moved': sorted(moved), 'trained': sorted(trained), 'ratio': weights['ratio'].tolist(), 'parts': parts, "
        "'kl': history['objective/reverse_kl'].dropna().tolist(), 'loaded': loaded.get_memory_footprint()}",
        figures=1,
    )
    assert found["moved"] == found["trained"] != []
    assert all(0.28 < ratio < 0.4 for ratio in found["ratio"])
    assert found["kl"][-1] < found["kl"][0]
    parts = found["parts"]
    assert parts["its optimizer states"] == pytest.approx(2 * parts["adapter"], rel=0.01)


@pytest.mark.notebooks
def test_losses_are_those_of_trl_where_the_notebook_says_so(tmp_path: Path):
    found = execute(
        "05",
        tmp_path,
        "{'difference': difference, 'angle': angle, 'curves': [list(curve.values()) for curve in curves.values()], "
        "'former': list(former_curve.values()), 'losses': losses}",
        figures=0,
    )
    assert abs(found["difference"]) < 1e-5
    assert abs(found["losses"]["single step"] - found["losses"]["generalized_jsd_loss, beta=0.0"]) > 1e-3
    assert found["angle"] < 0.99
    for curve in [*found["curves"], found["former"]]:
        assert curve[-1] < curve[0]
