"""The checks of the reference of `beta` and of a shared base on their own: which settings they refuse, and when."""

import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model

from minillm_trl.errors import UserError
from minillm_trl.models.reference import check_adapters, check_reference, check_teacher_adapter, rewriting_init

REWRITING = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]
OTHERS = [True, False, "gaussian", "orthogonal", "eva", None]


def config(init: object = True, layers: list | None = None) -> SimpleNamespace:
    return SimpleNamespace(init_lora_weights=init, layer_replication=layers)


def refusal(*messages: str):
    """Return what expects an error with these parts in their order, or no error without messages."""
    return pytest.raises(UserError, match=".*".join(messages)) if messages else nullcontext()


class TestAdapters:
    @pytest.mark.parametrize("init", [*REWRITING, *OTHERS])
    def test_initialisation_that_rewrites_the_base_is_refused_where_something_uses_the_base(self, init: object):
        rewrites = init in REWRITING
        assert rewriting_init(config(init)) == (init if rewrites else None)
        check_adapters([config(init)], 0.0, False)
        named = f"peft_config.init_lora_weights='{init}'"
        with refusal(*([named, "teacher_shares_base=False"] if rewrites else [])):
            check_adapters([config(init)], 0.0, True)
        with refusal(*(["beta=0.1", named, "beta=0.0"] if rewrites else [])):
            check_adapters([config(init)], 0.1, False)
        with refusal(*(["teacher_shares_base=True", "'it'", f"init_lora_weights='{init}'"] if rewrites else [])):
            check_teacher_adapter(config(init), "it")

    @pytest.mark.parametrize(("beta", "shares"), [(0.0, True), (0.0, False), (0.1, False)])
    def test_repeated_layers_are_refused_for_a_shared_base_alone(self, beta: float, shares: bool):
        named = [r"layer_replication=\[\[0, 2\]\]", "teacher_shares_base=False"] if shares else []
        with refusal(*named):
            check_adapters([config(layers=[[0, 2]])], beta, shares)

    def test_every_adapter_is_checked(self):
        with refusal("beta=0.1", "olora"):
            check_adapters(iter([config(), SimpleNamespace(), config("olora")]), 0.1, False)
        check_adapters([SimpleNamespace()], 0.1, True)  # an adapter of another kind has neither setting


def accelerator(precision: str = "no", **plugins: object) -> SimpleNamespace:
    state = SimpleNamespace(**{"deepspeed_plugin": None, "fsdp_plugin": None, **plugins})
    return SimpleNamespace(state=state, mixed_precision=precision, autocast=nullcontext)


def changed(model: torch.nn.Module, factor: float) -> torch.nn.Module:
    """Return the model with its last norm scaled."""
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(factor)
    return model


