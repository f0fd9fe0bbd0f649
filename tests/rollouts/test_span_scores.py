"""Scores of spans of text, without a trainer, against plain forward passes; which rows and prompts are refused."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import build_model
from test_spans import FIRST, SECOND, ids_of, trained
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from minillm_trl.errors import UserError
from minillm_trl.models.lm_head import LMHead
from minillm_trl.rollouts.buffer import Batch
from minillm_trl.rollouts.cross_tokenizer import CrossTokenizerScorer, TwoTokenizers, check_two_tokenizers
from minillm_trl.rollouts.rollout_teacher import RolloutTeacher
from minillm_trl.rollouts.sampling import left_pad
from minillm_trl.rollouts.scores import RolloutScorer

EOS, PAD, KD_TEMPERATURE = FIRST.eos_token_id, 3, 1.4
PROMPTS = ["hello world", "it's", "a lower word. 12", "東京 hello"]
CUT = ids_of(FIRST, "hello é")[:-1]  # the limit has cut the last character
COMPLETIONS = [[*ids_of(FIRST, " low helmets é"), EOS], CUT, [EOS], ids_of(FIRST, "swore; hold on")]
CHAT = "{{ extra }}{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"


def build_scorer(tokenizer=SECOND, family: str = "llama", positions: int = 128, **options) -> CrossTokenizerScorer:
    model = build_model(family, len(tokenizer), seed=1, width=16, layers=1, positions=positions)
    teacher = RolloutTeacher(model, LMHead.of(model).frozen(torch.device("cpu")), Accelerator(cpu=True), 2, "device")
    scorer = RolloutScorer(0.7, KD_TEMPERATURE, len(tokenizer))
    return CrossTokenizerScorer(
        TwoTokenizers(FIRST, tokenizer), teacher, scorer, [EOS], **{"conversational": False, **options}
    )


def batch_of(completions: list[list[int]], prompts: list[str] = PROMPTS) -> tuple[Batch, torch.Tensor]:
    """Return a batch of padded tokens, and log-probs of the student, which are no numbers at the padding."""
    prompt_ids, prompt_mask = left_pad([ids_of(FIRST, prompt) for prompt in prompts], PAD)
    length = max(map(len, completions)) + 1
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in completions])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in completions])
    logps = -torch.rand(len(completions), length, generator=torch.Generator().manual_seed(0)) - 0.5
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask.long(),
        "completion_ids": ids,
        "completion_mask": mask,
    }
    return batch, logps.masked_fill(mask == 0, torch.nan)


@torch.no_grad()
def expected_teacher(scorer: CrossTokenizerScorer, prompt: list[int], reading, length: int) -> list[float]:
    """The sums of the teacher's log-probs, token by token, from a forward pass over one row."""
    logits = scorer.teacher.model(torch.tensor([prompt + reading.ids])).logits[0, len(prompt) - 1 : -1]
    logps = (logits.double() / KD_TEMPERATURE).log_softmax(-1)
    sums = [0.0] * length
    for place, (id_, credit) in enumerate(zip(reading.ids, reading.of_teacher, strict=True)):
        if credit >= 0:
            sums[credit] += logps[place, id_].item()
    return sums


def check_rows(scorer: CrossTokenizerScorer, found, completions, student_logps, prompts: list[list[int]], end: int):
    """Compare the rows without a fault."""
    length = student_logps.shape[1]
    for row, completion in enumerate(completions):
        if row in found.faults:
            continue
        (reading,) = scorer.tokenizers.read([completion], [EOS], end)
        teacher = expected_teacher(scorer, prompts[row], reading, length)
        assert found.teacher[row].tolist() == pytest.approx(teacher, abs=1e-4)
        student, lengths = [0.0] * length, [0] * length
        for place, credit in enumerate(reading.of_student):
            if credit >= 0:
                student[credit] += student_logps[row, place].item()
                lengths[credit] += 1
        assert found.student[row].tolist() == pytest.approx(student, abs=1e-5)
        assert found.lengths[row].tolist() == [max(count, 1) for count in lengths]


