"""The teachers of rollouts on their own: their states, the heads that read them, and one that stands for several."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model

from minillm_trl.models.lm_head import LMHead
from minillm_trl.rollouts.rollout_teacher import RolloutTeacher
from minillm_trl.rollouts.several_teachers import SeveralHeads, SeveralTeachers
from minillm_trl.teacher_server.top_k import TopKHead, largest_log_probs

VOCAB = 40
# left-padded prompts and right-padded completions, whose lengths differ; the last column is padding in all rows
LENGTHS = [(3, 4), (1, 2), (2, 0), (3, 1), (1, 4)]
IDS = torch.randint(5, VOCAB, (5, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0] * (3 - p) + [1] * (p + c) + [0] * (5 - c) for p, c in LENGTHS])
BATCH = {"prompt_ids": IDS[:, :3], "prompt_mask": MASK[:, :3], "completion_ids": IDS[:, 3:]}
BATCH["completion_mask"] = MASK[:, 3:]
CPU, META = torch.device("cpu"), torch.device("meta")


def make_teacher(seed: int = 1, width: int = 48, dtype: torch.dtype = torch.float32, **options) -> RolloutTeacher:
    model = build_model("gpt2", VOCAB, seed, width=width).to(dtype)
    options = {"batch_size": 2, "kept_on": "device", **options}
    return RolloutTeacher(model, LMHead.of(model).frozen(CPU), Accelerator(cpu=True), **options)


@torch.no_grad()
def plain_states(model, row: int) -> torch.Tensor:
    """The states that predict the tokens of a row's completion, from a forward pass over the row without padding."""
    prompt, completion = LENGTHS[row]
    ids = IDS[row, 3 - prompt : 3 + completion]
    return model.base_model(ids[None], use_cache=False).last_hidden_state[0, prompt - 1 : -1][:completion]


class TestRolloutTeacher:
    @pytest.mark.parametrize("batch_size", [1, 2, 16])
    def test_states_are_those_of_a_plain_forward_pass(self, batch_size: int):
        teacher = make_teacher(batch_size=batch_size)
        found = teacher.hidden_states(IDS, MASK, 5)
        assert found.shape == (5, 5, 48)
        assert not found.requires_grad
        for row, (_, length) in enumerate(LENGTHS):
            expected = plain_states(teacher.model, row)
            torch.testing.assert_close(found[row, :length], expected, rtol=1e-4, atol=1e-5)

    def test_no_pass_has_more_rows_than_the_batch_size(self):
        teacher, rows = make_teacher(), []
        teacher.model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        teacher.hidden_states(IDS, MASK, 5)
        assert rows == [2, 2, 1]

    def test_inputs_go_to_the_device_of_the_model(self):
        teacher = make_teacher()
        assert torch.equal(
            replace(teacher, device=CPU).hidden_states(IDS, MASK, 5), teacher.hidden_states(IDS, MASK, 5)
        )
        with pytest.raises(NotImplementedError, match="meta"):  # a device that computes no values
            replace(teacher, device=META).hidden_states(IDS, MASK, 5)

    def test_states_of_a_batch_are_read_from_it_or_recomputed(self):
        teacher = make_teacher()
        kept = torch.randn(5, 5, 48)
        assert torch.equal(teacher.hidden_states_of({**BATCH, "teacher_hidden_states": kept}), kept)
        assert torch.equal(teacher.hidden_states_of(BATCH), teacher.hidden_states(IDS, MASK, 5))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_properties(self, dtype: torch.dtype):
        teacher = make_teacher(dtype=dtype)
        assert (teacher.state_width, teacher.state_dtype, teacher.models) == (48, dtype, [teacher.model])
        assert (teacher.is_sharded, teacher.is_served, teacher.student_top_k) == (False, False, 0)
        assert teacher.hidden_states(IDS, MASK, 5).dtype == dtype
        teacher.raise_failures()

    def test_head_shares_the_weights_on_their_device_alone(self):
        teacher = make_teacher()
        assert teacher.head_on(CPU) is teacher.head
        moved = teacher.head_on(META)
        assert (moved.weight.device, moved.weight.shape) == (META, (VOCAB, 48))

    def test_what_the_buffer_keeps(self):
        states = torch.ones(2, 3)
        for place in ("device", "cpu"):
            teacher = make_teacher(kept_on=place)
            assert torch.equal(teacher.keep(states), states)
            assert teacher.keep(None) is None
        assert make_teacher(kept_on="recompute").keep(states) is None

    def test_mixed_precision_of_the_run_is_that_of_the_teacher(self):
        teacher = make_teacher()
        teacher.accelerator = SimpleNamespace(
            device=CPU, mixed_precision="bf16", autocast=lambda: torch.autocast("cpu", torch.bfloat16)
        )
        found = teacher.hidden_states(IDS, MASK, 5)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = teacher.model.base_model(IDS[:1, :7]).last_hidden_state[0, 2:-1]
        torch.testing.assert_close(found[0, :4].float(), expected.float(), rtol=2e-2, atol=2e-2)
        exact = make_teacher().hidden_states(IDS, MASK, 5)[0, :4]
        assert (found[0, :4].float() - exact).abs().max() > 1e-4


