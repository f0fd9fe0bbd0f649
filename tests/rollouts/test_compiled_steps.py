"""What compiled steps compute and how often they run, without compiling them."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, Cache
from transformers.utils import ModelOutput

import minillm_trl.rollouts.compiled_steps
from minillm_trl.models.lm_head import accepts_position_ids, without_wrapper
from minillm_trl.rollouts.compiled_sampling import check_compiled_decoding
from minillm_trl.rollouts.compiled_steps import (
    CompiledDecoding,
    Reader,
    StaticLayer,
    StepPlan,
    StepTensors,
    static_columns,
)
from minillm_trl.rollouts.sampling import Completions, sample_completions, sample_prompts

PROMPTS = [[5 + i, *range(6, 6 + (3 * i) % 11)] for i in range(7)]


@pytest.fixture(autouse=True)
def _run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "_compile", lambda reader, plan: lambda: bool(reader._run(plan)) or True)


def build_pair(family: str = "llama"):
    return [build_model(family, 50, seed, width=16, layers=1) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"keys": None}),
        ("llama", {"temperature": 0.6, "vocab_size": 20}),
        ("llama", {"alpha": 0.5}),
        ("llama", {"alpha": 1.0}),
        *((family, {"alpha": 0.5, "shared_coins": False, "temperature": 1.5}) for family in ("llama", "gemma2")),
        ("bloom", {"alpha": 0.5, "shared_coins": False}),  # takes no positions
    ],
    ids=str,
)
def test_batches_and_states_are_those_of_the_loop(family: str, options: dict):
    student, teacher = build_pair(family)
    options = {"keys": [(7, row) for row in range(len(PROMPTS))], "coin_key": (9,), "teacher": teacher, **options}
    options |= {"max_new_tokens": 18, "eos_token_ids": [0, 3], "pad_token_id": 1, "batch_size": 4}
    compiled = CompiledDecoding(student, "eager", teacher)
    for keep_states in (False, True, False):
        found: list[dict[int, list[torch.Tensor | None]]] = []
        for steps in (None, compiled):
            rows: dict[int, list[torch.Tensor | None]] = {}

            def keep(numbers: list[int], sampled: Completions, rows: dict = rows) -> None:
                assert (sampled.ids[~sampled.mask] == 1).all()
                for place, row in enumerate(numbers):
                    real = sampled.mask[place]
                    rows[row] = [None if part is None else part[place][real] for part in sampled]

            sample_prompts(student, PROMPTS, **options, keep_states=keep_states, on_batch=keep, compiled=steps)
            found.append(rows)
        loop, own = found
        assert loop.keys() == own.keys()
        for row, parts in loop.items():
            assert own[row][0].tolist() == parts[0].tolist()
            for expected, states in zip(parts[2:], own[row][2:], strict=True):
                assert (states is None) == (expected is None)
                if expected is not None:
                    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def passes_of(model) -> list[int]:
    """Return a list that gets the number of new columns of each pass of the model."""
    widths: list[int] = []
    without_wrapper(model).base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return widths


def test_the_host_looks_every_eighth_step_whether_all_rows_have_finished():
    student, _ = build_pair()
    widths = passes_of(student)
    options = {"max_new_tokens": 64, "eos_token_ids": [*range(50)], "pad_token_id": 1, "keys": None}
    options["keep_states"] = True  # of the prompts alone, which have been read
    completions = sample_prompts(student, PROMPTS, **options, compiled=CompiledDecoding(student, "eager"))
    assert [len(completion) for completion in completions] == [1] * len(PROMPTS)
    assert widths == [16, *[1] * 7]


@pytest.mark.parametrize("keep_states", [False, True])
def test_process_that_has_finished_goes_on_until_the_others_have(keep_states: bool):
    """Here they need ten steps more, so three looks in all, and may need a call that completes the states."""
    student, _ = build_pair()
    widths, asked = passes_of(student), []
    others = iter([False, False])

    def on_every_process(flag: bool) -> bool:
        asked.append(flag)
        return flag and next(others, True)

    sampled = sample_completions(
        student,
        torch.tensor([[5, 6]]),
        torch.ones(1, 2),
        max_new_tokens=64,
        eos_token_ids=[*range(50)],
        pad_token_id=1,
        uniforms=None,
        compiled=CompiledDecoding(student, "eager"),
        on_every_process=on_every_process,
        keep_states=keep_states,
    )
    assert sampled.ids.shape == (1, 1)
    assert asked == [False, True, True, True]
    assert widths == [16, *[1] * (23 + keep_states)]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_steps_are_counted_and_the_first_one_without_compilation_is_said(monkeypatch, caplog, alpha: float):
    is_compiled = [True]
    monkeypatch.setattr(Reader, "_compile", lambda reader, plan: lambda: bool(reader._run(plan)) or is_compiled[0])
    student, teacher = build_pair()
    compiled = CompiledDecoding(student, "eager", teacher)

    def sample() -> None:
        options = {"max_new_tokens": 6, "eos_token_ids": [], "pad_token_id": 1, "keys": [(1,), (2,)]}
        sample_prompts(student, [[5, 6], [7]], **options, teacher=teacher, alpha=alpha, compiled=compiled)

    sample()
    assert compiled.take_counts() == (5, 5)  # without the pass over the prompts
    assert compiled.take_counts() == (0, 0)
    assert "without compilation" not in caplog.text
    is_compiled[0] = False
    sample()
    is_compiled[0] = True
    sample()
    assert compiled.take_counts() == (5, 10)
    is_compiled[0] = False
    sample()
    assert caplog.text.count("A decoding step over 2 rows and 128 columns runs without compilation") == 1


@pytest.mark.parametrize(("length", "columns"), [(108, 128), (109, 256)])
def test_rows_may_fill_all_columns_and_need_no_padding(length: int, columns: int):
    """The teacher's steps are not compiled here, so its attention could leave out the mask."""
    student, teacher = (build_model("llama", 50, seed, width=16, layers=1, positions=256) for seed in (0, 1))
    options = {"keys": [(1,), (2,)], "max_new_tokens": 20, "eos_token_ids": [], "pad_token_id": 1}
    options |= {"teacher": teacher, "alpha": 0.5, "coin_key": (3,)}
    prompts = [list(range(length, 0, -1)), list(range(length))]
    prompts = [[token % 50 for token in prompt] for prompt in prompts]
    compiled = CompiledDecoding(student, "eager")
    expected = sample_prompts(student, prompts, **options)
    assert sample_prompts(student, prompts, **options, compiled=compiled) == expected
    assert list(compiled._shapes) == [(2, columns)]


