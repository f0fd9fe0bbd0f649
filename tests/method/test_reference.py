"""What `beta` refers to, and the base that a teacher's adapter shares, are what the student was."""

import re

import pytest
import torch
from conftest import build_model, build_tokenizer
from peft import FourierFTConfig, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from test_adapters import train
from transformers import AutoModelForCausalLM

LAYERS = ["c_attn", "c_proj"]


def lora(**options) -> LoraConfig:
    return LoraConfig(r=4, target_modules=LAYERS, **options)


def on_llama(**options) -> LoraConfig:  # PEFT's OLoRA and LoHa do not know GPT-2's layers
    return LoraConfig(r=4, target_modules=["q_proj"], **options)


@pytest.fixture
def teacher():
    return build_model("gpt2", len(build_tokenizer()), 1)


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
class TestAdaptersThatRewriteTheBase:
    def test_beta_is_refused_for_new_adapters_and_for_those_that_a_student_has(
        self, tmp_path, model_dir, teacher, init
    ):
        with pytest.raises(ValueError, match=rf"beta=0\.1: .* peft_config\.init_lora_weights='{init}'"):
            train(tmp_path, model_dir("llama"), teacher, beta=0.1, peft_config=on_llama(init_lora_weights=init))
        student = get_peft_model(load(model_dir("llama")), on_llama(init_lora_weights=init))
        with pytest.raises(ValueError, match=rf"beta=0\.1: .* peft_config\.init_lora_weights='{init}'"):
            train(tmp_path, student, teacher, beta=0.1)

    def test_shared_base_is_refused_whichever_adapter_rewrites_it(self, tmp_path, model_dir, init):
        adapter = str(tmp_path / "teacher")
        get_peft_model(load(model_dir("llama")), on_llama()).save_pretrained(adapter)
        with pytest.raises(ValueError, match=rf"peft_config\.init_lora_weights='{init}'.* teacher_shares_base=False"):
            train(
                *(tmp_path, model_dir("llama"), adapter),
                teacher_shares_base=True,
                peft_config=on_llama(init_lora_weights=init),
            )
        get_peft_model(load(model_dir("llama")), on_llama(init_lora_weights=init)).save_pretrained(adapter)
        with pytest.raises(ValueError, match=rf"teacher_shares_base=True: .* init_lora_weights='{init}'"):
            train(tmp_path, model_dir("llama"), adapter, teacher_shares_base=True, peft_config=on_llama())

    def test_without_either_they_train(self, tmp_path, model_dir, teacher, init):
        train(tmp_path, model_dir("llama"), teacher, peft_config=on_llama(init_lora_weights=init))


def test_base_with_repeated_layers_is_not_shared(tmp_path, model_dir):
    with pytest.raises(ValueError, match=r"peft_config\.layer_replication=\[\[0, 2\], \[1, 2\]\]"):
        train(
            *(tmp_path, model_dir("gpt2"), "teacher"),
            teacher_shares_base=True,
            peft_config=lora(layer_replication=[[0, 2], [1, 2]]),
        )


class TestBeta:
    @pytest.mark.parametrize(
        ("family", "config", "named"),
        [
            ("gpt2", lora(init_lora_weights=False), r"LORA, init_lora_weights=False"),
            ("llama", LoHaConfig(target_modules=["q_proj"], init_weights=False), r"LOHA, init_weights=False"),
            ("gpt2", FourierFTConfig(target_modules=LAYERS, n_frequency=8), r"FOURIERFT, init_weights=False"),
        ],
        ids=["lora", "loha", "fourierft"],
    )
    def test_adapter_that_changes_the_student_at_once_is_refused(
        self, tmp_path, model_dir, teacher, family, config, named
    ):
        with pytest.raises(ValueError, match=rf"from the start \({named}\).* KL is [\d.e-]+ nats"):
            train(tmp_path, model_dir(family), teacher, beta=0.1, peft_config=config)

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_biases_of_the_base_that_train_are_refused(self, tmp_path, model_dir, teacher, bias: str):
        with pytest.raises(ValueError, match=rf"would change the reference.*\.bias is trained.*bias='{bias}'"):
            train(tmp_path, model_dir("gpt2"), teacher, beta=0.1, peft_config=lora(bias=bias))

    def test_other_weights_of_the_base_that_train_are_refused(self, tmp_path, model_dir, teacher):
        student = get_peft_model(load(model_dir("gpt2")), lora())
        student.get_base_model().transformer.ln_f.weight.requires_grad_(True)
        with pytest.raises(ValueError, match=r"would change the reference.*ln_f\.weight is trained"):
            train(tmp_path, student, teacher, beta=0.1)

    @pytest.mark.parametrize(
        "config",
        [
            lora(init_lora_weights="gaussian"),
            lora(init_lora_weights="orthogonal"),
            lora(use_dora=True),
            lora(modules_to_save=["ln_f"]),
            VeraConfig(target_modules=["c_attn"], r=4),
        ],
        ids=["gaussian", "orthogonal", "dora", "modules_to_save", "vera"],
    )
    def test_kl_of_adapters_that_change_nothing_at_first_is_zero_at_first(self, tmp_path, model_dir, teacher, config):
        trainer = train(tmp_path, model_dir("gpt2"), teacher, beta=0.1, peft_config=config)
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert kl[0] == pytest.approx(0.0, abs=1e-5)
        assert kl[-1] > 0

    def test_student_with_a_trained_adapter_refers_to_itself(self, tmp_path, model_dir, teacher):
        torch.manual_seed(3)
        student = get_peft_model(load(model_dir("gpt2")), lora(init_lora_weights=False))
        student.save_pretrained(tmp_path / "adapter")
        student = PeftModel.from_pretrained(load(model_dir("gpt2")), tmp_path / "adapter", is_trainable=True)
        trainer = train(tmp_path, student, teacher, beta=0.1)
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert kl[0] == pytest.approx(0.0, abs=1e-5)
        assert all("ref" not in name for name, each in student.named_parameters() if each.requires_grad)

    def test_whole_student_that_has_changed_since_it_was_loaded_is_refused(self, tmp_path, model_dir, teacher):
        student, reference = load(model_dir("gpt2")), load(model_dir("gpt2"))
        ids = torch.arange(1, 17)[None]
        with torch.no_grad():
            student.transformer.ln_f.weight.mul_(1.2)
            q, p = (model.eval()(ids).logits.double().log_softmax(dim=-1) for model in (student, reference))
        message = r"the student has changed since it was loaded.* KL is ([\d.e-]+) nats"
        with pytest.raises(ValueError, match=message) as refusal:
            train(tmp_path, student, teacher, beta=0.1)
        found = float(re.search(message, str(refusal.value))[1])
        assert found == pytest.approx((q.exp() * (q - p)).sum(dim=-1).mean().item(), rel=0.05)

    @pytest.mark.parametrize("precision", ["float32", "bf16"])
    def test_whole_student_as_loaded_passes(self, tmp_path, model_dir, teacher, precision: str):
        trainer = train(tmp_path, load(model_dir("gpt2")), teacher, beta=0.1, bf16=precision == "bf16")
        assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-5)