def of_several(*members) -> tuple[SeveralTeachers, list[str]]:
    """Return several teachers, and a list to which each entered phase adds its name."""
    entered: list[str] = []

    class Phase:
        def __init__(self, name: str):
            self.name = name

        def __enter__(self) -> None:
            entered.append(f"+{self.name}")

        def __exit__(self, *error: object) -> None:
            entered.append(f"-{self.name}")

    of_name = dict(zip("abc", members, strict=False))
    return SeveralTeachers(of_name, {name: Phase(name) for name in of_name}), entered


class TestSeveralTeachers:
    NUMBERS = torch.tensor([1, 0, 1, 2, 0])

    def test_each_row_has_the_state_of_its_teacher_with_its_number(self):
        members = [make_teacher(seed, width) for seed, width in ((1, 48), (2, 16), (3, 32))]
        teachers, entered = of_several(*members)
        found = teachers.hidden_states(IDS, MASK, 5, teacher_index=self.NUMBERS)
        assert (found.shape, found.dtype) == ((5, 5, 49), torch.float32)
        assert entered == ["+a", "-a", "+b", "-b", "+c", "-c"]
        for row, number in enumerate(self.NUMBERS.tolist()):
            length, width = LENGTHS[row][1], members[number].state_width
            expected = plain_states(members[number].model, row)
            torch.testing.assert_close(found[row, :length, :width], expected, rtol=1e-4, atol=1e-5)
            assert not found[row, :, width:-1].any()
            assert found[row, :, -1].eq(number).all()
        again = teachers.hidden_states_of({**BATCH, "teacher_index": self.NUMBERS})
        assert torch.equal(again, found)
        assert torch.equal(teachers.hidden_states_of({**BATCH, "teacher_hidden_states": found + 1}), found + 1)

    def test_teacher_without_rows_is_not_called(self):
        teachers, entered = of_several(make_teacher(), make_teacher(2), make_teacher(3))
        found = teachers.hidden_states(IDS, MASK, 5, teacher_index=torch.full((5,), 1))
        assert entered == ["+b", "-b"]
        assert torch.equal(found[..., :-1], teachers.members["b"].hidden_states(IDS, MASK, 5))

    def test_tokens_that_the_student_lists_are_those_of_the_rows(self):
        seen = {}

        def member(name: str) -> SimpleNamespace:
            def hidden_states(ids, mask, length, top_ids):
                seen[name] = (ids, mask, length, top_ids)
                return torch.zeros(len(ids), length, 2)

            return SimpleNamespace(hidden_states=hidden_states, state_width=2, state_dtype=torch.float32)

        teachers, _ = of_several(member("a"), member("b"), member("c"))
        top_ids = torch.arange(5 * 5 * 3).view(5, 5, 3)
        teachers.hidden_states(IDS, MASK, 5, top_ids, self.NUMBERS)
        for name, rows in (("a", [1, 4]), ("b", [0, 2]), ("c", [3])):
            ids, mask, length, own = seen[name]
            assert torch.equal(ids, IDS[rows])
            assert torch.equal(mask, MASK[rows])
            assert torch.equal(own, top_ids[rows])
            assert length == 5
        teachers.hidden_states(IDS, MASK, 5, None, self.NUMBERS)
        assert seen["a"][-1] is None

    def test_states_have_a_dtype_that_holds_those_of_all(self):
        half, single = make_teacher(dtype=torch.bfloat16), make_teacher(2)
        for members in ((half, single), (single, half), (half, half, single)):
            teachers, _ = of_several(*members)
            assert teachers.state_dtype == torch.float32
        both = of_several(half, half)[0]
        assert both.state_dtype == torch.bfloat16
        assert both.hidden_states(IDS, MASK, 5, teacher_index=self.NUMBERS % 2).dtype == torch.bfloat16
        float16 = make_teacher(dtype=torch.float16)
        assert of_several(half, float16)[0].state_dtype == torch.float32  # which neither of them holds
        found = of_several(half, single)[0].hidden_states(IDS, MASK, 5, teacher_index=self.NUMBERS % 2)
        own = half.hidden_states(IDS[[1, 3, 4]], MASK[[1, 3, 4]], 5)
        assert torch.equal(found[[1, 3, 4], :, :-1], own.float())

    def test_properties_are_those_of_the_members_together(self):
        members = [make_teacher(width=16), make_teacher(2, 48), make_teacher(3, 32)]
        teachers, _ = of_several(*members)
        assert teachers.models == [member.model for member in members]
        assert (teachers.model, teachers.is_sharded, teachers.is_served) == (None, False, False)
        assert (teachers.state_width, teachers.student_top_k) == (49, 0)
        members[1] = replace(members[1], is_served=True, student_top_k=7)
        teachers, _ = of_several(*members)
        assert (teachers.is_served, teachers.student_top_k) == (True, 7)
        assert (teachers.head.heads, teachers.head.widths) == ([member.head for member in members], [16, 48, 32])
        moved = teachers.head_on(META)
        assert [head.weight.shape for head in moved.heads] == [(VOCAB, 16), (VOCAB, 48), (VOCAB, 32)]
        assert all(head.weight.is_meta for head in moved.heads)
        assert moved.widths == [16, 48, 32]

    def test_buffer_and_failures_are_those_of_the_members(self):
        called = []
        members = [
            SimpleNamespace(keep=lambda states: states + 1, raise_failures=lambda: called.append(0)),
            SimpleNamespace(keep=None, raise_failures=lambda: called.append(1)),
        ]
        teachers, _ = of_several(*members)
        assert teachers.keep(torch.tensor(2)) == 3
        teachers.raise_failures()
        assert called == [0, 1]


