"""`rollout_device`: where the parts of a run are, that samples stay the same, and which devices are refused."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ENVIRONMENT, build_model, run_module
from peft import LoraConfig, get_peft_model
from rollout_device_run import CASES, DEVICE
from test_distributed import outcome, run
from test_overlap import EPOCHS, HALF, LORA, UNCHANGED
from test_reliable_runs import assert_same_run
from test_trainer import DATASET, make_config, make_trainer

from minillm_trl.errors import UserError
from minillm_trl.hardware.precision import autocast_on
from minillm_trl.models import student_copy
from minillm_trl.models.merged_adapters import adapted_layers
from minillm_trl.models.student_copy import RolloutCopy
from minillm_trl.models.teacher import place_new_teacher
from minillm_trl.rollouts.rollout_sampler import ScoredRows
from minillm_trl.rollouts.scores import RolloutScores
from minillm_trl.training import rollout_device as module
from minillm_trl.training import teacher_mixed_trainer
from minillm_trl.training.rollout_device import check_placed, rollout_device, training_on_one_device

SCRIPT = Path(__file__).parents[1] / "rollout_device_run.py"
CPU = torch.device("cpu")
INTEGERS = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The outcomes of runs in a process that has the pretended device."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.cli
class TestOnAPretendedDevice:
    """Its operations refuse tensors of two devices, so what is not moved fails as on a GPU."""

    @pytest.mark.parametrize("name", CASES)
    def test_training_is_that_on_one_device(self, found: dict, name: str):
        one, two = found[name]["None"], found[name][DEVICE]
        assert torch.equal(one["weights"], two["weights"])
        assert one["history"] == two["history"]

    @pytest.mark.parametrize("name", CASES)
    def test_copy_and_teachers_are_on_it_and_training_is_not(self, found: dict, name: str):
        devices = found[name][DEVICE]["devices"]
        served = "teacher_server_url" in CASES[name]
        for part in ("copy", "sampled", *(() if served else ("teachers",))):
            assert devices[part] == {DEVICE}, part
        for part in ("student", "scored"):
            assert devices[part] == {"cpu"}, part

    @pytest.mark.parametrize("device", ["None", DEVICE])
    def test_a_run_resumes_exactly_on_the_other_number_of_devices(self, found: dict, device: str):
        whole, resumed = (found[f"resumed from {device}"][name] for name in ("whole", "resumed"))
        assert torch.equal(whole["weights"], resumed["weights"])
        assert whole["history"] == resumed["history"]


@pytest.mark.distributed
def test_each_of_two_processes_samples_on_a_device_of_its_own(tmp_path):
    options = {"overlap_rollouts": True, "max_steps": 9, "corpus": False, "shared_coins": False}
    options |= {"teacher_mixed_alpha": 0.3}
    reference = run(tmp_path, 8, 1, **options)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT), str(tmp_path / "two")]
    done = run_module(*command, 4, 1, json.dumps({**options, "rollout_device": "pretend:0"}))
    assert done.returncode == 0, done.stderr[-5000:]
    facts = json.loads((tmp_path / "two" / "facts.json").read_text())
    result = outcome(tmp_path / "two", facts["history"], False)
    assert (result["moved"] - reference["moved"]).norm() < 1e-4 * reference["moved"].norm()
    staleness = [log["rollout/staleness"] for log in facts["history"] if "rollout/staleness" in log]
    assert staleness == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2, "max_steps": 8, "dataset": EPOCHS},
        {"teacher_mixed_alpha": 0.0, "reward_estimator": "expected"},
        {"peft_config": LORA, "eval_dataset": DATASET.select(range(4)), "eval_strategy": "steps", "eval_steps": 1},
        {"peft_config": UNCHANGED, "merged_rollouts": False},
        {**HALF, "peft_config": LORA},
    ],
    ids=["full", "expected rewards", "lora", "lora, not merged", "half precision"],
)
def test_a_complete_copy_samples_what_one_that_shares_weights_does(tmp_path, monkeypatch, options: dict):
    plain = make_trainer(tmp_path, overlap_rollouts=True, **options)
    plain.train()
    monkeypatch.setattr(teacher_mixed_trainer, "rollout_device", lambda args: CPU)
    apart = make_trainer(tmp_path, overlap_rollouts=True, **options)
    apart.train()
    assert_same_run(apart, plain)
    shared = {parameter.data_ptr() for parameter in apart.model.parameters()}
    copied = [parameter for parameter in apart._rollout_copy.model.parameters() if parameter.numel()]
    assert copied
    assert not any(parameter.data_ptr() in shared for parameter in copied)


def test_scores_are_moved_but_for_those_that_stay():
    values = torch.zeros(2, 3)
    rows = ScoredRows([([1, 0], RolloutScores(student_logps=values, teacher_hidden_states=values))])
    ((numbers, scores),) = rows.to(torch.device("meta"), stay={"teacher_hidden_states"}).parts
    assert numbers == [1, 0]
    assert scores.student_logps.is_meta
    assert scores.teacher_hidden_states is values
    assert scores.entropy is None


class TestCopy:
    def test_frozen_weights_are_copied_again_only_when_they_have_changed(self, monkeypatch):
        model = build_model("llama")
        model.model.embed_tokens.weight.requires_grad_(False)
        copied = []
        assign = student_copy._assign
        monkeypatch.setattr(
            student_copy, "_assign", lambda own, values, device: copied.append(values) or assign(own, values, device)
        )
        copy = RolloutCopy(model, device=CPU)
        everything = len(copied)
        assert everything == len(list(model.parameters()))
        copy.refresh(model)
        assert len(copied) == 2 * everything - 1
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(2.0)
        copy.refresh(model)
        assert len(copied) == 3 * everything - 1
        assert torch.equal(copy.model.model.embed_tokens.weight, model.model.embed_tokens.weight)
        assert copy.model.model.embed_tokens.weight is not model.model.embed_tokens.weight

    def test_the_student_stays_where_it_is(self):
        student = get_peft_model(build_model("llama"), LoraConfig(r=2, init_lora_weights=False)).get_base_model()
        before = {name: (tensor, tensor.device) for name, tensor in student.named_buffers()}
        before |= {name: (tensor, tensor.device) for name, tensor in student.named_parameters()}
        copy = RolloutCopy(student, device=torch.device("meta"), merged=adapted_layers(student))
        assert {str(tensor.device) for tensor in [*copy.model.parameters(), *copy.model.buffers()]} == {"meta"}
        for name, tensor in [*student.named_buffers(), *student.named_parameters()]:
            assert before[name][0] is tensor
            assert tensor.device == before[name][1] == CPU

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda model: setattr(model.lm_head, "scales", INTEGERS), "its base is quantised. Drop"),
            (lambda model: setattr(model, "hf_device_map", {"a": 0, "b": 1}), "its device_map splits it. Drop"),
        ],
        ids=["quantised", "split"],
    )
    def test_a_student_that_cannot_be_copied_is_refused(self, tmp_path, monkeypatch, change, words: str):
        monkeypatch.setattr(teacher_mixed_trainer, "rollout_device", lambda args: CPU)
        student = build_model("llama")
        change(student)
        with pytest.raises(UserError, match=words):
            make_trainer(tmp_path, family="llama", student=student, overlap_rollouts=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollout_device": "cuda:1", "overlap_rollouts": False}, "rollout_device='cuda:1' needs overlap_rollouts"),
        ({"rollout_device": "graphics:1"}, "rollout_device='graphics:1' is no device of torch"),
        ({"rollout_device": "cuda"}, "rollout_device='cuda' does not name one device.*such as 'cuda:1'"),
        ({"rollout_device": "cpu:0"}, "rollout_device='cpu:0' does not name one device.*or 'cpu'"),
        ({"rollout_device": "meta"}, "rollout_device='meta' does not name one device"),
        ({"rollout_device": "cuda:1", "teacher_shares_base": True}, "Set teacher_shares_base=False"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split(" ")[0],
)
def test_values_that_no_machine_has_are_refused(tmp_path, options: dict, words: str):
    with pytest.raises(UserError, match=words):
        make_config(tmp_path, **{"overlap_rollouts": True, **options})


def settings(name: str | None, trains: str = "cuda:0", process: int = 0, processes: int = 1, **options):
    return SimpleNamespace(
        rollout_device=name,
        device=torch.device(trains),
        world_size=processes,
        local_process_index=process,
        **options,
    )


class TestDeviceOfAProcess:
    @pytest.fixture(autouse=True)
    def four_gpus(self, monkeypatch):
        monkeypatch.setattr(module, "count_devices", lambda kind: {"cuda": 4, "cpu": 1}.get(kind, 0))

    def test_process_i_samples_on_the_index_plus_i(self):
        found = [rollout_device(settings("cuda:2", f"cuda:{process}", process, 2)) for process in range(2)]
        assert found == [torch.device("cuda:2"), torch.device("cuda:3")]
        assert rollout_device(settings("cuda:3")) == torch.device("cuda:3")
        assert rollout_device(settings("cuda:0", "cpu", 1, 2)) == torch.device("cuda:1")
        assert rollout_device(settings("cpu")) == CPU
        assert rollout_device(settings(None)) is None

    def test_processes_of_other_machines_do_not_count(self, monkeypatch):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert rollout_device(settings("cuda:2", "cuda:1", 1, 8)) == torch.device("cuda:3")

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (settings("cuda:0"), "train on cuda:0. Set rollout_device='cuda:1'"),
            (settings("cuda:1", "cuda:1", 1, 2), "train on cuda:0 to cuda:1. Set rollout_device='cuda:2'"),
            (settings("cuda:4"), "needs cuda:4, but torch finds 4 devices"),
            (settings("cuda:3", "cuda:0", 0, 2), "needs cuda:3 to cuda:4, but torch finds 4 devices"),
            (settings("cpu", "cpu"), "rollout_device='cpu': the cpu trains"),
            (settings("xpu:1"), "needs xpu:1, but torch finds 0 devices"),
            (settings("mps"), "needs mps, but torch finds 0 devices"),
        ],
        ids=["trains", "trains a process", "missing", "missing for a process", "cpu", "type", "type without index"],
    )
    def test_devices_that_train_or_do_not_exist_are_refused(self, args, words: str):
        with pytest.raises(UserError, match=words):
            rollout_device(args)


def test_a_device_that_torch_does_not_find_is_refused_before_models_are_loaded(tmp_path):
    with pytest.raises(UserError, match="needs cuda:7, but torch finds 0 devices"):
        make_trainer(tmp_path, student="no such folder", overlap_rollouts=True, rollout_device="cuda:7")


class TestTrainingOnOneDevice:
    """A process without a launcher that sees two GPUs."""

    @pytest.fixture(autouse=True)
    def two_gpus(self, monkeypatch):
        monkeypatch.setattr(module, "count_devices", lambda kind: 2)

    def test_models_are_loaded_and_trained_on_the_first(self):
        args = settings("cuda:1", n_gpu=2, _n_gpu=2, model_init_kwargs={"dtype": "auto"})
        with training_on_one_device(args):
            assert args._n_gpu == 1
            assert args.model_init_kwargs == {"device_map": None, "dtype": "auto"}
        assert args.model_init_kwargs == {"dtype": "auto"}

    def test_the_users_device_map_has_priority_and_an_error_restores_the_arguments(self):
        args = settings("cuda:1", n_gpu=2, _n_gpu=2, model_init_kwargs={"device_map": "auto"})
        with training_on_one_device(args):
            assert args.model_init_kwargs == {"device_map": "auto"}
        with pytest.raises(ArithmeticError), training_on_one_device(args):
            raise ArithmeticError
        assert args.model_init_kwargs == {"device_map": "auto"}

    @pytest.mark.parametrize("name", [None, "cpu"])
    def test_without_another_gpu_for_rollouts_nothing_changes(self, name: str | None):
        args = settings(name, n_gpu=2, _n_gpu=2, model_init_kwargs=None)
        with training_on_one_device(args):
            assert args.model_init_kwargs is None
        assert args._n_gpu == 2


class TestTeacher:
    @pytest.mark.parametrize("init_kwargs", [{}, {"device_map": "auto"}], ids=["", "device_map of the user"])
    def test_a_quantised_one_is_loaded_onto_the_device(self, monkeypatch, init_kwargs: dict):
        given = []
        monkeypatch.setattr("minillm_trl.models.teacher.load_teacher", lambda *arguments: given.append(arguments))
        monkeypatch.setattr("minillm_trl.models.teacher.place_teacher", lambda teacher, device: device)
        accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None), device=CPU)
        device = torch.device("cuda:1")
        init_kwargs = {"quantization_config": {"load_in_4bit": True}, **init_kwargs}
        options = {"init_kwargs": init_kwargs, "default_dtype": torch.float16}
        assert place_new_teacher("folder", accelerator, **options, device=device) == device
        assert place_new_teacher("folder", accelerator, **options) == CPU
        assert given[0][1] == {"device_map": {"": device}, **init_kwargs}
        assert given[1][1] == init_kwargs

    def test_one_that_is_elsewhere_is_refused(self):
        teacher = build_model("gpt2")
        check_placed(teacher, CPU, "cpu")
        teacher.transformer.h[1].to("meta")
        with pytest.raises(
            UserError, match="rollout_device='cpu' needs the teacher on cpu, but a part of it is on meta"
        ):
            check_placed(teacher, CPU, "cpu")


def test_autocast_is_that_of_the_device_that_computes():
    accelerator = SimpleNamespace(
        device=torch.device("xpu:0"), mixed_precision="bf16", autocast=lambda: "that of the trainer"
    )
    assert autocast_on(torch.device("xpu:1"), accelerator) == "that of the trainer"
    for found in (autocast_on(CPU, accelerator), RolloutCopy(build_model("gpt2"), device=CPU).precision(accelerator)):
        assert (found.device, found.fast_dtype) == ("cpu", torch.bfloat16)
    accelerator.mixed_precision = "no"
    with autocast_on(CPU, accelerator):
        assert not torch.is_autocast_enabled("cpu")