def test_states_that_nobody_asked_for_take_no_memory():
    student, teacher = build_pair()
    compiled = CompiledDecoding(student, "eager", teacher)
    options = {"keys": [(1,), (2,)], "max_new_tokens": 6, "eos_token_ids": [], "pad_token_id": 1}
    sample_prompts(student, [[5, 6], [7]], **options, teacher=teacher, alpha=0.5, compiled=compiled)
    readers = compiled.start(compiled.models, 2, 20)[1]
    assert [reader.states for reader in readers] == [None, None]


class TestTensors:
    def test_prompts_end_in_the_same_column(self):
        tensors = StepTensors(5, 32, torch.device("cpu"))
        for _ in range(2):  # the second batch finds what the first one left
            first = tensors.start([[5, 6, 7], [8], []], None, None, 0.5)
            assert first == 16  # before which the widest step finds all of its columns
            assert tensors.mask[:, :16].sum(dim=1).tolist() == [3, 1, 1, 3, 3]  # attention needs a token
            assert tensors.mask[:, 16:].all()
            assert tensors.ids[:, :16].sum(dim=1).tolist() == [18, 8, 0, 18, 18]
            assert tensors.ids[0, 13:].tolist() == [5, 6, 7] + [0] * 16
            assert tensors.positions[0, 12:18].tolist() == [0, 0, 1, 2, 3, 4]
            assert tensors.positions[1, 12:18].tolist() == [0, 0, 0, 0, 1, 2]
            assert tensors.unfinished.tolist() == [True, True, False, False, False]
            assert tensors.temperature == 0.5
            assert not tensors.uniforms.any()
            assert not tensors.coins.any()
            tensors.drawn.copy_(torch.tensor([9, 3, 9, 9, 9]))
            tensors.append(StepPlan(1, False, True, True, False, 50, (3,), 1))
            assert tensors.ids[:, 16].tolist() == [9, 3, 1, 1, 1]
            assert tensors.unfinished.tolist() == [True, False, False, False, False]
            tensors.append(StepPlan(1, False, True, True, False, 50, (3, 9), 1))
            assert tensors.ids[:, 17].tolist() == [9, 1, 1, 1, 1]
            assert tensors.lengths.tolist() == [2, 1, 0, 0, 0]
            assert not tensors.unfinished.any()
            assert (tensors.end, tensors.step) == (18, 2)
            tensors.start([[4]] * 5, np.full((5, 16), 0.5), np.full((1, 16), True), 1.0)

    def test_numbers_and_coins_are_those_of_the_rows(self):
        tensors = StepTensors(4, 32, torch.device("cpu"))
        numbers, coins = np.arange(6).reshape(2, 3) / 6, np.array([[True, False, True]])
        tensors.start([[5], [6]], numbers, coins, 1.0)
        assert tensors.uniforms.dtype == torch.float64
        assert tensors.uniforms[:2, :3].tolist() == numbers.tolist()
        assert tensors.uniforms.sum() == numbers.sum()
        assert tensors.coins[:, :3].tolist() == coins.tolist() * 4  # shared
        assert tensors.coins.sum() == 8
        own = np.array([[True, False, False], [False, True, True]])
        tensors.start([[5], [6]], numbers, own, 1.0)
        assert tensors.coins[:2, :3].tolist() == own.tolist()
        assert tensors.coins.sum() == 3

    @pytest.mark.parametrize(("length", "columns"), [(1, 128), (128, 128), (129, 256), (256, 256), (257, 512)])
    def test_columns_are_a_power_of_two(self, length: int, columns: int):
        assert static_columns(length) == columns
        assert math.log2(columns).is_integer()