class TestSeveralHeads:
    """Two local heads of different widths, and the top-k of a server, which needs the student's logits."""

    @pytest.fixture
    def heads(self) -> SeveralHeads:
        generator = torch.Generator().manual_seed(0)
        local = [LMHead(torch.randn(VOCAB, width, generator=generator), None) for width in (6, 3)]
        return SeveralHeads([*local, TopKHead(1.0)], [6, 3, 5])

    @pytest.mark.parametrize(
        "numbers", [[0, 1, 2, 1, 0, 2], [1, 1, 1], [2], [2, 0, 0], [0, 1], []], ids=lambda numbers: str(numbers)
    )
    @pytest.mark.parametrize("has_student", [True, False])
    def test_logits_are_those_of_each_tokens_own_head(self, heads, numbers: list[int], has_student: bool):
        generator = torch.Generator().manual_seed(len(numbers))
        states = torch.randn(len(numbers), 7, generator=generator)
        top = largest_log_probs(
            torch.randn(len(numbers), VOCAB, generator=generator), torch.arange(len(numbers)), 1, 1.0
        )
        for token, number in enumerate(numbers):
            states[token, -1] = number
            if number == 2:
                states[token, :5] = top.pack()[token]
        student = torch.randn(len(numbers), VOCAB, generator=generator) if has_student else None
        found = heads.teacher_logits(states, VOCAB - 4, None if student is None else student[:, :-4])
        assert found.shape == (len(numbers), VOCAB - 4)
        for token, number in enumerate(numbers):
            own = None if student is None else student[token : token + 1, :-4]
            width = heads.widths[number]
            expected = heads.heads[number].teacher_logits(states[token : token + 1, :width], VOCAB - 4, own)
            torch.testing.assert_close(found[token], expected[0])
