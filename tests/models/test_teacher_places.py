"""How a teacher is loaded and where it is placed: arguments, processes, ZeRO-3, sharded blocks and shared bases."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from minillm_trl.errors import UserError
from minillm_trl.models import teacher as module
from minillm_trl.models.teacher import (
    TeacherOffload,
    adapter_on_base,
    is_sharded,
    is_split,
    load_teacher,
    one_process_at_a_time,
    place_new_teacher,
    place_teacher,
    shard_blocks,
    whole_weights,
)

CPU, META = torch.device("cpu"), torch.device("meta")
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
IDS = torch.arange(2, 12)[None]


class TestLoad:
    @pytest.mark.parametrize(
        ("init_kwargs", "options", "expected"),
        [
            (None, {}, {}),
            ({"dtype": torch.float32}, {}, {"dtype": torch.float32}),
            ({"torch_dtype": "auto"}, {}, {"dtype": "auto"}),
            ({"revision": "v2"}, {"trust_remote_code": True}, {"revision": "v2", "trust_remote_code": True}),
            ({"trust_remote_code": False}, {"trust_remote_code": True}, {}),
            (None, {"allow_pickled_weights": True}, {"use_safetensors": None}),
            (
                {"quantization_config": FOUR_BITS},
                {},
                {"quantization_config": {"bnb_4bit_compute_dtype": torch.float16, **FOUR_BITS}},
            ),
            (
                {"quantization_config": FOUR_BITS, "dtype": "auto"},
                {},
                {"quantization_config": FOUR_BITS, "dtype": "auto"},
            ),
            (
                {"quantization_config": {"load_in_8bit": True}},
                {},
                {"quantization_config": {"load_in_8bit": True}},
            ),
        ],
        ids=str,
    )
    def test_arguments_of_from_pretrained(
        self, monkeypatch, model_dir, init_kwargs: dict | None, options: dict, expected: dict
    ):
        """By default 16-bit weights, from safetensors, without code of the repository."""
        given = []
        load = lambda name, **kwargs: given.append((name, kwargs)) or build_model("gpt2")  # noqa: E731
        monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", load)
        before = None if init_kwargs is None else dict(init_kwargs)
        load_teacher(model_dir(), init_kwargs, torch.float16, **options)
        assert init_kwargs == before
        wanted = {"dtype": torch.float16, "trust_remote_code": False, "use_safetensors": True, **expected}
        assert given == [(model_dir(), {name: value for name, value in wanted.items() if value is not None})]

    def test_configuration_of_four_bits_is_left_as_it_is(self, monkeypatch, model_dir):
        config, given = BitsAndBytesConfig(load_in_4bit=True), []
        load = lambda name, **kwargs: given.append(kwargs["quantization_config"]) or build_model("gpt2")  # noqa: E731
        monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", load)
        load_teacher(model_dir(), {"quantization_config": config}, torch.float16)
        assert given == [config]
        assert given[0] is config

    def test_pickles_are_refused_unless_they_are_allowed(self, tmp_path):
        model = build_model("gpt2")
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match="allow_pickled_weights=True"):
            load_teacher(str(tmp_path), None, torch.float32)
        loaded = load_teacher(str(tmp_path), None, torch.float32, allow_pickled_weights=True)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)

    def test_adapter_brings_its_generation_config_and_a_model_has_its_own(self, tmp_path, model_dir):
        student = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir()), LoraConfig(task_type="CAUSAL_LM"))
        student.save_pretrained(tmp_path)
        own = load_teacher(str(tmp_path), None, torch.float32)
        assert own.generation_config.eos_token_id == 0
        GenerationConfig(eos_token_id=[7, 8]).save_pretrained(tmp_path)
        adapter = load_teacher(str(tmp_path), None, torch.float32)
        assert adapter.generation_config.eos_token_id == [7, 8]
        assert any("lora_" in name for name, _ in adapter.named_parameters())
        assert not any(parameter.requires_grad for parameter in adapter.parameters())

    def test_generation_config_that_is_given_for_a_model_wins_over_that_of_its_folder(self, model_dir):
        given = GenerationConfig(eos_token_id=[7, 8])
        loaded = load_teacher(model_dir(), {"generation_config": given}, torch.float32)
        assert loaded.generation_config.eos_token_id == [7, 8]

    def test_wrapper_of_an_adapter_is_taken_off(self):
        model = get_peft_model(build_model("gpt2"), LoraConfig(task_type="CAUSAL_LM"))
        loaded = load_teacher(model, None, torch.float32)
        assert loaded is model.get_base_model()
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert load_teacher(loaded, {}, torch.float32) is loaded  # no arguments are none


class TestSharedBase:
    def test_student_stays_as_it_is_next_to_the_teacher(self, tmp_path, model_dir):
        """With several adapters of the student, dropout, and a generation config of the teacher's adapter."""
        base = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
        torch.manual_seed(0)
        get_peft_model(base, config).save_pretrained(tmp_path)
        GenerationConfig(eos_token_id=[7]).save_pretrained(tmp_path)
        student = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir("llama")), config)
        student.add_adapter("second", config)
        student.train()
        before = {name: (each.requires_grad, each.data_ptr()) for name, each in student.named_parameters()}
        expected = student.eval()(IDS).logits
        student.train()
        teacher = adapter_on_base(student, str(tmp_path))
        assert {name: (each.requires_grad, each.data_ptr()) for name, each in student.named_parameters()} == before
        assert student.training
        assert torch.equal(student.eval()(IDS).logits, expected)
        assert not teacher.training
        assert not any(each.requires_grad for each in teacher.parameters())
        assert not any("default" in name or "second" in name for name, _ in teacher.named_parameters())
        assert teacher.generation_config.eos_token_id == [7]
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir("llama")), tmp_path)
        torch.testing.assert_close(teacher(IDS).logits, plain.eval()(IDS).logits)

    def test_adapter_that_would_change_the_base_is_refused_before_it_is_loaded(self, tmp_path):
        student = get_peft_model(build_model("llama"), LoraConfig(target_modules=["q_proj"]))
        LoraConfig(init_lora_weights="olora", target_modules=["q_proj"]).save_pretrained(tmp_path)
        with pytest.raises(UserError, match="init_lora_weights='olora'"):
            adapter_on_base(student, str(tmp_path))

    def test_base_is_compared_by_its_place(self, tmp_path, model_dir):
        """A link to the folder is the same base, and an adapter that names none is taken for the student's."""
        folder = model_dir("llama")
        (tmp_path / "link").symlink_to(folder)
        student = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
        config = LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(tmp_path / "link"))
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "adapter")
        for name in (str(tmp_path / "link"), None):
            config.base_model_name_or_path = name
            config.save_pretrained(tmp_path / "adapter")
            adapter_on_base(student, str(tmp_path / "adapter"))


