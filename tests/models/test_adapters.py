"""Students that are adapters: the head's own adapters, a teacher on the same base, and what stays in float32."""

import re
import warnings
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import AdaptionPromptConfig, LoraConfig, PeftModel, PromptTuningConfig, XLoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import minillm_trl.training.teacher_mixed_trainer
from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.cli import main
from minillm_trl.errors import UserError
from minillm_trl.models import adapters
from minillm_trl.models.adapters import find_adapter, is_adapter, refuse_adapter
from minillm_trl.models.bitsandbytes_layout import keep_4bit_layout
from minillm_trl.models.fused_head import ScoreRequest, add_scoring
from minillm_trl.models.lm_head import LMHead, check_head
from minillm_trl.models.teacher import adapter_on_base

PROMPTS = [f"the punter {i}\n" for i in range(16)]
LAYERS = ["q_proj", "down_proj"]
IDS = torch.arange(2, 9)[None]


def adapt(model, seed: int = 0, **options) -> PeftModel:
    """A PEFT model whose adapter does something, which a new one does not."""
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, **options))


def train(tmp_path, student, teacher, **options) -> MiniLLMTrainer:
    peft_config, quantization_config = options.pop("peft_config", None), options.pop("quantization_config", None)
    args = MiniLLMConfig(
        str(tmp_path / "out"),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        steps_per_generation=1,
        num_iterations=2,
        max_steps=2,
        max_completion_length=8,
        teacher_mixed_alpha=0.4,
        learning_rate=0.01,
        logging_steps=1,
        **options,
    )
    trainer = MiniLLMTrainer(
        student,
        teacher,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=build_tokenizer(),
        peft_config=peft_config,
        quantization_config=quantization_config,
    )
    trainer.train()
    return trainer


class TestHead:
    @pytest.mark.parametrize(
        ("family", "options"),
        [
            ("llama", {"target_modules": ["lm_head", "q_proj"]}),
            ("llama", {"target_modules": ["lm_head"], "use_rslora": True, "lora_alpha": 5}),
            ("gpt2", {"target_modules": ["lm_head", "c_attn"]}),  # tied to the embeddings, which are not adapted
            ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
            ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
            ("gpt_neox", {"target_modules": ["embed_out", "query_key_value"]}),
            ("gemma2", {"target_modules": ["lm_head", "q_proj"]}),  # its logits are capped
        ],
    )
    def test_adapters_on_the_head_are_scored_and_trained_as_in_the_models_own_forward(self, family, options):
        model = adapt(build_model(family, 40), **options)
        ids = torch.randint(2, 40, (3, 9))
        mask = torch.ones_like(ids)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        log_probs = model(input_ids=ids, attention_mask=mask).logits[:, 3:-1].float().log_softmax(dim=-1)
        expected = log_probs.gather(2, ids[:, 4:, None]).squeeze(2)
        gradients = torch.autograd.grad(expected.square().sum(), parameters)

        add_scoring(model.get_base_model(), 40)
        request = ScoreRequest(ids, mask, mask[:, 4:].bool(), loss=lambda scores, rows: scores.logps.square())
        scores = model(score_requests=[request])[0]
        torch.testing.assert_close(scores.logps, expected.detach(), rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(scores.loss, parameters)
        assert all(gradient.abs().max() > 0 for gradient in found)
        torch.testing.assert_close(found, gradients, rtol=2e-3, atol=1e-5)
        with model.disable_adapter(), torch.no_grad():
            base = model(score_requests=[request])[0].logps
        assert (base - expected).abs().max() > 0.01

    def test_head_of_a_class_of_its_own_is_read(self):
        class Head(torch.nn.Linear):
            """As of models whose code comes with them."""

        config, module = build_model("llama").config, Head(4, 6)
        head = LMHead.of_projection(module, config)
        assert head.weight is module.weight
        assert head.bias is module.bias
        del module.bias
        assert LMHead.of_projection(module, config).bias is None

    def test_copy_of_the_head_is_not_read_while_adapters_are_disabled(self):
        """As the reference model of `beta` has them."""
        model = adapt(build_model("llama", 40), target_modules=["q_proj"], modules_to_save=["lm_head"])
        head = model.get_output_embeddings()
        assert LMHead.of(model).weight is head.modules_to_save["default"].weight
        with model.disable_adapter():
            assert LMHead.of(model).weight is head.original_module.weight

    def test_merged_adapters_are_not_counted_twice(self):
        model = adapt(build_model("llama", 40), target_modules=["lm_head"])
        apart = LMHead.of(model.get_base_model()).weight
        model.merge_adapter()
        torch.testing.assert_close(LMHead.of(model.get_base_model()).weight, apart)

    @pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
    def test_other_adapters_on_the_head_are_refused(self, options: dict):
        model = adapt(build_model("opt"), target_modules=["lm_head", "q_proj"], **options)
        with pytest.raises(ValueError, match=r"adapter 'default' on the LM head .* put it into modules_to_save"):
            check_head(model.get_base_model(), "teacher")

    def test_student_with_an_adapter_on_the_head_is_refused_and_with_a_head_of_its_own_trains_it(
        self, tmp_path, model_dir
    ):
        teacher = build_model("llama", len(build_tokenizer()), 1)
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            train(tmp_path, model_dir("llama"), teacher, peft_config=LoraConfig(target_modules=["lm_head"]))
        own_head = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        trainer = train(tmp_path, model_dir("llama"), teacher, peft_config=own_head)
        head = trainer.model.get_output_embeddings()
        assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
        trainer.save_model(tmp_path / "saved")
        base = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        saved = PeftModel.from_pretrained(base, tmp_path / "saved")
        ids = torch.arange(2, 12)[None]
        torch.testing.assert_close(saved(ids).logits, trainer.model.eval()(ids).logits)

    def test_quantised_head_is_refused(self, model_dir):
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["q_proj"])
        model = AutoModelForCausalLM.from_pretrained(model_dir("llama"), quantization_config=options)
        keep_4bit_layout(model)
        with pytest.raises(ValueError, match=r"LM head is quantised \(Linear4bit\). .* llm_int8_skip_modules"):
            check_head(model, "student")