class TestScores:
    def test_spans_have_the_sums_of_both_models_at_the_kd_temperature(self):
        scorer = build_scorer()
        batch, student_logps = batch_of(COMPLETIONS)
        found = scorer.score(batch, student_logps)
        assert found.faults == {}
        assert found.lengths.dtype == torch.int64
        assert found.teacher.dtype == found.student.dtype == torch.float32
        assert not found.teacher.requires_grad
        assert found.lengths.max() > 1
        prompts = [ids_of(SECOND, prompt) for prompt in PROMPTS]
        check_rows(scorer, found, COMPLETIONS, student_logps, prompts, SECOND.eos_token_id)

    def test_tokens_of_tools_are_no_part_of_the_completion(self):
        scorer = build_scorer()
        batch, student_logps = batch_of(COMPLETIONS)
        length = student_logps.shape[1]
        own = len(COMPLETIONS[3]) - 2
        batch["tool_mask"] = (torch.arange(length) < own).long().expand(4, -1)
        found = scorer.score(batch, student_logps)
        cut = [row[:own] for row in COMPLETIONS]
        prompts = [ids_of(SECOND, prompt) for prompt in PROMPTS]
        check_rows(scorer, found, cut, student_logps, prompts, SECOND.eos_token_id)

    def test_character_that_the_limit_has_cut_is_in_no_reward(self):
        both = TwoTokenizers(FIRST, SECOND)
        (reading,) = both.read([CUT], [EOS], SECOND.eos_token_id)
        assert reading.of_student[-1] == -1
        assert reading.of_student[:-1].min() >= 0
        assert bytes(both.teacher_bytes[reading.ids[-1]])[-1:] != b"\xc3"

    @pytest.mark.parametrize("max_context", [4, 6, 7, 9, 10, 12, 13])
    def test_rows_that_exceed_the_context_of_the_teacher_are_faults(self, max_context: int):
        """GPT-2 has no positions beyond its context; some prompts alone exceed the shortest one."""
        prompts = [ids_of(SECOND, prompt) for prompt in PROMPTS]
        readings = TwoTokenizers(FIRST, SECOND).read(COMPLETIONS, [EOS], SECOND.eos_token_id)
        counts = [len(prompt) + len(reading.ids) for prompt, reading in zip(prompts, readings, strict=True)]
        assert sorted(counts) == [7, 10, 10, 13]
        assert max(map(len, prompts)) > 4
        scorer = build_scorer(family="gpt2", positions=max_context, max_context=max_context)
        batch, student_logps = batch_of(COMPLETIONS)
        found = scorer.score(batch, student_logps)
        check_rows(scorer, found, COMPLETIONS, student_logps, prompts, SECOND.eos_token_id)
        assert list(found.faults) == [row for row, count in enumerate(counts) if count > max_context]
        for row, fault in found.faults.items():
            assert f"have {counts[row]} tokens of the teacher, its context {max_context}" in fault
            last = len(COMPLETIONS[row]) - 1
            expected = [-torch.inf if place == last else 0 for place in range(found.teacher.shape[1])]
            assert found.teacher[row].tolist() == expected
            batch["completion_mask"][row] = 0  # a row without tokens only fills up a batch
        assert scorer.score(batch, student_logps).faults == {}

    def test_head_of_the_teacher_runs_in_the_precision_of_the_run(self):
        scorer, seen = build_scorer(), []
        autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
        scorer.teacher.accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=autocast)
        head = scorer.teacher.head

        def teacher_logits(*arguments):
            seen.append(torch.is_autocast_enabled("cpu"))
            return head.teacher_logits(*arguments)

        scorer.teacher.head = SimpleNamespace(teacher_logits=teacher_logits)
        batch, student_logps = batch_of(COMPLETIONS)
        scorer.score(batch, student_logps)
        assert {*seen} == {True}

    @pytest.mark.parametrize("unknown", [len(FIRST), len(FIRST) + 7])
    def test_row_with_a_token_that_has_no_text_is_a_fault_of_its_own(self, unknown: int):
        completions = [*COMPLETIONS[:2], [unknown, *COMPLETIONS[0]], COMPLETIONS[3]]
        scorer = build_scorer()
        batch, student_logps = batch_of(completions)
        found = scorer.score(batch, student_logps)
        assert list(found.faults) == [2]
        assert f"the token {unknown} has no text" in found.faults[2]
        assert found.teacher[2, len(completions[2]) - 1] == -torch.inf
        prompts = [ids_of(SECOND, prompt) for prompt in PROMPTS]
        check_rows(scorer, found, completions, student_logps, prompts, SECOND.eos_token_id)