class TestProcesses:
    @pytest.mark.parametrize("local", [None, 2])
    def test_one_at_a_time_in_their_order_on_a_machine(self, monkeypatch, local: int | None):
        """Two of four processes are on this machine if the launcher says so; each waits as often as the others."""
        if local is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        else:
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        count = local or 4
        barrier, inside, order = threading.Barrier(count), [0], []

        def process(number: int) -> None:
            fields = {"num_processes": 4, "local_process_index": number, "process_index": number + 9}
            accelerator = SimpleNamespace(**fields, wait_for_everyone=lambda: barrier.wait(timeout=5))
            with one_process_at_a_time(accelerator):
                inside[0] += 1
                order.append((number, inside[0]))
                time.sleep(0.01)
                inside[0] -= 1

        threads = [threading.Thread(target=process, args=(number,)) for number in range(1, count)]
        for thread in threads:
            thread.start()
        process(0)
        for thread in threads:
            thread.join()
        assert order == [(number, 1) for number in range(count)]
        assert not barrier.broken

    def test_zero3_shards_no_model_inside_the_block(self):
        class Zero3:
            def is_zero3(self) -> bool:
                return True

        config = Zero3()
        module.set_hf_deepspeed_config(config)
        try:
            for plugin in (None, SimpleNamespace(zero_stage=2, dschf=config)):
                with whole_weights(plugin):
                    assert is_deepspeed_zero3_enabled()
            plugin = SimpleNamespace(zero_stage=3, dschf=config)
            for error in (nullcontext(), pytest.raises(RuntimeError)):
                with error, whole_weights(plugin):
                    assert not is_deepspeed_zero3_enabled()
                    if not isinstance(error, nullcontext):
                        raise RuntimeError
                assert is_deepspeed_zero3_enabled()
        finally:
            module.unset_hf_deepspeed_config()