class TestSharedBase:
    @pytest.fixture
    def teacher_adapter(self, tmp_path, model_dir) -> str:
        base = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        adapt(base, seed=5, target_modules=[*LAYERS, "lm_head"]).save_pretrained(tmp_path / "teacher")
        return str(tmp_path / "teacher")

    def quantization(self, bits: int) -> dict:
        if bits == 32:
            return {}
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        return {"quantization_config": BitsAndBytesConfig(**options, llm_int8_skip_modules=["lm_head"])}

    @pytest.mark.parametrize("bits", [32, 4])
    def test_training_is_that_with_a_teacher_of_its_own_and_the_base_is_there_once(
        self, tmp_path, model_dir, teacher_adapter: str, bits: int
    ):
        student = {"peft_config": LoraConfig(r=2, target_modules=LAYERS), **self.quantization(bits)}
        shared = train(tmp_path, model_dir("llama"), teacher_adapter, teacher_shares_base=True, **student)
        base = AutoModelForCausalLM.from_pretrained(model_dir("llama"), **self.quantization(bits))
        apart = train(
            tmp_path, model_dir("llama"), PeftModel.from_pretrained(base, teacher_adapter).get_base_model(), **student
        )
        for one, other in zip(shared.state.log_history, apart.state.log_history, strict=True):
            for name in {"loss", "grad_norm", "objective/reverse_kl"} & set(one):
                assert one[name] == pytest.approx(other[name], rel=1e-4)
        trained, expected = (dict(trainer.model.named_parameters()) for trainer in (shared, apart))
        for name in trained:
            torch.testing.assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)
            assert trained[name].requires_grad == expected[name].requires_grad == ("lora_" in name)

        tensors = {parameter.data_ptr() for parameter in shared.model.parameters()}
        teacher = dict(shared.teacher_model.named_parameters())
        own = [name for name, parameter in teacher.items() if parameter.data_ptr() not in tensors]
        assert len(own) == 2 * (2 * len(LAYERS) + 1)
        assert all("lora_" in name and ".teacher." in name for name in own)
        assert not any(parameter.requires_grad for parameter in shared.teacher_model.parameters())

    def test_base_without_a_name_is_taken_for_that_of_the_adapter(self, model_dir, teacher_adapter: str):
        """A model that was built in this process."""
        base = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        base.config._name_or_path = ""
        teacher, ids = adapter_on_base(adapt(base, target_modules=LAYERS), teacher_adapter), torch.arange(2, 9)[None]
        plain = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        torch.testing.assert_close(teacher(ids).logits, PeftModel.from_pretrained(plain, teacher_adapter)(ids).logits)

    def test_what_cannot_share_is_refused(self, tmp_path, model_dir, teacher_adapter: str):
        with pytest.raises(ValueError, match="needs a student with an adapter"):
            train(tmp_path, model_dir("llama"), teacher_adapter, teacher_shares_base=True)
        other = adapt(AutoModelForCausalLM.from_pretrained(model_dir("llama", seed=3)), target_modules=LAYERS)
        names = [re.escape(repr(model_dir("llama", **options))) for options in ({}, {"seed": 3})]
        with pytest.raises(ValueError, match=f"was made for {names[0]}, but the student's base is {names[1]}"):
            adapter_on_base(other, teacher_adapter)
        base = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        with pytest.raises(ValueError, match="needs the name or folder of the teacher's adapter"):
            adapter_on_base(adapt(base, target_modules=LAYERS), other)

    @pytest.mark.parametrize(
        "trained", ["layers.0.mlp.down_proj.base_layer.weight", "layers.0.input_layernorm.weight"]
    )
    def test_base_that_is_trained_is_refused(self, model_dir, teacher_adapter: str, trained: str):
        student = adapt(AutoModelForCausalLM.from_pretrained(model_dir("llama")), target_modules=LAYERS)
        student.get_parameter(f"base_model.model.model.{trained}").requires_grad_(True)
        with pytest.raises(ValueError, match=f"needs a frozen base, but the student trains .*{re.escape(trained)}"):
            adapter_on_base(student, teacher_adapter)