def test_static_layer_writes_at_the_position_and_returns_all_columns():
    """Keys and values have different widths in some architectures, and their dtype is that of the first states."""
    position = torch.tensor(2)
    layer = StaticLayer(6, position)
    keys, values = torch.rand(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 3, 4, 7, dtype=torch.float64)
    expected = [torch.zeros(2, 3, 6, width, dtype=torch.float64) for width in (5, 7)]
    for start, columns in ((2, slice(0, 3)), (5, slice(3, 4)), (1, slice(1, 3))):
        position.fill_(start)
        found = layer.update(keys[:, :, columns], values[:, :, columns])
        for all_columns, states, own in zip(expected, (keys, values), found, strict=True):
            all_columns[:, :, start : start + columns.stop - columns.start] = states[:, :, columns]
            assert torch.equal(own, all_columns)
        assert layer.get_seq_length() == start
        assert layer.get_mask_sizes(1) == (6, 0)
        assert layer.get_max_length() == 6


class TestCheck:
    @pytest.mark.parametrize("broken", ["positions", "mask", "several columns", "one column"])
    def test_model_whose_steps_differ_is_refused(self, monkeypatch: pytest.MonkeyPatch, broken: str):
        start, update = StepTensors.start, StaticLayer.update

        def wrong_columns(layer: StaticLayer, keys: torch.Tensor, values: torch.Tensor, *arguments: object) -> tuple:
            is_wrong = 1 < keys.shape[2] < 16 if broken == "several columns" else keys.shape[2] == 1
            return update(layer, 2 * keys if is_wrong else keys, values, *arguments)

        def wrong(tensors: StepTensors, *arguments: object) -> int:
            first = start(tensors, *arguments)
            if broken == "positions":
                tensors.positions[:, first:] += 1
            elif broken == "mask":
                tensors.mask[:, :first] = 1
            return first

        check_compiled_decoding(build_model("gpt2"), "student")
        monkeypatch.setattr(StepTensors, "start", wrong)
        if "column" in broken:
            monkeypatch.setattr(StaticLayer, "update", wrong_columns)
        with pytest.raises(ValueError, match=r"steps of the student \(GPT2LMHeadModel\) cannot be compiled"):
            check_compiled_decoding(build_model("gpt2"), "student")

    def test_model_that_takes_no_positions_is_checked(self):
        model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)).eval()
        assert not accepts_position_ids(model)
        check_compiled_decoding(model, "student")

    def test_model_with_adapters_is_checked(self):
        check_compiled_decoding(get_peft_model(build_model("llama"), LoraConfig(r=2)).eval(), "student")

    def test_model_with_fewer_tokens_than_the_prompt_is_checked(self):
        check_compiled_decoding(build_model("gpt2", vocab_size=10, width=32), "student")

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize(
        ("dtype", "largest", "small", "large"),
        [
            (torch.float32, 0.0, 0.9e-3, 1.1e-3),
            (torch.float32, -10.0, 0.9e-2, 1.1e-2),
            (torch.bfloat16, -10.0, 14 / 16, 1.0),  # 12 roundings of 2**-7 are 15/16, relative to 10
        ],
    )
    def test_states_may_differ_by_roundings_of_the_largest_one(
        self, dtype: torch.dtype, largest: float, small: float, large: float, sign: int
    ):
        """Or of 1, if all states are smaller."""
        model, shift = build_model("gpt2").to(dtype), [0.0]
        with torch.no_grad():
            model.transformer.ln_f.weight.fill_(0.05)
            model.transformer.ln_f.bias[0] = largest

        def add_shift(module: torch.nn.Module, arguments: tuple, inputs: dict, outputs: ModelOutput) -> None:
            if any(isinstance(value, Cache) for value in inputs.values()):
                outputs.last_hidden_state.add_(shift[0])

        model.transformer.register_forward_hook(add_shift, with_kwargs=True)
        shift[0] = sign * small
        check_compiled_decoding(model, "student")
        shift[0] = sign * large
        with pytest.raises(ValueError, match="cannot be compiled"):
            check_compiled_decoding(model, "student")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_tolerance_grows_with_the_largest_state(self, dtype: torch.dtype):
        model = build_model("gpt2").to(dtype)
        with torch.no_grad():
            model.transformer.ln_f.weight.mul_(1e4)
            model.transformer.ln_f.weight[0] = 0.0
        check_compiled_decoding(model, "student")