class TestPrompts:
    def test_text_of_a_prompt_is_without_the_special_tokens_before_it(self):
        both = TwoTokenizers(FIRST, SECOND)
        ids = ids_of(FIRST, "hello é")
        assert both.prompt_text(ids) == "hello é"
        assert both.prompt_text([EOS, EOS, *ids]) == "hello é"
        assert both.prompt_text([EOS, *ids, EOS, *ids]) == "hello é<eos>hello é"
        assert both.prompt_text(ids[:-1]) == "hello \ufffd"
        assert both.prompt_text([EOS]) == both.prompt_text([]) == ""

    def test_conversations_go_through_the_template_of_the_teacher_and_end_with_its_turn(self):
        tokenizer = trained("low helmets swore; hold on to worlds's ends.")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
        tokenizer.chat_template = CHAT + "{% if add_generation_prompt %}> {% endif %}"
        end = tokenizer.convert_tokens_to_ids("<end>")
        scorer = build_scorer(tokenizer, conversational=True, chat_template_kwargs={"extra": "on "})
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        batch, student_logps = batch_of(COMPLETIONS)
        found = scorer.score(batch, student_logps, chats)
        texts = [f"on {prompt}<end>> " for prompt in PROMPTS]
        prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        check_rows(scorer, found, COMPLETIONS, student_logps, prompts, end)
        with pytest.raises(UserError, match="through its own chat template"):
            scorer.score(batch, student_logps)

    def test_given_texts_win_over_the_tokens_of_the_prompts(self):
        scorer, texts = build_scorer(), ["on", "to", "low", "ends"]
        batch, student_logps = batch_of(COMPLETIONS)
        found = scorer.score(batch, student_logps, texts)
        prompts = [ids_of(SECOND, text) for text in texts]
        check_rows(scorer, found, COMPLETIONS, student_logps, prompts, SECOND.eos_token_id)

    def test_first_prompt_without_room_for_a_token_is_named(self):
        counts = [len(ids_of(SECOND, prompt)) for prompt in PROMPTS]
        build_scorer(max_context=max(counts) + 1).check_prompts(PROMPTS)
        build_scorer().check_prompts(PROMPTS)
        longest = counts.index(max(counts))
        with pytest.raises(UserError, match=f"begins with '{PROMPTS[longest]}' has {max(counts)} tokens"):
            build_scorer(max_context=max(counts)).check_prompts(PROMPTS)


class TestTokenizers:
    def test_special_tokens_join_no_bytes_and_other_added_tokens_do(self):
        """A space inside the name of a special token is a place where a text can be cut."""
        places = []
        for special in (True, False):
            teacher = trained("low helmets swore", 290)
            teacher.add_tokens([AddedToken("x y", special=special)])
            places.append(TwoTokenizers(FIRST, teacher).pairs[ord("x"), ord(" ")])
        assert places == [False, True]

    def test_tokens_that_a_teacher_adds_to_texts_are_left_out(self):
        teacher = trained("low helmets swore")
        teacher.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", teacher.eos_token_id)]
        )
        assert teacher("low")["input_ids"][0] == teacher.eos_token_id
        both = TwoTokenizers(FIRST, teacher)
        assert both.encode(["low", "<eos>"]) == [ids_of(teacher, "low"), ids_of(teacher, "<eos>")]
        assert both.encode([]) == []
        assert teacher.eos_token_id not in both.encode(["<eos>"])[0]

    def test_teacher_without_an_end_is_refused(self):
        teacher = trained("low helmets swore")
        teacher.eos_token = None
        with pytest.raises(UserError, match="has no EOS token"):
            TwoTokenizers(FIRST, teacher)

    def test_what_cannot_be_read_is_refused_before_training(self, caplog: pytest.LogCaptureFixture):
        words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
        with pytest.raises(UserError, match="tokenizer of the teacher"):
            check_two_tokenizers(FIRST, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"), False)
        teacher = trained("low helmets swore")
        teacher.chat_template = CHAT
        with caplog.at_level(logging.WARNING):
            check_two_tokenizers(FIRST, teacher, True)
            check_two_tokenizers(FIRST, teacher, False)
            assert caplog.text == ""
            check_two_tokenizers(FIRST, FIRST, False)
        assert "the same vocabulary" in caplog.text

    def test_credits_are_whole_numbers_for_texts_without_tokens(self):
        (reading,) = TwoTokenizers(FIRST, SECOND).read([CUT[-1:]], [EOS], SECOND.eos_token_id)
        assert (reading.ids, reading.of_student.tolist()) == ([], [-1])
        assert reading.of_teacher.dtype == np.int64
