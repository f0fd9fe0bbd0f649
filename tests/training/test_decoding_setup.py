"""Which models a run compiles, and with which backend."""

from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from test_trainer import make_config, make_trainer

import minillm_trl.training.decoding_setup
from minillm_trl.training.decoding_setup import compile_backend, prepare_decoding

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "has_triton", "backend"),
    [((7, 0), True, "cudagraphs"), ((8, 0), True, "inductor"), ((9, 0), False, "cudagraphs")],
)
def test_auto_takes_cuda_graphs_on_older_gpus_and_without_triton(monkeypatch, capability, has_triton, backend):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(minillm_trl.training.decoding_setup, "find_spec", lambda name: has_triton or None)
    assert compile_backend("auto", GPU) == backend
    assert compile_backend("inductor", GPU) == "inductor"


def test_auto_compiles_nothing_on_a_cpu_and_says_so(caplog):
    assert compile_backend("auto", torch.device("cpu")) is None
    assert "compile_rollouts='auto': chose None on cpu" in caplog.text
    assert compile_backend(None, GPU) is None


def test_auto_looks_at_the_device_of_the_run_where_the_student_is_still_elsewhere(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    chosen: list[torch.device] = []
    monkeypatch.setattr(
        minillm_trl.training.decoding_setup, "compile_backend", lambda requested, device: chosen.append(device)
    )
    prepare_decoding(build_model("gpt2").to("meta"), trainer._teacher, trainer.args, decodes=False)
    assert chosen == [trainer.accelerator.device]


@pytest.mark.parametrize(
    ("options", "compiles_teacher"),
    [({}, True), ({"teacher_mixed_alpha": 0.0}, False), ({"offload_teacher": True}, False)],
    ids=lambda value: str(value),
)
def test_teacher_is_compiled_where_it_draws_and_its_weights_stay(tmp_path, options: dict, compiles_teacher: bool):
    trainer = make_trainer(tmp_path, compile_rollouts="inductor", **options)
    teacher = trainer.teacher_model
    assert any(model is teacher for model in trainer._compiled_decoding.models) == compiles_teacher


def test_teacher_that_is_quantised_on_several_devices_or_on_the_students_base_is_not_compiled(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    teacher, args = (
        trainer._teacher,
        SimpleNamespace(teacher_mixed_alpha=0.2, offload_teacher=False, teacher_shares_base=False),
    )
    choose = minillm_trl.training.decoding_setup._teacher_to_compile
    assert choose(teacher, args) is teacher.model
    teacher.model.hf_device_map = {"model": 0, "lm_head": 1}
    assert choose(teacher, args) is None
    del teacher.model.hf_device_map
    args.teacher_shares_base = True
    assert choose(teacher, args) is None
    args.teacher_shares_base, args.offload_teacher = False, True
    assert choose(teacher, args) is None
    args.offload_teacher = False
    teacher.model.is_quantized = True
    assert choose(teacher, args) is None
    teacher.model.is_quantized = False
    with monkeypatch.context() as sharded:
        sharded.setattr(type(teacher), "is_sharded", True)
        assert choose(teacher, args) is None
    assert choose(teacher, args) is teacher.model
    teacher.model.lm_head = torch.nn.Sequential(teacher.model.lm_head)  # as a head with an adapter
    assert choose(teacher, args) is None
    several = SimpleNamespace(models=[teacher.model] * 2, model=build_model("gpt2"), is_sharded=False)
    assert choose(several, args) is None


@pytest.mark.parametrize(("requested", "compiles"), [("inductor", True), (None, False)])
def test_student_and_teacher_are_compiled_with_the_backend(
    tmp_path, monkeypatch, requested: str | None, compiles: bool
):
    setup, trainer, student = minillm_trl.training.decoding_setup, make_trainer(tmp_path), build_model("gpt2")
    monkeypatch.setattr(setup, "CompiledDecoding", lambda *arguments: arguments)
    trainer.args.compile_rollouts = requested
    compiled = prepare_decoding(student, trainer._teacher, trainer.args, decodes=False)
    assert compiled == ((student, "inductor", trainer.teacher_model) if compiles else None)


@pytest.mark.parametrize(
    ("options", "decodes", "checked"),
    [
        ({}, True, ["student", "teacher"]),
        ({}, False, []),
        ({"teacher_mixed_alpha": 0.0}, True, ["student"]),
        ({"compile_rollouts": "inductor"}, True, ["student", "teacher", "steps of student", "steps of teacher"]),
        ({"compile_rollouts": "inductor", "teacher_mixed_alpha": 0.0}, True, ["student", "steps of student"]),
        ({"compile_rollouts": "inductor"}, False, []),
    ],
    ids=str,
)
def test_every_model_that_draws_tokens_is_checked(tmp_path, monkeypatch, options: dict, decodes: bool, checked: list):
    trainer = make_trainer(tmp_path, **options)
    setup, found = minillm_trl.training.decoding_setup, []
    monkeypatch.setattr(setup, "check_decoding", lambda model, name: found.append((model, name)))
    monkeypatch.setattr(
        setup, "check_compiled_decoding", lambda model, name: found.append((model, f"steps of {name}"))
    )
    student = build_model("gpt2")
    prepare_decoding(student, trainer._teacher, trainer.args, decodes)
    assert [name for _, name in found] == checked
    for model, name in found:
        assert model is (student if "student" in name else trainer.teacher_model)


def test_compiling_is_refused_where_trl_samples(tmp_path):
    with pytest.raises(ValueError, match="compile_rollouts='auto' has no effect with top_p"):
        make_config(tmp_path, compile_rollouts="auto", top_p=0.9, teacher_mixed_alpha=0.0)
