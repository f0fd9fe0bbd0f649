"""Verdicts on recorded machines, and the screen of `minillm-trl doctor` on this one."""

import re
import shutil
from dataclasses import replace

import pytest
import yaml
from conftest import build_model, build_tokenizer
from transformers import BitsAndBytesConfig, Qwen2Config
from trl import ModelConfig

from minillm_trl import MiniLLMConfig
from minillm_trl.cli import main
from minillm_trl.cli.arguments import TeacherArguments
from minillm_trl.cli.doctor import (
    _read,
    check,
    choose_strategy,
    describe,
    describe_memory,
    launch_line,
    training_processes,
    with_all_teachers,
)
from minillm_trl.hardware.machine import GPU, Machine, best_precision, probe, problems, runs_on
from minillm_trl.training import rollout_device

GIB = 2**30
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
VERSIONS = {"torch": "2.13.0", "trl": "1.16.0", "transformers": "5.23.0", "bitsandbytes": None}


def machine(*gpus: GPU, cuda: str | None = "12.6", architectures: tuple[str, ...] = CU126) -> Machine:
    return Machine(gpus, 16, 128 * GIB, cuda, architectures, VERSIONS)


V100 = GPU("Tesla V100-SXM2-32GB", (7, 0), 32 * GIB)
A100 = GPU("NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB)
H200 = GPU("NVIDIA H200", (9, 0), 141 * GIB)
CPU = machine(cuda=None, architectures=())


class TestVerdicts:
    @pytest.mark.parametrize(
        ("facts", "precision"),
        [(machine(V100, V100), "fp16"), (machine(A100), "bf16"), (machine(H200), "bf16"), (CPU, "no")],
        ids=["V100", "A100", "H200", "CPU"],
    )
    def test_precision(self, facts: Machine, precision: str):
        assert best_precision(facts) == precision

    def test_slowest_card_of_a_mixed_box_decides(self):
        assert best_precision(machine(A100, V100)) == "fp16"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"bf16": True}, "bf16=True: the Tesla V100-SXM2-32GB .sm_70. has no bfloat16. Set bf16=False and fp16"),
            ({"attn_implementation": "flash_attention_2"}, "needs compute capability 8.0.*attn_implementation='sdpa'"),
            ({"load_in_8bit": True}, "needs compute capability 7.5.*load_in_4bit=True with bnb_4bit_quant_type='nf4'"),
        ],
    )
    def test_v100_refuses_what_it_lacks(self, settings: dict, message: str):
        (found,) = problems(machine(V100), **settings)
        assert re.search(message, found)
        assert problems(machine(A100), **settings) == []
        assert problems(machine(H200), **settings) == []

    def test_v100_runs_in_float16_with_sdpa_and_nf4(self):
        assert problems(machine(V100), fp16=True, attn_implementation="sdpa", compile_rollouts="inductor") == []

    def test_build_without_the_architecture_is_recognised_with_the_install_line(self):
        (found,) = problems(machine(V100, cuda="13.0", architectures=CU130), fp16=True)
        assert "torch 2.13.0 was not built for the Tesla V100-SXM2-32GB (sm_70), only for sm_75" in found
        assert "pip install 'torch>=2.13,<2.15' --index-url https://download.pytorch.org/whl/cu126" in found

    def test_half_precision_without_a_gpu(self):
        found = problems(CPU, bf16=True, fp16=True)
        assert "fp16=True has no gradient scaler on a CPU" in found[0]
        assert "set use_cpu=True" in found[1]
        assert problems(CPU, bf16=True, use_cpu=True) == []
        assert problems(CPU) == []

    @pytest.mark.parametrize(
        ("capability", "architectures", "expected"),
        [
            ((7, 0), CU126, True),
            ((7, 0), CU130, False),
            ((8, 9), ("sm_86",), True),
            ((8, 0), ("sm_86",), False),
            ((12, 1), ("compute_120",), True),
            ((9, 0), ("sm_90a",), True),
        ],
    )
    def test_architectures(self, capability: tuple[int, int], architectures: tuple[str, ...], expected: bool):
        assert runs_on(GPU("card", capability, GIB), architectures) is expected


