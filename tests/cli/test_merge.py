"""Merging adapters: the plain model computes what base and adapter do, and its folder is whole or not there."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from test_cli import refused, run_cli
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from minillm_trl.cli import main
from minillm_trl.cli.merge import run
from minillm_trl.models.bitsandbytes_layout import keep_4bit_layout

INPUTS = torch.arange(2, 14).view(2, 6)
ATTENTION = ["q_proj", "v_proj"]


def load(folder: str | Path, **kwargs) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUTS).logits.float()


def save_adapter(base: str, folder: Path, config: PeftConfig | None = None, **kwargs) -> str:
    """An adapter with random weights: those of a new one change nothing."""
    config = config or LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=ATTENTION)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, **kwargs), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def with_adapter(base: str, adapter: str, **kwargs) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **kwargs), adapter)
    keep_4bit_layout(model)
    return logits(model.eval())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def adapter(tmp_path: Path, model_dir) -> str:
    return save_adapter(model_dir("llama"), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # what the tests are about
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # GPT-2's layers of two kinds
class TestValues:
    @pytest.mark.parametrize(
        ("family", "options"),
        [
            ("llama", {"target_modules": ATTENTION}),
            ("llama", {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 3}),
            ("llama", {"target_modules": ATTENTION, "use_dora": True}),
            ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
            ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
            ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
            ("llama", {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]}),
            ("opt", {"target_modules": ATTENTION, "trainable_token_indices": [2, 3]}),
        ],
        ids=lambda value: value if isinstance(value, str) else "-".join(map(str, list(value)[1:])) or "lora",
    )
    def test_merged_model_gives_the_logits_of_the_adapter_on_its_base(self, tmp_path, model_dir, family, options):
        base = model_dir(family)
        adapter = save_adapter(base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", r=4, **options))
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0
        merged, expected = load(tmp_path / "merged"), with_adapter(base, adapter)
        assert (expected - logits(load(base))).abs().max() > 0.1
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
        assert type(merged) is type(load(base))
        assert tensors(tmp_path / "merged").keys() == tensors(Path(base)).keys()

    @pytest.mark.parametrize(
        "options",
        [
            {"modules_to_save": ["lm_head"]},
            {"modules_to_save": ["wte"]},
            {"target_modules": ["c_attn", "wte"]},
            {"target_modules": ["c_attn", "lm_head"]},
            {"target_modules": ["c_attn", "wte"], "use_dora": True},
            {"target_modules": ["c_attn", "wte", "lm_head"]},
        ],
        ids=str,
    )
    def test_tied_embeddings_come_apart_where_the_adapter_changes_one(self, tmp_path, model_dir, options, recwarn):
        base = model_dir("gpt2")
        assert "lm_head.weight" not in tensors(Path(base))
        config = LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["c_attn"], **options})
        adapter = save_adapter(base, tmp_path / "adapter", config)
        recwarn.clear()
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0
        assert not [warning for warning in recwarn if "tie" in str(warning.message)]
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
        expected = with_adapter(base, adapter)
        torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("part", ["modules_to_save", "target_modules"])
    def test_adapter_that_keeps_embeddings_tied_is_merged_once_into_each(self, tmp_path, model_dir, part: str):
        base = model_dir("opt")
        names = {
            "target_modules": ATTENTION,
            part: [*ATTENTION, "embed_tokens"][-1 if part == "modules_to_save" else 0 :],
        }
        config = LoraConfig(task_type="CAUSAL_LM", r=4, ensure_weight_tying=True, **names)
        adapter = save_adapter(base, tmp_path / "adapter", config)
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0
        expected = with_adapter(base, adapter)
        torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-5)

    def test_adapter_of_an_nf4_base_goes_into_the_full_precision_weights(self, tmp_path, model_dir, capsys):
        base = model_dir("llama")
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        adapter = save_adapter(base, tmp_path / "adapter", quantization_config=nf4)
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0
        assert "merged into the full-precision weights" in capsys.readouterr().out
        merged = logits(load(tmp_path / "merged"))
        torch.testing.assert_close(merged, with_adapter(base, adapter), rtol=0, atol=1e-5)
        assert (merged - with_adapter(base, adapter, quantization_config=nf4)).abs().max() > 1e-2
        assert {tensor.dtype for tensor in tensors(tmp_path / "merged").values()} == {torch.float32}
        assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())

    @pytest.mark.parametrize(
        "config",
        [
            IA3Config(task_type="CAUSAL_LM", target_modules=ATTENTION, feedforward_modules=[]),
            VBLoRAConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], vector_length=8, num_vectors=16),
        ],
        ids=lambda config: config.peft_type.value,
    )
    def test_other_methods_of_peft_that_change_weights_are_merged(self, tmp_path, model_dir, config):
        base = model_dir("llama")
        adapter = save_adapter(base, tmp_path / "adapter", config)
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0
        expected = with_adapter(base, adapter)
        torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-5)

    def test_model_names_another_base_than_the_adapter(self, tmp_path, model_dir, adapter):
        other = model_dir("llama", 1)
        assert run(["--adapter", adapter, "--model", other, "--output_dir", str(tmp_path / "merged")]) == 0
        expected = with_adapter(other, adapter)
        torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-5)


class TestSaved:
    @pytest.mark.parametrize(
        ("asked", "saved"), [([], torch.bfloat16), (["--dtype", "float16"], torch.float16)], ids=["auto", "float16"]
    )
    def test_all_weights_have_the_base_s_dtype_or_the_one_asked_for(self, tmp_path, asked, saved):
        base = str(tmp_path / "base")
        build_model("llama").to(torch.bfloat16).save_pretrained(base)
        build_tokenizer().save_pretrained(base)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION, modules_to_save=["lm_head"])
        adapter = save_adapter(base, tmp_path / "adapter", config, dtype=torch.float32)
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged"), *asked]) == 0
        assert {tensor.dtype for tensor in tensors(tmp_path / "merged").values()} == {saved}
        assert load(tmp_path / "merged").dtype == saved

    def test_generation_config_and_tokenizer_are_those_of_the_base_and_unchanged(self, tmp_path):
        base, tokenizer = tmp_path / "base", build_tokenizer()
        tokenizer.padding_side, tokenizer.pad_token, tokenizer.chat_template = "right", None, "{{ messages }}"
        tokenizer.save_pretrained(base)
        build_model("llama").save_pretrained(base)
        GenerationConfig(do_sample=True, temperature=0.3, eos_token_id=[0, 5]).save_pretrained(base)
        adapter = save_adapter(str(base), tmp_path / "adapter")
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0
        saved = GenerationConfig.from_pretrained(tmp_path / "merged")
        assert (saved.temperature, saved.eos_token_id) == (0.3, [0, 5])
        saved = AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert (saved.padding_side, saved.pad_token, saved.chat_template) == ("right", None, "{{ messages }}")
        assert saved.get_vocab() == tokenizer.get_vocab()

    def test_tokenizer_of_the_adapter_comes_before_that_of_the_base(self, tmp_path, adapter):
        build_tokenizer(280).save_pretrained(adapter)
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0
        assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(build_tokenizer(280))
        assert len(build_tokenizer(280)) != len(build_tokenizer())

    def test_tokenizer_of_the_adapter_that_does_not_load_is_not_replaced_by_another(self, tmp_path, adapter, capsys):
        build_tokenizer().save_pretrained(adapter)
        (Path(adapter) / "tokenizer.json").unlink()
        message = refused(capsys, "merge", "--adapter", adapter, "--output_dir", tmp_path / "merged")
        assert f"no tokenizer at '{adapter}'" in message

    @pytest.mark.parametrize("family", ["llama", "gpt2"])  # transformers makes GPT-2's without any files
    def test_without_a_tokenizer_the_weights_are_saved_with_a_warning(self, tmp_path, capsys, family: str):
        base = tmp_path / "base"
        build_model(family).save_pretrained(base)
        adapter = save_adapter(
            str(base), tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
        )
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0
        assert f"saved without a tokenizer, so copy one to {tmp_path / 'merged'}" in capsys.readouterr().err
        expected = with_adapter(str(base), adapter)
        torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-5)
        assert not list((tmp_path / "merged").glob("*token*"))


class TestFolder:
    @pytest.fixture
    def merged(self, tmp_path, adapter) -> Path:
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "out" / "merged")]) == 0
        return tmp_path / "out" / "merged"

    @staticmethod
    def break_save(monkeypatch, error: BaseException, seen: list) -> None:
        def save(model, folder, **kwargs):
            seen.append(sorted(path.name for path in Path(folder).parent.iterdir()))
            model.config.save_pretrained(folder)
            raise error

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
    def test_interrupted_write_leaves_nothing(self, tmp_path, adapter, monkeypatch, error):
        self.break_save(monkeypatch, error, seen := [])
        with pytest.raises(type(error)):
            run(["--adapter", adapter, "--output_dir", str(tmp_path / "out" / "merged")])
        assert seen == [[".merged.partial"]]
        assert list((tmp_path / "out").iterdir()) == []

    def test_interrupted_overwrite_leaves_the_old_model_as_it_was(self, adapter, merged, monkeypatch):
        before = contents(merged)
        self.break_save(monkeypatch, OSError("disk full"), seen := [])
        with pytest.raises(OSError, match="disk full"):
            run(["--adapter", adapter, "--output_dir", str(merged), "--overwrite"])
        assert seen == [[".merged.partial", "merged"]]
        assert contents(merged) == before
        assert list(merged.parent.iterdir()) == [merged]

    def test_old_model_comes_back_where_the_new_one_cannot_take_its_name(self, adapter, merged, monkeypatch):
        before, replace = contents(merged), os.replace

        def fail(source, target):
            if Path(source).name == ".merged.partial":
                raise OSError("not now")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="not now"):
            run(["--adapter", adapter, "--output_dir", str(merged), "--overwrite"])
        assert contents(merged) == before
        assert list(merged.parent.iterdir()) == [merged]

    def test_overwrite_replaces_the_whole_folder(self, adapter, merged):
        (merged / "model-00001-of-00002.safetensors").write_text("of an older model")
        (merged.parent / ".merged.partial").mkdir()  # what a killed run has left
        expected = sorted(path.name for path in merged.iterdir() if "-of-" not in path.name)
        assert run(["--adapter", adapter, "--output_dir", str(merged), "--overwrite", "--dtype", "bfloat16"]) == 0
        assert sorted(path.name for path in merged.iterdir()) == expected
        assert load(merged).dtype == torch.bfloat16
        assert list(merged.parent.iterdir()) == [merged]

    def test_empty_folder_is_used_and_a_link_followed(self, tmp_path, adapter):
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "empty")
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "link")]) == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "empty" / "model.safetensors").is_file()

    def test_folder_that_is_not_empty_is_refused(self, tmp_path, capsys, adapter, merged):
        message = refused(capsys, "merge", "--adapter", adapter, "--output_dir", merged)
        assert f"--output_dir {merged}: this folder is not empty. Name another, or add --overwrite." in message

    def test_overwrite_does_not_delete_what_is_no_model(self, tmp_path, capsys, adapter):
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "thesis.txt").write_text("years")
        message = refused(capsys, "merge", "--adapter", adapter, "--output_dir", tmp_path / "work", "--overwrite")
        assert "this one holds no model" in message
        assert (tmp_path / "work" / "thesis.txt").read_text() == "years"

    def test_file_is_refused(self, tmp_path, capsys, adapter):
        (tmp_path / "file").write_text("")
        assert "this is a file" in refused(capsys, "merge", "--adapter", adapter, "--output_dir", tmp_path / "file")

    @pytest.mark.parametrize("role", ["adapter", "base"])
    @pytest.mark.parametrize("place", [".", "merged", ".."])
    def test_folder_in_or_around_that_of_adapter_or_base_is_refused(self, tmp_path, capsys, role: str, place: str):
        base = str(tmp_path / "of_base" / "base")
        build_model("llama").save_pretrained(base)
        adapter = save_adapter(base, tmp_path / "of_adapter" / "adapter")
        output = Path({"adapter": adapter, "base": base}[role]) / place
        message = refused(capsys, "merge", "--adapter", adapter, "--output_dir", output, "--overwrite")
        assert f"--output_dir {output.resolve()}: this folder and that of the {role}" in message


@pytest.mark.parametrize(("in_4bit", "expected"), [(True, True), (False, False), (None, True)])
def test_caveat_of_qlora_is_for_adapters_that_may_be_such(tmp_path, capsys, adapter, in_4bit: bool | None, expected):
    if in_4bit is not None:  # what the training recorded
        model = {"load_in_4bit": in_4bit, "load_in_8bit": False}
        record = {"attempts": [{"configuration": {"ModelConfig": model, "MiniLLMConfig": {}}}]}
        (Path(adapter) / "run.json").write_text(json.dumps(record))
    assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0
    assert ("QLoRA" in capsys.readouterr().out) == expected


class TestMistakes:
    """Of adapters; `generate` and `evaluate` answer them as `merge` does."""

    @pytest.fixture(params=["merge", "generate", "evaluate"])
    def refuse(self, request, tmp_path, capsys):
        def refuse(adapter: str | Path, model: str | None = None) -> str:
            where = ["--output_dir", tmp_path / "results"]
            if request.param == "merge":
                return refused(capsys, "merge", "--adapter", adapter, *(["--model", model] if model else []), *where)
            names = ["--model", adapter] if model is None else ["--model", model, "--adapter", adapter]
            if request.param == "generate":
                where = ["--prompt", "a"]
            else:
                data = tmp_path / "test.jsonl"
                data.write_text('{"prompt": "a", "references": ["b"]}\n')
                where += ["--dataset", data, "--max_new_tokens", "4"]
            return refused(capsys, request.param, *names, *where)

        return refuse

    def test_folder_without_an_adapter(self, tmp_path, model_dir, refuse):
        (tmp_path / "run").mkdir()
        message = refuse(tmp_path / "run", model_dir("llama"))
        assert f"--adapter {tmp_path / 'run'}: there is no adapter_config.json in this folder" in message
        assert "checkpoint-N" in message

    def test_whole_model_for_an_adapter(self, model_dir, refuse):
        assert "without --adapter" in refuse(model_dir("gpt2"), model_dir("llama"))

    def test_no_such_adapter(self, model_dir, refuse):
        assert "--adapter /nowhere/x: there is no such folder" in refuse("/nowhere/x", model_dir("llama"))
        assert "--adapter nobody/nothing: " in refuse("nobody/nothing", model_dir("llama"))

    def test_broken_configuration(self, model_dir, adapter, refuse):
        (Path(adapter) / "adapter_config.json").write_text('{"r": 4}')
        assert f"--adapter {adapter}: the adapter's configuration cannot be read" in refuse(adapter, model_dir())

    @pytest.mark.parametrize(
        ("base", "reason"),
        [("/moved/base", "there is no such folder"), ("nobody/nothing", "couldn't find them in the cached files")],
    )
    def test_base_that_cannot_be_found(self, adapter, refuse, base: str, reason: str):
        path = Path(adapter) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        message = refuse(adapter)
        assert f"the base '{base}' of the adapter '{adapter}' cannot be loaded" in message
        assert reason in message
        assert f"--model NAME_OR_FOLDER --adapter {adapter}" in message

    def test_adapter_that_names_no_base(self, adapter, refuse):
        path = Path(adapter) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
        assert "its adapter_config.json names no base" in refuse(adapter)

    def test_base_that_is_an_adapter(self, tmp_path, adapter, refuse, model_dir):
        second = save_adapter(model_dir("llama"), tmp_path / "second")
        assert f"the base '{adapter}' of the adapter '{second}' is an adapter itself" in refuse(second, adapter)

    @pytest.mark.parametrize(
        ("family", "width", "problem"),
        [
            ("llama", 48, "size mismatch for "),
            ("gpt2", 32, "Target modules "),
            ("opt", 32, "16 weights are in only one of the two, such as base_model.model.model."),
        ],
    )
    def test_adapter_of_another_model(self, adapter, refuse, model_dir, family: str, width: int, problem: str):
        other = model_dir(family, 0, width)
        message = refuse(adapter, other)
        assert f"the adapter '{adapter}' does not fit '{other}': " in message
        assert problem in message
        assert "Name the model that it was trained on" in message

    @pytest.mark.parametrize(("family", "layers"), [("llama", 1), ("llama", 3)])
    def test_adapter_of_a_model_with_more_or_fewer_layers(self, tmp_path, adapter, refuse, family: str, layers: int):
        build_model(family, layers=layers).save_pretrained(tmp_path / "other")
        build_tokenizer().save_pretrained(tmp_path / "other")
        assert "4 weights are in only one of the two" in refuse(adapter, str(tmp_path / "other"))

    def test_saved_head_that_the_base_calls_otherwise(self, tmp_path, refuse, model_dir):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION, modules_to_save=["norm"])
        adapter = save_adapter(model_dir("llama"), tmp_path / "adapter", config)
        message = refuse(adapter, model_dir("opt"))
        assert "does not fit" in message
        assert "norm.weight' is missing\nName the model" in message

    @pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
    def test_method_that_cannot_be_merged(self, tmp_path, refuse, model_dir, config: type):
        config = config(task_type="CAUSAL_LM", num_virtual_tokens=3)
        adapter = save_adapter(model_dir("llama"), tmp_path / "adapter", config)
        assert f"--adapter {adapter}: {config.peft_type.value} cannot be merged" in refuse(adapter)

    def test_option_that_cannot_be_merged(self, tmp_path, refuse, model_dir):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION, lora_bias=True)
        adapter = save_adapter(model_dir("llama"), tmp_path / "adapter", config)
        message = refuse(adapter)
        assert f"the adapter '{adapter}' cannot be merged into '{model_dir('llama')}': " in message
        assert "lora_bias" in message

    @pytest.mark.parametrize("name", ["lora_B", "lm_head"])
    def test_weights_that_are_not_finite(self, tmp_path, refuse, model_dir, name: str):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION, modules_to_save=["lm_head"])
        adapter = save_adapter(model_dir("llama"), tmp_path / "adapter", config)
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        weights = load_file(path)
        next(value for key, value in weights.items() if name in key)[0, 0] = float("nan")
        save_file(weights, path)
        assert f"the adapter '{adapter}' cannot be merged into" in refuse(adapter)

    def test_base_that_is_stored_quantised(self, tmp_path, capsys, model_dir, adapter):
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(model_dir("llama"), quantization_config=nf4).save_pretrained(
            tmp_path / "nf4"
        )
        message = refused(
            capsys, "merge", "--adapter", adapter, "--model", tmp_path / "nf4", "--output_dir", tmp_path / "merged"
        )
        assert "is stored quantised. Name the full-precision model" in message


class TestRuns:
    @pytest.mark.cli
    def test_merge_in_a_process_of_its_own(self, tmp_path, model_dir, adapter):
        result = run_cli("merge", "--adapter", adapter, "--output_dir", tmp_path / "merged")
        assert result.returncode == 0, result.stderr[-2000:]
        assert f"Merging {adapter} into {model_dir('llama')}." in result.stdout
        assert f"Saved to {tmp_path / 'merged'} in torch.float32" in result.stdout
        expected = with_adapter(model_dir("llama"), adapter)
        torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("with_tokenizer", [False, True])
    def test_generate_is_the_same_for_adapter_alone_on_its_base_and_merged(
        self, tmp_path, capsys, model_dir, adapter, with_tokenizer: bool
    ):
        if with_tokenizer:
            build_tokenizer(280).save_pretrained(adapter)
        assert run(["--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0
        base, completions = model_dir("llama"), []
        for names in ([base], [base, "--adapter", adapter], [adapter], [str(tmp_path / "merged")]):
            capsys.readouterr()
            assert main(["generate", "--model", *names, "--prompt", "the mill", "--max_new_tokens", "20"]) == 0
            completions.append(json.loads(capsys.readouterr().out)["completion"])
        assert completions[0] != completions[1]
        assert completions[1] == completions[2] == completions[3]

    def test_evaluate_takes_an_adapter_alone_as_model_and_as_teacher(self, tmp_path, model_dir, adapter):
        data = tmp_path / "data.jsonl"
        data.write_text('{"prompt": "the mill", "completion": "is cheap"}\n')
        copied = shutil.copytree(adapter, tmp_path / "copy")  # of a model to itself none is measured
        means = []
        for number, model in enumerate((str(copied), model_dir("llama"))):
            output = tmp_path / str(number)
            arguments = ["--dataset", str(data), "--seeds", "1", "--max_new_tokens", "6", "--output_dir", str(output)]
            assert main(["evaluate", "--model", model, "--teacher", adapter, *arguments]) == 0
            means.append(json.loads((output / "results.json").read_text())["summary"]["reverse_kl"]["mean"])
        assert means[0] == pytest.approx(0, abs=1e-5)
        assert means[1] > 0.1