class TestPlaceNew:
    """What is done with a teacher, with the functions that load, place and shard it recorded."""

    @pytest.fixture
    def calls(self, monkeypatch) -> list:
        calls: list = []

        @contextmanager
        def entered(name: str, argument) -> Iterator[None]:
            calls.append((name, argument))
            yield
            calls.append(f"end of {name}")

        def load(*arguments):
            calls.append(("load", arguments))
            return "teacher"

        monkeypatch.setattr(module, "load_teacher", load)
        monkeypatch.setattr(
            module, "place_teacher", lambda *arguments: calls.append(("place", *arguments)) or "placed"
        )
        monkeypatch.setattr(
            module, "shard_blocks", lambda *arguments: calls.append(("shard", *arguments)) or "sharded"
        )
        monkeypatch.setattr(module, "whole_weights", lambda plugin: entered("whole", plugin))
        monkeypatch.setattr(module, "one_process_at_a_time", lambda accelerator: entered("turn", accelerator))
        return calls

    ARGUMENTS = ("folder", {"revision": "v2"}, torch.float16, True, False)

    def place(self, processes: int, teacher_model="folder", **options):
        accelerator = SimpleNamespace(
            num_processes=processes, device=CPU, state=SimpleNamespace(deepspeed_plugin="plugin")
        )
        settings = {"init_kwargs": {"revision": "v2"}, "default_dtype": torch.float16, "trust_remote_code": True}
        return accelerator, place_new_teacher(teacher_model, accelerator, **{**settings, **options})

    @pytest.mark.parametrize(("processes", "shard"), [(1, True), (2, False), (1, False)])
    @pytest.mark.parametrize("device", [None, META])
    def test_one_process_or_whole_teachers(self, calls, processes: int, shard: bool, device):
        _, placed = self.place(processes, shard=shard, device=device)
        assert placed == "placed"
        assert calls == [
            ("whole", "plugin"),
            ("load", self.ARGUMENTS),
            ("place", "teacher", device or CPU),
            "end of whole",
        ]

    def test_by_default_each_process_has_all_of_it_without_code_of_others(self, calls):
        accelerator = SimpleNamespace(num_processes=2, device=CPU, state=SimpleNamespace(deepspeed_plugin=None))
        assert place_new_teacher("folder", accelerator, init_kwargs=None, default_dtype=torch.float32) == "placed"
        assert calls[1:3] == [("load", ("folder", None, torch.float32, False, False)), ("place", "teacher", CPU)]

    def test_processes_that_share_its_blocks_load_it_in_turn(self, calls):
        accelerator, placed = self.place(2, shard=True, allow_pickled_weights=True)
        assert placed == "sharded"
        assert calls == [
            ("whole", "plugin"),
            ("turn", accelerator),
            ("load", (*self.ARGUMENTS[:-1], True)),
            ("shard", "teacher", "cpu"),
            "end of turn",
            "end of whole",
        ]

    @pytest.mark.parametrize(
        ("teacher_model", "quantized", "device", "mapped"),
        [
            ("folder", True, META, True),
            ("folder", False, META, False),
            ("folder", True, None, False),
            (None, True, META, False),
        ],
    )
    def test_only_a_quantised_folder_is_loaded_onto_another_device(
        self, calls, teacher_model, quantized: bool, device, mapped: bool
    ):
        init_kwargs = {"quantization_config": FOUR_BITS} if quantized else {}
        self.place(1, teacher_model, init_kwargs=init_kwargs, device=device)
        found = calls[1][1][1]
        assert found == ({"device_map": {"": META}, **init_kwargs} if mapped else init_kwargs)
        assert "device_map" not in init_kwargs