class TestDoctor:
    def test_screen_names_cards_and_features(self):
        screen = "\n".join(describe(machine(V100, V100)))
        assert screen.count("Tesla V100-SXM2-32GB, sm_70, 32 GiB") == 2
        assert "FlashAttention-2: no, LLM.int8(): no, NF4: yes" in screen
        assert "precision to train in: fp16" in screen
        assert "torch can use no GPU" in "\n".join(describe(CPU))

    @pytest.mark.parametrize(
        ("facts", "expected"),
        [
            (CPU, "--accelerate_config cpu"),
            (machine(A100), "--accelerate_config single_gpu"),
            (machine(V100, V100), "--accelerate_config v100_ddp_fp16 --num_processes 2"),
            (machine(H200, H200), "--accelerate_config ddp_bf16 --num_processes 2"),
        ],
        ids=["CPU", "A100", "V100s", "H200s"],
    )
    def test_launch_line(self, facts: Machine, expected: str):
        assert launch_line(facts, "run.yaml") == f"minillm-trl minillm --config run.yaml {expected}"

    def test_one_v100_is_launched_in_float16(self):
        assert launch_line(machine(V100), "run.yaml").endswith("--accelerate_config v100_single_gpu_fp16")

    @pytest.mark.parametrize(
        ("layers", "options", "cards", "strategy", "verdict"),
        [
            (8, {}, 4, "ddp", "available: fits"),
            (40, {}, 4, "zero2", "available: fits"),
            (64, {}, 8, "fsdp", "available: fits"),
            (72, {}, 8, "fsdp", "may not fit"),
            (64, {"shard_teacher": True}, 8, "zero2", "available: fits"),
            (40, {}, 1, "ddp", "does not fit"),
        ],
    )
    def test_strategy_is_the_first_that_fits(self, tmp_path, layers, options: dict, cards, strategy, verdict):
        config = Qwen2Config(
            hidden_size=2048,
            intermediate_size=5504,
            num_hidden_layers=layers,
            num_attention_heads=16,
            vocab_size=32000,
        )
        config.save_pretrained(tmp_path)
        facts = machine(*[V100] * cards)
        facts = replace(facts, versions={**VERSIONS, "deepspeed": "0.19"})
        args = MiniLLMConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=4, **options)
        model, teacher = ModelConfig(model_name_or_path=str(tmp_path)), TeacherArguments(str(tmp_path))
        chosen, parts = choose_strategy(facts, model, teacher, args, prompt_tokens=256)
        assert chosen == strategy
        assert verdict in "\n".join(describe_memory(facts, chosen, parts))
        expected = "v100_single_gpu_fp16" if cards == 1 else f"v100_{strategy}_fp16 --num_processes {cards}"
        assert launch_line(facts, "run.yaml", chosen).endswith(expected)

    @pytest.mark.parametrize("quantization", [{"load_in_8bit": True}, BitsAndBytesConfig(load_in_8bit=True)])
    def test_teacher_is_checked_as_well(self, tmp_path, quantization):
        quantized = {"quantization_config": quantization}
        args = MiniLLMConfig(str(tmp_path), use_cpu=True, teacher_model_init_kwargs=quantized, teacher_mixed_alpha=0.0)
        args.use_cpu = False
        (found,) = check(machine(V100), ModelConfig(), TeacherArguments("teacher"), args)
        assert "load_in_8bit=True: LLM.int8() needs compute capability 7.5" in found

    def test_this_machine_is_described(self, capsys):
        assert main(["doctor"]) == 0
        shown = capsys.readouterr().out
        assert f"{probe().cores} cores" in shown
        assert probe().gpus or "precision to train in: float32" in shown
        assert "No problems found." in shown

    def write(self, folder, model_dir, **options) -> str:
        run = {
            "model_name_or_path": str(model_dir("gpt2")),
            "teacher_model_name_or_path": str(model_dir("gpt2")),
            "dataset": "e2e",
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "bf16": False,
            "max_completion_length": 16,
            **options,
        }
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(run))
        return str(path)

    def test_configuration_is_checked_with_an_estimate(self, tmp_path, capsys, model_dir):
        assert main(["doctor", "--config", self.write(tmp_path, model_dir)]) == 0
        shown = capsys.readouterr().out
        assert "GiB  teacher" in shown
        assert "PROBLEM" not in shown

    @pytest.mark.parametrize(
        ("options", "merges"), [({"mixing": "speculative"}, True), ({"teacher_mixed_alpha": 0.0}, False)]
    )
    def test_student_with_adapters_that_judges_drafts_of_vllm_has_a_merged_copy(
        self, tmp_path, model_dir, options: dict, merges: bool
    ):
        name = str(model_dir("gpt2"))
        args = MiniLLMConfig(str(tmp_path), use_cpu=True, use_vllm=True, **options)
        model = ModelConfig(model_name_or_path=name, use_peft=True, lora_r=4)
        _, parts = choose_strategy(CPU, model, TeacherArguments(name), args, prompt_tokens=8)
        assert ("weights merged while sampling" in parts) == merges

    @pytest.mark.parametrize(("memory", "verdict"), [(128, "available: fits"), (0.0001, "does not fit")])
    def test_on_a_cpu_the_estimate_is_of_the_process_in_its_precision(self, tmp_path, model_dir, memory, verdict):
        name = str(model_dir("gpt2"))
        facts = replace(CPU, memory=int(memory * GIB))
        peaks = []
        for bf16 in (False, True):
            args = MiniLLMConfig(str(tmp_path), use_cpu=True, bf16=bf16)
            models = ModelConfig(model_name_or_path=name), TeacherArguments(name)
            strategy, parts = choose_strategy(facts, *models, args, prompt_tokens=8)
            shown = "\n".join(describe_memory(facts, strategy, parts))
            assert "GPU" not in shown
            assert verdict in shown
            assert parts["copy for rollouts"] == 0
            peaks.append(parts["teacher"])
        assert peaks[0] == 2 * peaks[1]

    def test_configuration_that_cannot_run_is_told_by_the_exit_code(self, tmp_path, capsys, model_dir):
        assert main(["doctor", "--config", self.write(tmp_path, model_dir, fp16=True)]) == 1
        assert "PROBLEM  " in capsys.readouterr().out

    def test_models_that_do_not_fit_together_are_told(self, tmp_path, capsys, model_dir):
        other = tmp_path / "other"
        build_model("gpt2", 300).save_pretrained(other)
        tokenizer = build_tokenizer()
        tokenizer.add_tokens(["<other>"])
        tokenizer.save_pretrained(other)
        path = self.write(tmp_path, model_dir, teacher_model_name_or_path=str(other))
        assert main(["doctor", "--config", path]) == 1
        assert "PROBLEM  Student and teacher have different tokenizers" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("served", "message"),
        [
            ({}, "--teacher_model_name_or_path is missing"),
            ({"teacher_server_url": "http://a:1"}, "teacher on a server"),
        ],
    )
    def test_run_without_a_local_teacher(self, tmp_path, capsys, model_dir, served: dict, message: str):
        options = {"teacher_model_name_or_path": None, "teacher_mixed_alpha": 0.0, **served}
        assert main(["doctor", "--config", self.write(tmp_path, model_dir, **options)]) == 1
        assert message in capsys.readouterr().out

    def test_memory_of_several_teachers_adds_up_unless_they_are_offloaded(self, tmp_path, capsys, model_dir):
        first, second = str(model_dir("gpt2", seed=1, width=48)), str(model_dir("gpt2", seed=2))
        estimates = {}
        for name, options in {
            "first": {"teacher_model_name_or_path": first},
            "second": {"teacher_model_name_or_path": second},
            "both": {"teachers": {"a": second, "b": first}},
            "offloaded": {"teachers": {"a": second, "b": first}, "offload_teacher": True},
        }.items():
            options = {"teacher_model_name_or_path": None, **options}
            pairs = _read(self.write(tmp_path, model_dir, **options))
            found = [choose_strategy(machine(V100), *pair, prompt_tokens=8) for pair in pairs.values()]
            estimates[name] = with_all_teachers(found, offloads=name == "offloaded")[1]
        both, offloaded = estimates["both"], estimates["offloaded"]
        assert both["teacher"] == estimates["first"]["teacher"] + estimates["second"]["teacher"]
        more = estimates["second"]["teacher"]
        assert both["while sampling"] == pytest.approx(estimates["first"]["while sampling"] + more)
        assert offloaded["while sampling"] == estimates["first"]["while sampling"]
        build_model("gpt2", 280).save_pretrained(tmp_path / "other")
        build_tokenizer(280).save_pretrained(tmp_path / "other")
        other = {"teachers": {"a": first, "b": str(tmp_path / "other")}, "teacher_model_name_or_path": None}
        assert main(["doctor", "--config", self.write(tmp_path, model_dir, **other)]) == 1
        assert "PROBLEM  Teacher 'b': Student and teacher have different tokenizers" in capsys.readouterr().out

    def test_weights_that_the_run_would_refuse_are_told(self, tmp_path, capsys, model_dir):
        pickled = tmp_path / "pickled"
        shutil.copytree(model_dir("gpt2"), pickled)
        (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
        options: dict[str, object] = {"teacher_model_name_or_path": str(pickled)}
        assert main(["doctor", "--config", self.write(tmp_path, model_dir, **options)]) == 1
        assert f"PROBLEM  {pickled} has its weights only as a pickle" in capsys.readouterr().out
        options["allow_pickled_weights"] = True
        assert main(["doctor", "--config", self.write(tmp_path, model_dir, **options)]) == 0

    def test_context_without_room_for_a_prompt_is_told(self, tmp_path, capsys, model_dir):
        assert main(["doctor", "--config", self.write(tmp_path, model_dir, max_completion_length=100_000)]) == 1
        assert "PROBLEM  max_completion_length=100000 leaves no room for a prompt" in capsys.readouterr().out


class TestRolloutDevice:
    def test_the_estimate_has_a_sum_for_each_device(self, tmp_path, model_dir):
        name = str(model_dir("gpt2"))
        args = MiniLLMConfig(str(tmp_path), use_cpu=True, overlap_rollouts=True, rollout_device="cuda:1")
        models = ModelConfig(model_name_or_path=name), TeacherArguments(name)
        strategy, parts = choose_strategy(machine(V100, V100), *models, args, prompt_tokens=8)
        shown = describe_memory(machine(V100, V100), strategy, parts)
        assert strategy == "ddp"
        assert any(line.endswith("GiB  on cuda:1, for the next rollout") for line in shown)
        _, several = with_all_teachers([(strategy, parts), (strategy, parts)], offloads=False)
        there = "on cuda:1, for the next rollout"
        assert several[there] - parts[there] == parts["teacher"]
        assert several["while updating"] == parts["while updating"]

    @pytest.mark.parametrize(("device", "verdict"), [("cuda:1", "does not fit"), ("cpu", "available: fits")])
    def test_what_does_not_fit_there_is_told(self, tmp_path, model_dir, device: str, verdict: str):
        name = str(model_dir("gpt2"))
        args = MiniLLMConfig(str(tmp_path), use_cpu=True, overlap_rollouts=True, rollout_device=device)
        models = ModelConfig(model_name_or_path=name), TeacherArguments(name)
        _, parts = choose_strategy(machine(V100, V100), *models, args, prompt_tokens=8)
        parts[f"on {device}, for the next rollout"] = 40.0 * GIB
        assert verdict in "\n".join(describe_memory(machine(V100, V100), "ddp", parts))

    @pytest.mark.parametrize(
        ("device", "cards", "processes"),
        [(None, 4, 4), ("cpu", 4, 4), ("cuda:1", 2, 1), ("cuda:2", 4, 2), ("cuda:3", 4, 1), ("cuda:1", 1, 1)],
    )
    def test_each_launched_process_has_a_gpu_for_rollouts(self, device: str | None, cards: int, processes: int):
        facts = machine(*[V100] * cards)
        assert training_processes(facts, device) == processes
        line = launch_line(facts, "run.yaml", "ddp", training_processes(facts, device))
        name = "single_gpu_fp16" if processes == 1 else f"ddp_fp16 --num_processes {processes}"
        assert line.endswith(f"--accelerate_config v100_{name}")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rollout_device": "cuda:1"}, "needs overlap_rollouts=True"),
            ({"rollout_device": "cuda:1", "overlap_rollouts": True}, "needs cuda:1, but torch finds 0 devices"),
            ({"rollout_device": "cpu", "overlap_rollouts": True}, "PROBLEM  rollout_device='cpu': the cpu trains"),
            (
                {"rollout_device": "xpu:1", "overlap_rollouts": True, "load_in_4bit": True},
                "PROBLEM  rollout_device='xpu:1' needs a copy of the student, which load_in_4bit=True quantises",
            ),
        ],
    )
    def test_settings_that_the_run_would_refuse_are_told(
        self, tmp_path, capsys, monkeypatch, model_dir, options: dict, message: str
    ):
        monkeypatch.setattr(rollout_device, "count_devices", lambda kind: {"xpu": 2}.get(kind, 0))
        assert main(["doctor", "--config", TestDoctor().write(tmp_path, model_dir, **options)]) == 1
        assert message in capsys.readouterr().out