def flags(model: torch.nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


class TestReference:
    @pytest.mark.parametrize("training", [True, False])
    def test_equal_model_passes_and_the_student_stays_as_it_was(self, training: bool):
        """Dropout is off in the comparison, and a vocabulary may be smaller than the short input."""
        student, reference = build_model("gpt2", 12).train(training), build_model("gpt2", 12)
        student.transformer.wte.weight.requires_grad_(False)
        before = flags(student)
        check_reference(student, reference, accelerator())
        assert student.training == training
        assert flags(student) == before
        assert all(parameter.grad is None for parameter in student.parameters())

    @pytest.mark.parametrize("kind", ["float32", "bf16", "fp16", "weights"])
    def test_half_precision_has_the_larger_tolerance(self, kind: str):
        student, reference = build_model("gpt2", 40), changed(build_model("gpt2", 40), 1.005)
        with torch.no_grad():
            q, p = (model(torch.arange(1, 17)[None]).logits.log_softmax(-1) for model in (student, reference))
        kl = (q.exp() * (q - p)).sum(-1).mean()
        assert 1e-6 < kl < 1e-2
        if kind == "weights":  # one of them is enough
            student.register_parameter("other", torch.nn.Parameter(torch.zeros(1, dtype=torch.float16)))
        message = re.escape(f"KL is {kl:.2g} nats per token")
        with refusal("has changed since it was loaded", message) if kind == "float32" else nullcontext():
            check_reference(student, reference, accelerator(kind if kind in ("bf16", "fp16") else "no"))
        with refusal("nats per token"):
            check_reference(student, changed(reference, 3.0), accelerator("bf16"))

    def test_kl_that_is_no_number_is_refused(self):
        with refusal("KL is nan"):
            check_reference(build_model("gpt2"), changed(build_model("gpt2"), float("nan")), accelerator())

    @pytest.mark.parametrize(
        ("plugins", "compared"),
        [
            ({}, True),
            ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, True),
            ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, False),
            ({"fsdp_plugin": object()}, False),
        ],
    )
    def test_sharded_reference_is_not_compared(self, plugins: dict, compared: bool):
        with refusal("nats per token") if compared else nullcontext():
            check_reference(build_model("gpt2"), changed(build_model("gpt2"), 2.0), accelerator(**plugins))

    @pytest.mark.parametrize("sharded", [True, False])
    def test_only_sharded_weights_are_gathered(self, monkeypatch: pytest.MonkeyPatch, sharded: bool):
        """DeepSpeed is an optional package."""
        inside: list[int] = []

        class Gathered(nullcontext):
            def __init__(self, parameters: list):
                super().__init__(parameters)

            def __enter__(self) -> None:
                inside.append(len(self.enter_result))

            def __exit__(self, *error: object) -> None:
                inside.pop()

        deepspeed = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered))
        monkeypatch.setitem(sys.modules, "deepspeed", deepspeed if sharded else None)
        student, reference, seen = build_model("gpt2"), build_model("gpt2"), []
        if sharded:
            student.transformer.wte.weight.ds_id = 0
        for model in (student, reference):
            model.register_forward_pre_hook(lambda *_: seen.append(tuple(inside)))
        check_reference(student, reference, accelerator())
        assert seen == ([(1,), (1,)] if sharded else [(), ()])
        assert inside == []

    def adapted(self, **options) -> torch.nn.Module:
        torch.manual_seed(0)
        return get_peft_model(build_model("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], **options))

    @pytest.mark.parametrize("training", [True, False])
    def test_adapter_that_changes_nothing_passes_and_stays_active(self, training: bool):
        student = self.adapted(lora_dropout=0.5).train(training)
        before = flags(student)
        check_reference(student, None, accelerator(fsdp_plugin=object()))
        assert flags(student) == before
        assert student.training == training
        assert student.active_adapter == "default"

    def test_adapter_that_changes_the_student_is_refused_with_its_setting(self):
        with refusal("changes the student from the start", r"\(LORA, init_lora_weights=False\)", "nats per token"):
            check_reference(self.adapted(init_lora_weights=False), None, accelerator())
        with refusal("changes the student from the start"):  # which a sharded student does too
            check_reference(self.adapted(init_lora_weights=False), None, accelerator(fsdp_plugin=object()))

    def test_reference_of_a_trained_adapter_is_its_copy(self):
        student = self.adapted(init_lora_weights=False)
        student.add_adapter("ref", student.peft_config["default"])
        copied = [name for name, _ in student.named_parameters() if ".ref." in name]
        for name in copied:
            student.get_parameter(name).data.copy_(student.get_parameter(name.replace(".ref.", ".default.")))
        before = flags(student)
        check_reference(student, None, accelerator())
        assert flags(student) == before
        changed(student.get_base_model(), 3.0)  # of both, so the copy is equal
        check_reference(student, None, accelerator())
        student.get_parameter(copied[0]).data.mul_(3.0)
        with refusal("changes the student from the start"):
            check_reference(student, None, accelerator())

    @pytest.mark.parametrize("trained", ["transformer.ln_f.weight", "transformer.h.0.mlp.c_fc.bias"])
    def test_trained_weight_of_the_base_is_named(self, trained: str):
        student = self.adapted()
        student.get_base_model().get_parameter(trained).requires_grad_(True)
        with refusal(f"{trained.removeprefix('transformer.')} is trained", r"\(LORA, bias='none'\)"):
            check_reference(student, None, accelerator())

    def test_trained_weights_that_the_reference_does_not_read_are_none_of_its(self):
        """The adapter's own copy of a module stands in for it, and a whole student trains what it likes."""
        check_reference(self.adapted(modules_to_save=["ln_f"]), None, accelerator())
        check_reference(build_model("gpt2"), build_model("gpt2"), accelerator())
