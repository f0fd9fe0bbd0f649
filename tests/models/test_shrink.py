"""Shrunken models: they compute what the large model computes with layers and channels skipped, and nothing else."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, build_model, build_tokenizer
from safetensors.torch import load_file, save_file
from test_cli import refused
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from minillm_trl.cli import main
from minillm_trl.cli.doctor import run as doctor
from minillm_trl.cli.stages import read_recipe
from minillm_trl.errors import UserError
from minillm_trl.evaluation.divergence import completion_losses
from minillm_trl.models.encoding import encode_pair
from minillm_trl.models.layer_importance import block_influence, channel_importance
from minillm_trl.models.layers import decoder_layers, feed_forward_layers, intermediate_size, skipping
from minillm_trl.models.shrink import Sizes, evenly_spaced, most_influential, shrink

LAYERS = 6
IDS = torch.arange(2, 26).view(2, 12)
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[1, 7:] = 0
ROWS = [{"prompt": f"the punter {i}\n", "completion": "near the river " * (i + 1)} for i in range(5)]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def kept_channels(model: torch.nn.Module, number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = intermediate_size(model.config)
    return [torch.randperm(size, generator=generator)[:number].sort().values for _ in range(LAYERS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_result_computes_what_the_model_does_with_the_rest_skipped(family: str):
    model = build_model(family, layers=LAYERS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for layers in ([0, 2, 3, 5], [1, 2, 4]):  # the second one shifts the Gemmas' windows against their positions
        channels = kept_channels(model, 20)
        with skipping(model, layers):
            fewer = logits(model)
        with skipping(model, layers, channels):
            fewer_and_narrower = logits(model)
        torch.testing.assert_close(logits(shrink(model, layers)), fewer)
        small = shrink(model, layers, channels)
        torch.testing.assert_close(logits(small), fewer_and_narrower)
        assert (small.config.num_hidden_layers, intermediate_size(small.config)) == (len(layers), 20)
        assert not torch.allclose(fewer, logits(model), atol=1e-3)
        assert not torch.allclose(fewer, fewer_and_narrower, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_are_copies_and_ties_are_kept():
    model = build_model("qwen2", layers=LAYERS)
    small = shrink(model, [0, 5])
    with torch.no_grad():
        small.get_input_embeddings().weight.zero_()
    assert small.get_output_embeddings().weight.abs().max() == 0
    assert model.get_input_embeddings().weight.abs().max() > 0


def test_half_precision_and_attention_stay():
    model = build_model("llama", layers=LAYERS).to(torch.bfloat16)
    model.set_attn_implementation("eager")
    small = shrink(model, [0, 1, 5])
    assert small.dtype == torch.bfloat16
    assert {weight.dtype for weight in small.state_dict().values()} == {torch.bfloat16}
    assert small.config._attn_implementation == "eager"


def test_configurations_are_copies_and_lists_keep_what_belongs_to_no_layer():
    model = build_model("gemma3", layers=LAYERS)
    model.config.eos_token_id = list(range(LAYERS))
    model.config.layer_scales, model.config.layer_names = list(range(LAYERS)), ["a", "b"]
    kinds = list(model.config.layer_types)
    small = shrink(model, [0, 1, 5])
    assert small.config.eos_token_id == list(range(LAYERS))
    assert (small.config.layer_scales, small.config.layer_names) == ([0, 1, 5], ["a", "b"])
    assert small.config.layer_types == [kinds[0], kinds[1], kinds[5]]
    assert model.config.layer_types == kinds
    small.generation_config.max_length = 77
    assert model.generation_config.max_length != 77
    assert small.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert not small.training


def test_model_in_training_mode_is_shrunk_without_its_dropout():
    model = build_model("gpt2", layers=LAYERS)
    assert model.config.attn_pdrop > 0
    expected = logits(shrink(model, [0, 5]))
    assert torch.equal(logits(shrink(model.train(), [0, 5])), expected)
    assert model.training


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_influence_is_one_minus_the_mean_cosine_of_what_goes_in_and_out(family: str):
    model = build_model(family, layers=LAYERS)
    found = block_influence(model, [(IDS, MASK), (IDS[:1], MASK[:1])])
    assert not found.requires_grad
    states = {}
    for index, layer in enumerate(decoder_layers(model)[1]):
        layer.register_forward_hook(
            lambda _, arguments, keywords, output, index=index: states.setdefault(index, []).append(
                (
                    arguments[0] if arguments else keywords["hidden_states"],
                    output[0] if isinstance(output, tuple) else output,
                )
            ),
            with_kwargs=True,
        )
    rows = [(IDS[:1], 12), (IDS[1:], 7), (IDS[:1], 12)]
    with torch.no_grad():
        for ids, length in rows:
            model(ids[:, :length])
    for index in range(LAYERS):
        cosines = [
            float(a @ b / (a.norm() * b.norm()))
            for before, after in states[index]
            for a, b in zip(before[0].double(), after[0].double(), strict=True)
        ]
        assert math.isclose(float(found[index]), 1 - sum(cosines) / len(cosines), rel_tol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_importance_is_the_mean_size_of_a_channel_over_real_tokens(family: str):
    model = build_model(family, layers=LAYERS)
    found = channel_importance(model, [(IDS, MASK), (IDS[:1], MASK[:1])])
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(LAYERS)}
    for index, layer in enumerate(feed_forward_layers(model)):
        model.get_submodule(layer.down).register_forward_pre_hook(
            lambda _, arguments, index=index: seen[index].append(arguments[0].reshape(-1, arguments[0].shape[-1]))
        )
    with torch.no_grad():
        for ids, length in ((IDS[:1], 12), (IDS[1:], 7), (IDS[:1], 12)):
            model(ids[:, :length])
    for index in range(LAYERS):
        expected = torch.cat(seen[index]).abs().double().mean(dim=0)
        torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-6)


def test_layers_are_chosen_by_spacing_or_influence():
    assert evenly_spaced(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert evenly_spaced(4, 2) == [0, 3]
    assert evenly_spaced(5, 5) == [0, 1, 2, 3, 4]
    assert most_influential(torch.tensor([0.1, 0.5, 0.2, 0.5, 0.3]), 3) == [1, 3, 4]
    assert most_influential(torch.full((200,), 0.5), 3) == [0, 1, 2]
    assert most_influential(torch.tensor([0.2, 0.1]), 2) == [0, 1]
    for wrong in (1, 6):
        with pytest.raises(UserError, match=f"num_layers={wrong}: a model of 5 layers can keep 2 to 5 of them"):
            evenly_spaced(5, wrong)
        with pytest.raises(UserError, match=f"num_layers={wrong}"):
            most_influential(torch.zeros(5), wrong)


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [-1, 2], [0, LAYERS]], ids=str)
def test_layers_that_are_not_ascending_numbers_of_layers_are_refused(layers: list[int]):
    with pytest.raises(UserError, match=re.escape(f"layers={layers} must be ascending numbers between 0 and 5")):
        shrink(build_model("llama", layers=LAYERS), layers)


@pytest.mark.parametrize("layers", [[0], [LAYERS - 1], list(range(LAYERS))], ids=str)
def test_a_single_layer_or_all_of_them_are_kept(layers: list[int]):
    model = build_model("llama", layers=LAYERS)
    with skipping(model, layers):
        expected = logits(model)
    torch.testing.assert_close(logits(shrink(model, layers)), expected)


def test_sizes_count_tied_weights_once_and_an_embedding_not_at_all_for_a_step():
    tied, untied = build_model("qwen2"), build_model("llama")
    assert Sizes.of(tied).total == Sizes.of(tied).per_token
    assert Sizes.of(untied).total - Sizes.of(untied).per_token == untied.get_input_embeddings().weight.numel()
    assert Sizes.of(tied).total == sum(weight.numel() for weight in tied.parameters())
    headless = Sizes.of(tied.model)
    assert headless.total - headless.per_token == tied.get_input_embeddings().weight.numel()


def test_layers_that_depend_on_their_number_are_refused():
    model = build_model("llama", layers=LAYERS)
    for index, layer in enumerate(decoder_layers(model)[1]):
        layer.self_attn.window = 4 * index  # the new model's layers have none or, here, none to compare
        layer.self_attn.scaling = layer.self_attn.scaling * (1 + index % 2)
    with pytest.raises(UserError, match="scaling"):
        shrink(model, [0, 1, 3])


def test_scale_of_a_layers_number_is_refused():
    config = GPT2Config(n_embd=16, n_head=2, n_layer=LAYERS, vocab_size=60, scale_attn_by_inverse_layer_idx=True)
    model = GPT2LMHeadModel(config).eval()
    assert shrink(model, [0, 1, 2]).config.n_layer == 3
    with pytest.raises(UserError, match=r"attn.scaling is 0.05\d+ in layer 5, but 0.17\d+ where it becomes layer 1"):
        shrink(model, [0, 5])


@pytest.mark.parametrize("factor", [1.0, 1.0003, 1.1])
def test_result_that_computes_something_else_is_refused(factor: float):
    """Of a layer; what rounding could be is not."""
    model = build_model("llama", layers=LAYERS)
    model.model.layers[5].mlp.register_forward_hook(lambda module, given, output: factor * output)
    if factor < 1.001:
        shrink(model, [0, 5])
    else:
        with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be shrunk: its logits differ by up to \d"):
            shrink(model, [0, 5])


def test_weights_that_no_model_of_its_class_has_are_refused():
    model = build_model("llama", layers=LAYERS)
    model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"(?s)LlamaForCausalLM cannot be shrunk: .*model.extra"):
        shrink(model, [0, 1])


def test_multimodal_models_are_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with pytest.raises(UserError, match=r"A multimodal model \(gemma3\) cannot be shrunk"):
        shrink(Gemma3ForConditionalGeneration(config), [0])


def test_mixtures_of_experts_lose_layers_but_not_channels():
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=60,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with skipping(model, [0, 3]):
        expected = logits(model)
    torch.testing.assert_close(logits(shrink(model, [0, 3])), expected)
    with pytest.raises(UserError, match="intermediate_size"):
        channel_importance(model, [(IDS, MASK)])


# The command


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("teacher"), build_tokenizer()
    model = build_model("llama", len(tokenizer), layers=LAYERS)
    model.generation_config = GenerationConfig(eos_token_id=[0, 5], temperature=0.7, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_command_writes_a_model_with_all_that_belongs_to_it(teacher: Path, data: Path, tmp_path: Path, capsys):
    words = ["shrink", "--model", str(teacher), "--num_layers", "3", "--by", "influence", "--intermediate_size", "16"]
    output = tmp_path / "student"
    assert main([*words, "--dataset", str(data), "--output_dir", str(output)]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    large = AutoModelForCausalLM.from_pretrained(teacher)
    assert model.generation_config.eos_token_id == [0, 5]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(teacher).chat_template
    record = json.loads((output / "shrink.json").read_text())
    assert record["parameters"] == [Sizes.of(each).total for each in (large, model)]
    pairs = [encode_pair(tokenizer, row["prompt"], row["completion"]) for row in ROWS]
    losses = completion_losses(model.eval(), *zip(*pairs, strict=True))
    assert record["loss"][1] == pytest.approx(sum(map(sum, losses)) / sum(map(len, losses)), rel=1e-4)
    assert f"{record['loss'][1]:.3f}" in capsys.readouterr().out
    influence = block_influence(
        large.eval(), [(torch.tensor([[*p, *c]]), torch.ones(1, len(p) + len(c))) for p, c in pairs]
    )
    assert record["layers"] == most_influential(influence, 3)


def test_command_leaves_its_own_result_and_refuses_another(teacher: Path, tmp_path: Path, capsys):
    words = ["shrink", "--model", str(teacher), "--output_dir", str(tmp_path / "student"), "--layers"]
    assert main([*words, "0", "2", "5"]) == 0
    written = (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns
    assert main([*words, "0", "2", "5"]) == 0
    assert (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns == written
    capsys.readouterr()
    assert main([*words, "0", "5"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "0", "5", "--overwrite"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "student").num_hidden_layers == 2


def test_student_of_changed_files_is_not_taken_for_this_one(teacher: Path, data: Path, tmp_path: Path, capsys):
    model, output = tmp_path / "model", tmp_path / "student"
    shutil.copytree(teacher, model)
    words = ["shrink", "--model", str(model), "--layers", "0", "5", "--dataset", str(data)]
    words += ["--output_dir", str(output)]
    assert main(words) == 0
    copied = tmp_path / "copied.safetensors"
    shutil.copy(model / "model.safetensors", copied)
    weights = load_file(copied)
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert f"--model {model}" in refused(capsys, *words)
    shutil.copy(copied, model / "model.safetensors")
    assert main(words) == 0
    rows = data.read_text()
    data.write_text("\n".join(map(json.dumps, [*ROWS[:-1], {**ROWS[-1], "completion": " other"}])))
    message = refused(capsys, *words)
    assert f"--dataset {data}" in message
    assert "--model" not in message
    assert "--overwrite" in message
    data.write_text(rows)
    record = json.loads((output / "shrink.json").read_text())
    del record["settings"]["model_files"]
    (output / "shrink.json").write_text(json.dumps(record))
    assert "does not record it" in refused(capsys, *words)
    assert main([*words, "--overwrite"]) == 0
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--num_layers"),
        (["--num_layers", "7"], "has 6 layers"),
        (["--num_layers", "1"], "has 6 layers"),
        (["--layers", "0", "6"], "layers 0 to 5"),
        (["--layers", "3", "1"], "ascending"),
        (["--num_layers", "3", "--by", "influence"], "--dataset"),
        (["--intermediate_size", "8"], "--dataset"),
        (["--intermediate_size", "65", "--dataset", "DATA"], "64 channels"),
        (["--num_layers", "0"], "positive"),
        (["--num_layers", "3", "--num_processes", "2"], "single process"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(
    teacher, data, tmp_path, words, expected, monkeypatch, capsys
):
    monkeypatch.setattr("minillm_trl.models.loading.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    words = [str(data) if word == "DATA" else word for word in words]
    message = refused(capsys, "shrink", "--model", teacher, "--output_dir", tmp_path / "student", *words)
    assert expected in message


@pytest.mark.cli
def test_recipes_shrink_and_doctor_says_that_the_student_is_not_healed(teacher: Path, tmp_path: Path, capsys):
    student = tmp_path / "student"
    (tmp_path / "shrink.yaml").write_text(f"model: {teacher}\noutput_dir: {student}\nlayers: [0, 3, 5]\n")
    (tmp_path / "evaluate.yaml").write_text("tasks: [e2e]\n")
    (tmp_path / "recipe.yaml").write_text(
        "stages:\n  start: shrink shrink.yaml\n"
        f"evaluate:\n  config: evaluate.yaml\n  models: [start]\n  output_dir: {tmp_path / 'report'}\n"
    )
    assert [stage.subcommand for stage in read_recipe(tmp_path).stages] == ["shrink", "evaluate"]
    assert main(["recipe", str(tmp_path), "--stages", "start"]) == 0
    assert AutoConfig.from_pretrained(student).num_hidden_layers == 3
    run = tmp_path / "minillm.yaml"
    run.write_text(
        f"model_name_or_path: {student}\nteacher_model_name_or_path: {teacher}\ndataset: e2e\n"
        f"output_dir: {tmp_path / 'run'}\nuse_cpu: true\nmax_completion_length: 8\n"
    )
    capsys.readouterr()
    doctor(["--config", str(run)])
    assert "Train it on the teacher's answers first" in capsys.readouterr().out