class TestFinding:
    """Which folders are adapters, and which base they have."""

    def test_adapter_is_what_has_no_model_beside_it(self, tmp_path, model_dir):
        LoraConfig(base_model_name_or_path="base").save_pretrained(tmp_path)
        assert is_adapter(str(tmp_path))
        with pytest.raises(UserError, match=f"--student {tmp_path} is an adapter"):
            refuse_adapter("--student", str(tmp_path))
        (tmp_path / "config.json").write_text("{}")
        for whole in (str(tmp_path), model_dir("gpt2"), str(tmp_path / "nowhere"), "nobody/nothing"):
            assert not is_adapter(whole)
            refuse_adapter("--student", whole)

    @pytest.mark.parametrize(
        ("config", "kind"),
        [
            (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
            (AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1), "ADAPTION_PROMPT"),
            (XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={}), "XLORA"),
            (LoraConfig(task_type="CAUSAL_LM", layer_replication=[(0, 2), (1, 2)]), "LoRA with layer_replication"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_kinds_that_change_no_weights_are_refused(self, tmp_path, model_dir, config, kind: str):
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=f"--adapter {tmp_path}: {kind} cannot be merged"):
            find_adapter(str(tmp_path), model_dir("llama"))

    @pytest.mark.parametrize("base", [None, "", ["a", "b"]])
    def test_base_without_a_name_is_refused(self, tmp_path, base):
        LoraConfig(base_model_name_or_path=base).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"its adapter_config\.json names no base"):
            find_adapter(str(tmp_path))

    @pytest.mark.parametrize("revision", [None, "other"])
    def test_base_of_a_revision_is_loaded_in_that_revision(self, tmp_path, monkeypatch, revision: str | None):
        repository = tmp_path / "models--o--n"
        (repository / "refs").mkdir(parents=True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        for number, name in enumerate(("main", "other")):
            (repository / "refs" / name).write_text(40 * str(number))
            base = build_model("llama", seed=number)
            base.config.bos_token_id = number
            base.save_pretrained(repository / "snapshots" / (40 * str(number)))
        base = build_model("llama", seed=0 if revision is None else 1)
        base.name_or_path = "o/n"
        model = adapt(base, target_modules=LAYERS, revision=revision)
        model.save_pretrained(tmp_path / "adapter")
        found = find_adapter(str(tmp_path / "adapter"))
        assert (found.name, found.base, found.revision) == (str(tmp_path / "adapter"), "o/n", revision)
        assert found.tokenizer_source() == ("o/n", revision)
        assert found.base_config.bos_token_id == (0 if revision is None else 1)
        torch.testing.assert_close(found.load_merged()(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
        assert find_adapter(str(tmp_path / "adapter"), "o/n").revision is None  # of another name none is known

    def test_adapter_that_cannot_be_read_is_not_said_to_misfit(self, tmp_path, model_dir, monkeypatch):
        adapt(AutoModelForCausalLM.from_pretrained(model_dir("llama"))).save_pretrained(tmp_path)

        def fail(*unused, **options):
            raise OSError("the disk is gone")

        monkeypatch.setattr(PeftModel, "from_pretrained", fail)
        with pytest.raises(UserError, match=rf"^the adapter '{tmp_path}' cannot be loaded: the disk is gone"):
            find_adapter(str(tmp_path)).load_merged()

    def test_code_and_pickles_that_come_with_it_are_run_on_request_alone(self, tmp_path, model_dir, monkeypatch):
        adapt(AutoModelForCausalLM.from_pretrained(model_dir("llama"))).save_pretrained(tmp_path)
        read, load, seen = AutoConfig.from_pretrained, adapters.load_causal_lm, []

        def read_config(name, **options):
            seen.append(options["trust_remote_code"])
            return read(name, **options)

        def load_base(name, what, allow_pickled_weights, **options):
            seen.append((options["trust_remote_code"], allow_pickled_weights))
            return load(name, what, allow_pickled_weights, **options)

        monkeypatch.setattr(adapters, "AutoConfig", SimpleNamespace(from_pretrained=read_config))
        monkeypatch.setattr(adapters, "load_causal_lm", load_base)
        find_adapter(str(tmp_path)).load_merged()
        find_adapter(str(tmp_path), trust_remote_code=True).load_merged("auto", True, True)
        assert seen == [False, (False, False), True, (True, True)]

    def test_merging_leaves_the_filters_of_warnings(self, tmp_path, model_dir):
        adapter = adapt(AutoModelForCausalLM.from_pretrained(model_dir("llama")), target_modules=LAYERS)
        adapter.save_pretrained(tmp_path)
        before = list(warnings.filters)
        merged = find_adapter(str(tmp_path)).load_merged(torch.bfloat16)
        assert warnings.filters == before
        assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}


def test_adapter_that_is_named_as_a_student_is_to_be_merged_first(tmp_path, model_dir, capsys):
    adapter, data = str(tmp_path / "adapter"), tmp_path / "rows.jsonl"
    adapt(AutoModelForCausalLM.from_pretrained(model_dir("gpt2"))).save_pretrained(adapter)
    data.write_text('{"prompt": "the mill", "completion": "is cheap"}\n')
    options = ("--dataset", str(data), "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path / "out"))
    assert main(["sft", "--model_name_or_path", adapter, *options]) == 2
    assert f"Merge it first (minillm-trl merge --adapter {adapter} --output_dir FOLDER)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_of_a_quantised_student_are_trained_in_float32(tmp_path, model_dir, monkeypatch):
    checked = []  # in float16 trained weights in half precision are refused

    def check(trainer, **options):
        checked.extend(weight.dtype for weight in trainer.model.parameters() if weight.requires_grad)

    monkeypatch.setattr(minillm_trl.training.teacher_mixed_trainer, "check_model", check)
    trainer = train(
        tmp_path,
        model_dir("llama"),
        build_model("llama", len(build_tokenizer()), 1),
        peft_config=LoraConfig(r=2, target_modules=LAYERS),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert len(trained) == 8
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    assert checked == [torch.float32] * 8
