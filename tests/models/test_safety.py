"""Code that comes with models, pickles and the network: nothing of them without being asked for."""

import json
import os
import pickle
import shutil
import socket
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import load_state_dict
from transformers.utils import has_file

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.baselines import KDConfig, KDTrainer
from minillm_trl.cli import main
from minillm_trl.cli.arguments import parse
from minillm_trl.cli.minillm import build_parser
from minillm_trl.models.files import explained
from minillm_trl.models.pickled_weights import refuse_pickled_weights
from minillm_trl.models.teacher import load_teacher

TRAINING = (
    *("--use_cpu", "true", "--bf16", "false", "--max_steps", "1", "--per_device_train_batch_size", "2"),
    *("--save_strategy", "no"),
)


class Intruder:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model of its own, to be spoilt."""
    tokenizer = build_tokenizer()
    build_model("gpt2", len(tokenizer), width=16, layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"the mill {i}", "completion": "is old"}) + "\n" for i in range(4)))
    return path


def status(*words: object) -> int:
    return main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    assert status(*words) == 2
    return capsys.readouterr().err


def generate(model: Path) -> tuple:
    return "generate", "--model", model, "--prompt", "the mill", "--max_new_tokens", 2


class TestRemoteCode:
    @pytest.fixture
    def with_code(self, model: Path, tmp_path: Path) -> tuple[Path, Path]:
        """A model that brings a class of its own, and the file that importing it makes."""
        marker = tmp_path / "marker"
        code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        code += "from transformers import GPT2Config, GPT2LMHeadModel\n"
        code += "class OwnConfig(GPT2Config):\n    model_type = 'own'\n"
        code += "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
        (model / "own.py").write_text(code)
        config = json.loads((model / "config.json").read_text())
        classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
        return model, marker

    def test_it_runs_where_it_is_asked_for(self, with_code):
        model, marker = with_code
        assert status(*generate(model), "--trust_remote_code") == 0
        assert marker.exists()

    def test_it_runs_for_the_base_of_an_adapter_where_it_is_asked_for(self, with_code, tmp_path, capsys):
        model, marker = with_code
        base = build_model("gpt2", len(build_tokenizer()), width=16, layers=1)
        base.name_or_path = str(model)
        get_peft_model(base, LoraConfig(target_modules=["c_attn"])).save_pretrained(tmp_path / "adapter")
        assert "trust_remote_code" in refused(capsys, *generate(tmp_path / "adapter"))
        assert not marker.exists()
        assert status(*generate(tmp_path / "adapter"), "--trust_remote_code") == 0
        assert marker.exists()

    @pytest.mark.parametrize("name", ["generate", "evaluate", "sft", "minillm"])
    def test_it_does_not_run_by_default(self, with_code, tmp_path, data, capsys, name):
        model, marker = with_code
        training = ("--model_name_or_path", model, "--dataset", data, "--output_dir", tmp_path / "out", *TRAINING)
        words = {
            "generate": generate(model),
            "evaluate": ("evaluate", "--model", model, "--dataset", data, "--output_dir", tmp_path / "out"),
            "sft": ("sft", *training),
            "minillm": ("minillm", "--teacher_model_name_or_path", model, *training),
        }[name]
        message = refused(capsys, *words)
        assert str(model) in message
        assert "trust_remote_code" in message
        assert not marker.exists()


def pickle_weights(model: Path, folder: Path) -> Path:
    """A copy of a model as older ones are on the hub."""
    shutil.copytree(model, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


class TestPickles:
    def test_weights_that_are_tensors_alone_load_where_it_is_asked_for(self, model, tmp_path, data, capsys):
        pickled = pickle_weights(model, tmp_path / "pickled")
        training = ("--dataset", data, "--output_dir", tmp_path / "out", *TRAINING)
        keep = ("--keep_unfinished", "true")
        sampling = ("--max_completion_length", 4, *training)
        evaluation = ("--dataset", data, "--seeds", 0, "--max_new_tokens", 2, "--output_dir", tmp_path / "evaluation")
        for words in (
            generate(pickled),
            ("evaluate", "--model", pickled, *evaluation),
            ("evaluate", "--model", model, "--teacher", pickled, *evaluation),
            ("sft", "--model_name_or_path", pickled, *training),
            ("kd", "--model_name_or_path", model, "--teacher_model_name_or_path", pickled, *training),
            ("seqkd", "--model_name_or_path", model, "--teacher_model_name_or_path", pickled, *keep, *sampling),
            ("minillm", "--model_name_or_path", pickled, "--teacher_model_name_or_path", model, *sampling),
            ("minillm", "--model_name_or_path", model, "--teacher_model_name_or_path", pickled, *sampling),
        ):
            message = refused(capsys, *words)
            assert f"{pickled} has its weights only as a pickle (pytorch_model.bin)" in message
            assert "--allow_pickled_weights" in message
            assert not (tmp_path / "out").exists()
            assert status(*words, "--allow_pickled_weights") == 0
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            shutil.rmtree(tmp_path / "evaluation", ignore_errors=True)

    def test_adapters_and_their_bases_are_no_exception(self, model, tmp_path, capsys):
        pickled = pickle_weights(model, tmp_path / "pickled")
        adapter = tmp_path / "adapter"
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2)).save_pretrained(adapter)
        words = ("merge", "--adapter", adapter, "--output_dir", tmp_path / "out")
        assert f"{pickled} has its weights only as a pickle" in refused(capsys, *words, "--model", pickled)
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
        assert f"{adapter} has its weights only as a pickle (adapter_model.bin)" in refused(capsys, *words)
        with pytest.raises(ValueError, match=r"has its weights only as a pickle \(adapter_model.bin\)"):
            load_teacher(str(adapter), None, torch.float32)
        assert status(*words, "--model", pickled, "--allow_pickled_weights") == 0

    def test_adapter_on_another_base_than_the_pickled_one_that_it_names(self, model, tmp_path):
        pickled = pickle_weights(model, tmp_path / "pickled")
        adapter = tmp_path / "adapter"
        get_peft_model(AutoModelForCausalLM.from_pretrained(pickled), LoraConfig(r=2)).save_pretrained(adapter)
        with pytest.raises(ValueError, match=f"{pickled} has its weights only as a pickle"):
            refuse_pickled_weights(str(adapter))
        assert status("merge", "--adapter", adapter, "--model", model, "--output_dir", tmp_path / "out") == 0

    def test_files_are_those_that_the_arguments_of_from_pretrained_choose(self, model, tmp_path):
        pickled = pickle_weights(model, tmp_path / "pickled")
        shutil.copytree(pickled, model / "inner")
        with pytest.raises(ValueError, match=r"as a pickle \(inner/pytorch_model.bin\)"):
            refuse_pickled_weights(str(model), {"subfolder": "inner"})
        variants = tmp_path / "variants"
        variants.mkdir()
        (variants / "pytorch_model.bin.index.half.json").write_text("{}")  # as transformers spells it
        with pytest.raises(ValueError, match=r"as a pickle \(pytorch_model.bin.index.half.json\)"):
            refuse_pickled_weights(str(variants), {"variant": "half"})
        (variants / "model.safetensors.index.half.json").write_text("{}")
        refuse_pickled_weights(str(variants), {"variant": "half"})

    def test_variant_beside_a_pickle_is_trained(self, model, tmp_path, data):
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").rename(model / "model.half.safetensors")
        words = ("sft", "--model_name_or_path", model, "--model_init_kwargs", '{"variant": "half"}')
        assert status(*words, "--dataset", data, "--output_dir", tmp_path / "out", *TRAINING) == 0

    def test_what_the_hub_s_cache_has(self, model, tmp_path, monkeypatch):
        pickled = pickle_weights(model, tmp_path / "pickled")
        repository = tmp_path / "cache" / "models--o--n"
        (repository / "refs").mkdir(parents=True)
        for revision, folder in (("main", pickled), ("safe", model)):
            (repository / "refs" / revision).write_text(revision * 10)
            shutil.copytree(folder, repository / "snapshots" / (revision * 10))
        shutil.copy(pickled / "pytorch_model.bin", repository / "snapshots" / ("safe" * 10))  # there are both
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True)
        with pytest.raises(ValueError, match="o/n has its weights only as a pickle"):
            load_teacher("o/n", None, torch.float32)

        def gated(*words: str, local_files_only: bool = False, **options: object) -> bool:
            if not local_files_only:
                raise OSError("who are you?")
            return has_file(*words, local_files_only=True, **options)

        with monkeypatch.context() as hub:
            hub.setattr("minillm_trl.models.pickled_weights.has_file", gated)
            with pytest.raises(ValueError, match="o/n has its weights only as a pickle"):
                refuse_pickled_weights("o/n")
        refuse_pickled_weights("o/n", {"revision": "safe"})
        with pytest.raises(ValueError, match="pickle"):
            refuse_pickled_weights("o/n", {"revision": "safe", "use_safetensors": False})
        (repository / "refs" / "adapter").write_text("adapter" * 6)
        adapter = repository / "snapshots" / ("adapter" * 6)
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        (adapter / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(ValueError, match=r"pickle \(adapter_model.bin\)"):
            refuse_pickled_weights("o/n", {"revision": "adapter"})
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
        refuse_pickled_weights("o/n")
        with pytest.raises(ValueError, match="o/n has its weights only as a pickle"):
            refuse_pickled_weights("o/n", {"cache_dir": str(tmp_path / "cache")})

    def test_trainers_in_python_are_no_exception(self, model, tmp_path):
        pickled = str(pickle_weights(model, tmp_path / "pickled"))
        rows = Dataset.from_list([{"prompt": "the mill", "completion": " turns"}] * 4)
        config = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none"}
        for student, teacher in ((pickled, str(model)), (str(model), pickled)):
            with pytest.raises(ValueError, match="set allow_pickled_weights=True"):
                MiniLLMTrainer(student, teacher, args=MiniLLMConfig(**config), train_dataset=rows)
            with pytest.raises(ValueError, match="set allow_pickled_weights=True"):
                KDTrainer(model=student, teacher_model=teacher, args=KDConfig(**config), train_dataset=rows)
        loaded = AutoModelForCausalLM.from_pretrained(pickled)  # the reference is loaded from where it came from
        with pytest.raises(ValueError, match="set allow_pickled_weights=True"):
            MiniLLMTrainer(loaded, str(model), args=MiniLLMConfig(beta=0.1, **config), train_dataset=rows)
        for rewards in (pickled, [len, pickled]):
            with pytest.raises(ValueError, match="set allow_pickled_weights=True"):
                MiniLLMTrainer(str(model), str(model), rewards, args=MiniLLMConfig(**config), train_dataset=rows)

    def test_weights_with_anything_else_are_not_unpickled(self, model, tmp_path, data, capsys):
        (model / "model.safetensors").unlink()
        torch.save({"transformer.wte.weight": Intruder(tmp_path / "marker")}, model / "pytorch_model.bin")
        training = ("--model_name_or_path", model, "--dataset", data, "--output_dir", tmp_path / "out", *TRAINING)
        for words in (generate(model), ("sft", *training)):
            message = refused(capsys, *words, "--allow_pickled_weights")
            assert f"{model / 'pytorch_model.bin'}: the file with the weights (.bin) is a pickle" in message
            assert "It was not unpickled" in message
        assert not (tmp_path / "marker").exists()

    def test_adapters_with_anything_else_are_not_unpickled(self, model, tmp_path, capsys):
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2, "target_modules": ["c_attn"]}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        torch.save({"x": Intruder(tmp_path / "marker")}, adapter / "adapter_model.bin")
        words = ("merge", "--adapter", adapter, "--output_dir", tmp_path / "out", "--allow_pickled_weights")
        message = refused(capsys, *words)
        assert f"{adapter / 'adapter_model.bin'}: the file with the weights (.bin) is a pickle" in message
        assert not (tmp_path / "marker").exists()
        assert not (tmp_path / "out").exists()

    def test_checkpoints_are_not_unpickled_beyond_what_a_trainer_saves(self, model, tmp_path, data, capsys):
        out = tmp_path / "out"
        words = ("sft", "--model_name_or_path", model, "--dataset", data, "--output_dir", out, *TRAINING[:-1], "steps")
        assert status(*words) == 0
        checkpoint = out / "checkpoint-1"
        (checkpoint / "files.json").unlink()  # somebody else's checkpoint comes with no record, or with one that fits
        words = (*words, "--max_steps", 2, "--resume_from_checkpoint", checkpoint)
        torch.save(Intruder(tmp_path / "marker"), checkpoint / "training_args.bin")  # which nothing reads
        for name in ("optimizer.pt", "rng_state.pth"):
            saved = (checkpoint / name).read_bytes()
            torch.save(Intruder(tmp_path / "marker"), checkpoint / name)
            assert f"--resume_from_checkpoint {checkpoint}: a file in it" in refused(capsys, *words)
            (checkpoint / name).write_bytes(saved[: len(saved) // 2])
            assert f"{checkpoint / name}: damaged" in refused(capsys, *words)
            (checkpoint / name).write_bytes(saved)
        assert not (tmp_path / "marker").exists()

    def test_the_intruder_would_have_acted(self, tmp_path):
        torch.save(Intruder(tmp_path / "marker"), tmp_path / "x.pt")
        with zipfile.ZipFile(tmp_path / "x.pt") as file:
            pickle.loads(file.read("x/data.pkl"))
        assert (tmp_path / "marker").exists()

    def test_so_are_the_hub_s_by_what_the_library_does(self, tmp_path):
        path = tmp_path / "pytorch_model.bin"
        torch.save({"x": Intruder(tmp_path / "marker")}, path)
        with (
            pytest.raises(ValueError, match=r"the model 'o/n': .* It was not unpickled"),
            explained("the model 'o/n'"),
        ):
            load_state_dict(path)
        assert not (tmp_path / "marker").exists()


class TestNetwork:
    def test_local_models_and_data_are_used_without_it(self, model, data, tmp_path, monkeypatch):
        tried = []

        def refuse(*address: object, **_: object) -> None:
            tried.append(address)
            raise OSError("no network here")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        training = ("--model_name_or_path", model, "--dataset", data, *TRAINING)
        teacher = ("--teacher_model_name_or_path", model, "--max_completion_length", 4)
        assert status("sft", "--output_dir", tmp_path / "sft", *training, "--use_peft", "true") == 0
        assert status("minillm", "--output_dir", tmp_path / "minillm", *training, *teacher) == 0
        assert status("merge", "--adapter", tmp_path / "sft", "--output_dir", tmp_path / "merged") == 0
        assert status(*generate(tmp_path / "merged")) == 0
        assert tried == []
        with pytest.raises(OSError, match="no network here"):
            socket.create_connection(("huggingface.co", 443))
        assert tried != []

    def test_libraries_are_kept_from_reaching_out_unless_the_environment_says_otherwise(self, monkeypatch):
        monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
        main(["--version"])
        assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"
        monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION")

    def test_nothing_is_reported_or_pushed_by_default(self, tmp_path, data):
        words = ["--dataset", data, "--model_name_or_path", "m", "--teacher_model_name_or_path", "t"]
        words += ["--output_dir", tmp_path, "--use_cpu", "true", "--bf16", "false"]
        instances, _ = parse(build_parser(), [str(word) for word in words])
        values = {name: value for instance in instances for name, value in vars(instance).items()}
        assert (values["report_to"], values["push_to_hub"], values["trust_remote_code"]) == ([], False, False)
        assert values["hub_token"] is None


class TestDamage:
    def test_weights_cut_short_are_named(self, model, capsys):
        path = model / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        assert f"{path}: damaged" in refused(capsys, *generate(model))

    def test_corrupt_adapter_is_named_and_nothing_written(self, model, tmp_path, capsys):
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2, "target_modules": ["c_attn"]}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        (adapter / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
        message = refused(capsys, "merge", "--adapter", adapter, "--output_dir", tmp_path / "out")
        assert f"{adapter / 'adapter_model.safetensors'}: damaged" in message
        assert not (tmp_path / "out").exists()

    def test_weights_that_are_missing_are_not_made_up(self, model, tmp_path, capsys):
        other = tmp_path / "other"
        build_model("gpt2", 300, width=16, layers=2).config.save_pretrained(other)
        shutil.copy(other / "config.json", model / "config.json")
        message = refused(capsys, *generate(model))
        assert f"the model '{model}' lacks 12 of its weights" in message
        assert "transformer.h.1." in message

    def test_tokenizer_of_another_model_is_refused_before_its_tokens_are_looked_up(self, model, capsys):
        build_model("gpt2", 20, width=16, layers=1).save_pretrained(model)
        assert "but the model has 20 embeddings only" in refused(capsys, *generate(model))

    @pytest.mark.parametrize("name", ["sft", "minillm"])
    def test_training_names_a_damaged_model_before_it_begins(self, model, data, tmp_path, capsys, name):
        (model / "model.safetensors").write_bytes(b"\0" * 100)
        words = (name, "--model_name_or_path", model, "--dataset", data, "--output_dir", tmp_path / "out", *TRAINING)
        words += () if name == "sft" else ("--teacher_model_name_or_path", model, "--max_completion_length", 4)
        assert f"{model / 'model.safetensors'}: damaged" in refused(capsys, *words)
        assert not (tmp_path / "out").exists()