class TestPlace:
    def test_whole_teacher_is_moved(self):
        teacher = build_model("gpt2")
        assert place_teacher(teacher, META) is teacher
        assert teacher.device == META

    @pytest.mark.parametrize(
        "attributes", [{"hf_device_map": {"a": "cpu", "b": "disk"}}, {"is_quantized": True}], ids=str
    )
    def test_teacher_that_has_its_place_stays_there(self, attributes: dict):
        teacher = build_model("gpt2")
        for name, value in attributes.items():
            setattr(teacher, name, value)
        assert place_teacher(teacher, META) is teacher
        assert teacher.device == CPU

    @pytest.mark.parametrize(
        ("device_map", "expected"),
        [({"": 0}, False), ({"a": 0, "b": 0}, False), ({"a": 0, "b": 1}, True), ({"a": 0, "b": "cpu"}, True)],
    )
    def test_split_is_what_is_on_several_devices(self, device_map: dict, expected: bool):
        assert not is_split(SimpleNamespace())
        assert is_split(SimpleNamespace(hf_device_map=device_map)) == expected


def test_offloaded_teacher_leaves_any_kind_of_device():
    """Weights of a device that torch does not have here, which know where they are."""

    class Weights:
        def __init__(self, place: str):
            self.place, self.data = place, self

        def is_floating_point(self) -> bool:
            return True

        def to(self, device: str, **unused: bool) -> "Weights":
            return Weights(torch.device(device).type)

        def clone(self) -> "Weights":
            return Weights(self.place)

    body, head = Weights("xpu"), Weights("xpu")
    embeddings = SimpleNamespace(parameters=lambda: [head])
    teacher = SimpleNamespace(
        device=torch.device("xpu:0"), parameters=lambda: [body, head], get_output_embeddings=lambda: embeddings
    )
    offload = TeacherOffload(teacher)
    for _ in range(2):
        assert (body.data.place, head.data.place) == ("cpu", "xpu")
        with offload:
            assert (body.data.place, head.data.place) == ("xpu", "xpu")
    assert body.data.place == "cpu"


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


class TestShardedBlocks:
    def test_blocks_are_gathered_while_they_run_and_the_head_is_whole(self, one_process):
        expected = build_model("llama")(IDS).logits
        teacher = shard_blocks(build_model("llama").requires_grad_(False), "cpu")

        def sharded() -> set[str]:
            return {name for name, each in teacher.named_parameters() if isinstance(each, DTensor)}

        blocks = {name for name, _ in teacher.named_parameters() if ".layers." in name}
        assert sharded() == blocks
        assert is_sharded(teacher)
        for _ in range(2):
            torch.testing.assert_close(teacher(IDS).logits, expected)
            assert sharded() == blocks
        assert shard_blocks(teacher, "cpu") is teacher
        assert place_teacher(teacher, META) is teacher
        assert teacher.lm_head.weight.device == CPU
        with pytest.raises(UserError, match="neither quantised nor sharded"):
            TeacherOffload(teacher)

    def test_split_teacher_is_refused(self):
        teacher = build_model("llama")
        teacher.hf_device_map = {"model": 0, "lm_head": "cpu"}
        with pytest.raises(UserError, match="it is split by its device_map"):
            shard_blocks(teacher, "cpu")