class TestShapes:
    def start(self, compiled: CompiledDecoding, rows: int, length: int = 20) -> tuple[int, int]:
        return compiled.start(compiled.models, rows, length)[0].shape

    def test_batches_of_down_to_half_the_rows_use_the_tensors_of_a_larger_one(self):
        student, _ = build_pair()
        compiled = CompiledDecoding(student, "eager")
        assert self.start(compiled, 8) == (8, 128)
        assert [self.start(compiled, rows) for rows in (7, 4, 8)] == [(8, 128)] * 3
        assert self.start(compiled, 3) == (3, 128)
        assert self.start(compiled, 9) == (9, 128)
        assert self.start(compiled, 5) == (9, 128)  # the largest one that fits
        assert self.start(compiled, 5, 200) == (5, 256)

    def test_tensors_are_freed_after_batches_that_do_not_use_them(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(minillm_trl.rollouts.compiled_steps, "_IDLE_BATCHES", 3)
        student, _ = build_pair()
        compiled = CompiledDecoding(student, "eager")
        first = weakref.ref(compiled.start(compiled.models, 2, 200)[0])
        for _ in range(3):
            assert self.start(compiled, 2) == (2, 128)
            assert first() is not None
        self.start(compiled, 2, 300)
        gc.collect()
        assert first() is None
        assert self.start(compiled, 2, 200) == (2, 256)  # made again
        assert len(compiled.start(compiled.models, 2, 20)[1]) == 1

    def test_steps_of_another_teacher_run_as_they_are(self):
        student, teacher = build_pair()
        other = build_model("llama", 50, 2, width=16, layers=1)
        compiled = CompiledDecoding(student, "eager", teacher)
        own = compiled.start([student, teacher], 2, 20)[1]
        assert [reader._backend for reader in own] == ["eager"] * 2
        mixed = compiled.start([student, other], 2, 20)[1]
        assert [reader._backend for reader in mixed] == ["eager", None]
        assert mixed[0] is own[0]
        assert mixed[1].model is other
