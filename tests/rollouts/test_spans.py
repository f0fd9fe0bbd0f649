"""Alignment of two tokenizers: by hand, for random texts, and the gradient that it gives, by enumeration."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tabular import Tabular, relative_error
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minillm_trl.errors import UserError
from minillm_trl.models.token_bytes import inner_pairs, token_bytes
from minillm_trl.objectives import reward_to_go, token_rewards
from minillm_trl.rollouts.cross_tokenizer import TwoTokenizers, check_two_tokenizers
from minillm_trl.rollouts.spans import certain_cuts, credited_tokens, read_text

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
# letters, accents, spaces of several kinds, digits, emoji with joiners, and a name that looks like a special token
CHARACTERS = [*"hello wor.ld'st 12\n\t,", "é", "東", "京", "☂️", "👩‍🚀", "　", "<eos>", "  ", "\n\n", "isn't"]


def bpe(merges: list[str], normalizer=None, special: tuple[str, ...] = ("<eos>",)) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these merges, each written as the two parts with a space between them."""
    pairs = [tuple(merge.split("|")) for merge in merges]
    tokens = [*special, *sorted(ALPHABET), *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def trained(text: str, vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges from a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def sentencepiece(prefix: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer in SentencePiece's form: spaces as U+2581, and unknown characters as bytes."""
    words = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helowrd", "he", "ll", "▁w", "or"]
    words += ["▁wor", "ld", "▁world"]
    merges = [("h", "e"), ("l", "l"), ("▁", "w"), ("o", "r"), ("▁w", "or"), ("l", "d"), ("▁wor", "ld")]
    model = models.BPE({token: id_ for id_, token in enumerate(words)}, merges, byte_fallback=True)
    tokenizer = Tokenizer(model)
    parts = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


FIRST = trained("hello world, it's a lower word. isn't 東京 hello 12 123")
SECOND = trained("low helmets swore; hold on to worlds's ends.\n\n\n 1 2 12 é é é", 300)


def random_texts(seed: int, count: int = 60) -> list[str]:
    draws = np.random.default_rng(seed)
    return ["".join(draws.choice(CHARACTERS, draws.integers(1, 30))) for _ in range(count)]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


class TestBytes:
    @pytest.mark.parametrize("tokenizer", [FIRST, SECOND, sentencepiece()])
    def test_tokens_of_a_text_concatenate_to_it(self, tokenizer: PreTrainedTokenizerFast):
        table = token_bytes(tokenizer, "student")
        for text in random_texts(0):
            assert b"".join(table[id_] for id_ in ids_of(tokenizer, text)) == text.encode()

    def test_name_of_an_added_token_is_its_text(self):
        assert token_bytes(FIRST, "student")[FIRST.eos_token_id] == b"<eos>"

    @pytest.mark.parametrize("make", [lambda: bpe([]), sentencepiece])
    def test_name_of_an_added_token_is_read_as_it_stands(self, make):
        tokenizer, names = make(), ["<é>", "of ▁", "<0x4>", "<0x41>s"]
        assert tokenizer.add_tokens(names) == 4
        table = token_bytes(tokenizer, "student")
        assert [table[id_] for id_ in tokenizer.convert_tokens_to_ids(names)] == [name.encode() for name in names]

    def test_only_byte_tokens_of_sentencepiece_stand_for_a_byte(self):
        saved = json.loads(sentencepiece().backend_tokenizer.to_str())
        longer = ["<0x41>s", "<0xhello"]
        saved["model"]["vocab"] |= {name: len(saved["model"]["vocab"]) + n for n, name in enumerate(longer)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(saved)), eos_token="<eos>")
        names = {"<0x41>": b"A", "▁world": b" world", "▁": b" ", "or": b"or"}
        names |= {name: name.encode() for name in longer}
        table = token_bytes(tokenizer, "student")
        assert {name: table[tokenizer.convert_tokens_to_ids(name)] for name in names} == names

    def test_ids_that_no_token_has_are_a_gap(self):
        """As before the added tokens of Phi-4-mini, where `len(tokenizer)` is less than the largest id."""
        saved = json.loads(FIRST.backend_tokenizer.to_str())
        last = len(FIRST) + 5
        saved["model"]["vocab"]["<last>"] = last
        saved["added_tokens"].append({**saved["added_tokens"][0], "id": last, "content": "<last>"})
        tokenizer = Tokenizer.from_str(json.dumps(saved))
        table = token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"), "student")
        assert (len(table), table[last], table[last - 1]) == (last + 1, b"<last>", b"")

    def test_pairs_are_those_inside_tokens(self):
        found = inner_pairs([b"abc", b"", b"d", b"ba"])
        assert [tuple(pair) for pair in np.argwhere(found)] == [(97, 98), (98, 97), (98, 99)]
        assert np.argwhere(inner_pairs([b"\xff\xff\x00"])).tolist() == [[255, 0], [255, 255]]

    def test_each_byte_is_the_one_for_which_gpt2_has_a_character(self):
        tokenizer = bpe([])
        table, names = token_bytes(tokenizer, "student"), bytes_to_unicode()
        ids = tokenizer.convert_tokens_to_ids([names[byte] for byte in range(256)])
        assert [table[id_] for id_ in ids] == [bytes([byte]) for byte in range(256)]

    @pytest.mark.parametrize(
        ("decoder", "is_known"),
        [
            ([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)], True),
            ([decoders.Replace("▁", " "), decoders.Fuse()], False),
            ([decoders.Replace("▁", ""), decoders.ByteFallback(), decoders.Fuse()], False),
            ([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)], False),
            ([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.CTC()], False),
            ([decoders.ByteLevel(), decoders.Fuse()], False),
        ],
    )
    def test_decoder_decides_whether_bytes_are_known(self, decoder: list, is_known: bool):
        tokenizer = sentencepiece()
        tokenizer.backend_tokenizer.decoder = decoders.Sequence(decoder)
        with nullcontext() if is_known else pytest.raises(UserError, match="neither byte-level nor SentencePiece's"):
            assert len(token_bytes(tokenizer, "student")) == len(tokenizer)

    def test_other_kind_of_tokenizer_is_refused_by_its_owner(self):
        words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
        with pytest.raises(UserError, match="tokenizer of the teacher"):
            TwoTokenizers(FIRST, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"))

    def test_teacher_that_adds_a_space_is_refused(self):
        with pytest.raises(UserError, match="' word of two'"):
            TwoTokenizers(FIRST, sentencepiece(prefix=True))

    def test_conversations_need_the_teachers_template(self):
        check_two_tokenizers(FIRST, SECOND, conversational=False)
        with pytest.raises(UserError, match="chat template"):
            check_two_tokenizers(FIRST, SECOND, conversational=True)


class TestReadText:
    def test_character_counts_once_it_is_complete(self):
        found = read_text([b"a\xe6", b"\x9d\xb1", b"b"], is_complete=True)
        assert (found.text, found.ends.tolist(), found.unread) == ("a東b", [1, 4, 5], 0)

    def test_bytes_that_are_no_text_are_read_as_the_replacement_character(self):
        found = read_text([b"a\xe6", b"b", b"\xff"], is_complete=True)
        assert (found.text, found.ends.tolist()) == ("a�b�", [1, 5, 8])

    def test_character_that_the_limit_has_cut_is_not_read(self):
        assert read_text([b"a", b"\xe6", b"\x9d"], is_complete=False) == ("a", pytest.approx([1, 1, 1]), 2)
        # a token with a complete character before the cut one is read
        assert read_text([b"a", b"b\xe6\x9d"], is_complete=False).unread == 0
        # an end token shows that nothing follows
        ended = read_text([b"a", b"\xe6", b"\x9d"], is_complete=True)
        assert (ended.text, ended.ends.tolist(), ended.unread) == ("a�", [1, 1, 4], 0)

    @pytest.mark.parametrize(("end", "unread"), [([b""], 0), ([b"\xe6", b""], 2)])
    def test_token_without_bytes_is_unread_only_in_a_character_that_is_cut(self, end: list[bytes], unread: int):
        assert read_text([b"a", *end], is_complete=False).unread == unread

    def test_nothing(self):
        for is_complete in (True, False):
            found = read_text([], is_complete)
            assert (found.text, len(found.ends), found.unread) == ("", 0, 0)
            assert found.ends.dtype == np.int64


class TestCredits:
    def test_by_hand(self):
        # student: he|ll|o| wor|ld|.|<eos>   teacher: hel|lo| world|.
        student_ends, teacher_ends = np.cumsum([2, 2, 1, 4, 2, 1]), np.cumsum([3, 2, 6, 1])
        students, teachers = credited_tokens(student_ends, teacher_ends, np.array([5, 11]), last=6)
        assert students.tolist() == [3, 3, 3, 5, 5, 6]
        assert teachers.tolist() == [3, 3, 5, 6]

    def test_cut_inside_a_token_of_the_student_ends_no_span(self):
        students, teachers = credited_tokens(np.array([3, 6]), np.array([2, 6]), np.array([2]), last=1)
        assert students.tolist() == [1, 1]
        assert teachers.tolist() == [1, 1]

    def test_cuts_are_between_bytes_that_no_token_joins(self):
        pairs = inner_pairs([b"ab", b" c", "é".encode()])
        assert certain_cuts("ab c aé".encode(), pairs).tolist() == [2, 4, 5]  # not before é, which is not ASCII
        assert len(certain_cuts(b"", pairs)) == 0
        assert certain_cuts(b"\x00\x7f", pairs).tolist() == [1]  # the last of ASCII

    @pytest.mark.parametrize(("student", "teacher"), [(FIRST, SECOND), (SECOND, FIRST), (FIRST, sentencepiece())])
    def test_spans_have_equal_bytes_and_later_text_does_not_change_earlier_ones(self, student, teacher):
        both = TwoTokenizers(student, teacher)
        for text, other in zip(random_texts(1), random_texts(2), strict=True):
            ids, data = ids_of(student, text), text.encode()
            (reading,) = both.read([[*ids, student.eos_token_id]], [student.eos_token_id], teacher.eos_token_id)
            assert reading.fault is None
            spelled = [{}, {}]
            tables = (
                (both.student_bytes, ids, reading.of_student),
                (both.teacher_bytes, reading.ids, reading.of_teacher),
            )
            for spans, (table, tokens, credit) in zip(spelled, tables, strict=True):
                for token, place in zip(tokens, credit, strict=False):
                    spans[place] = spans.get(place, b"") + (b"" if token == len(table) else table[token])
            spelled[1][len(ids)] = spelled[1][len(ids)].removesuffix(b"<eos>")  # the end token
            assert spelled[0] == spelled[1]
            assert b"".join(spelled[0].values()) == data
            # a span is credited to a token that begins behind it
            assert all(place > number for number, place in enumerate(reading.of_student[:-1]))
            for cut in certain_cuts(data, both.pairs):
                begun = data[: cut + 1].decode()
                tokens = [both.teacher_bytes[id_] for id_ in both.encode([begun + other])[0]]
                ends = np.cumsum([0, *map(len, tokens)]).tolist()
                before = [token for token, end in zip(tokens, ends[1:], strict=True) if end <= cut]
                expected, size = [], 0
                for id_ in both.encode([text])[0]:
                    size += len(both.teacher_bytes[id_])
                    if size <= cut:
                        expected.append(both.teacher_bytes[id_])
                assert cut in ends
                assert before == expected

    def test_normalised_text_is_a_single_span(self):
        teacher = bpe(["h|e"], normalizer=normalizers.NFC())
        both = TwoTokenizers(FIRST, teacher)
        for text, is_single in (("he e\u0301 he he", True), ("he é he he", False)):
            ids = [*ids_of(FIRST, text), FIRST.eos_token_id]
            (reading,) = both.read([ids], [FIRST.eos_token_id], teacher.eos_token_id)
            assert reading.fault is None
            assert (len({*reading.of_teacher}) == 1) == is_single
            assert len(reading.of_teacher) == len(reading.ids)
            assert len(reading.of_student) == len(ids)

    def test_text_without_tokens_of_the_teacher_is_a_fault(self):
        tokens = ["<eos>", *"wordft", "Ġ"]
        tokenizer = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        both = TwoTokenizers(FIRST, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
        words, other = both.read([ids_of(FIRST, "two word"), ids_of(FIRST, "two 12")], [FIRST.eos_token_id], 0)
        assert words.fault is None
        assert "'two 12'" in other.fault

    def test_row_of_the_vocabulary_that_is_no_token_is_a_fault(self):
        """Models pad their vocabularies, and may sample such a row."""
        both = TwoTokenizers(FIRST, SECOND)
        (word,) = [ids_of(FIRST, "hello")]
        found = both.read([word, [*word, len(FIRST) + 3]], [FIRST.eos_token_id], SECOND.eos_token_id)
        assert found[0].fault is None
        assert f"token {len(FIRST) + 3} has no text" in found[1].fault

    def test_empty_completions(self):
        both = TwoTokenizers(FIRST, SECOND)
        nothing, end = both.read([[], [FIRST.eos_token_id]], [FIRST.eos_token_id], SECOND.eos_token_id)
        assert (nothing.ids, len(nothing.of_student), len(nothing.of_teacher)) == ([], 0, 0)
        assert (end.ids, end.of_student.tolist(), end.of_teacher.tolist()) == ([SECOND.eos_token_id], [0], [0])


class TestGradient:
    """All completions of a student with the tokens "he", "l" and " ", whose teacher also has "hel" and "hell"."""

    PROBLEM = Tabular.build(vocab=4, horizon=5)

    def enumerate(self) -> tuple[list, torch.Tensor, list[list[float]]]:
        """Readings of all completions, the student's logits, and the teacher's log-probs of its own tokens."""
        student, teacher = bpe(["h|e"]), bpe(["h|e", "he|l", "hel|l"])
        vocabulary = [student.convert_tokens_to_ids(token) for token in ("<eos>", "he", "l", "Ġ")]
        completions = [
            [vocabulary[token] for token in ids[real].tolist()]
            for ids, real in zip(self.PROBLEM.ids, self.PROBLEM.mask, strict=True)
        ]
        ends = [student.eos_token_id], teacher.eos_token_id
        readings = TwoTokenizers(student, teacher).read(completions, *ends)
        possible = sorted({id_ for reading in readings for id_ in reading.ids})
        rows: dict[tuple, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(1)
        logps = []
        for reading in readings:
            values = []
            for place, id_ in enumerate(reading.ids):
                prefix = tuple(reading.ids[:place])
                if prefix not in rows:
                    logits = 1.5 * torch.randn(len(possible), dtype=torch.float64, generator=generator)
                    rows[prefix] = torch.log_softmax(logits, -1)
                values.append(rows[prefix][possible.index(id_)].item())
            logps.append(values)
        generator.manual_seed(0)
        logits = torch.randn(self.PROBLEM.num_prefixes, 4, dtype=torch.float64, generator=generator)
        return readings, logits.requires_grad_(), logps

    def error(self, credits: list[tuple[np.ndarray, np.ndarray]], logits: torch.Tensor, logps: list) -> float:
        """Relative error of the expected policy gradient, with these credits, of the KL to the teacher's texts."""
        own, mask = self.PROBLEM.token_logps(logits), self.PROBLEM.mask
        of_text = torch.tensor([sum(values) for values in logps], dtype=torch.float64)
        sequence = self.PROBLEM.sequence_logps(logits)
        (exact,) = torch.autograd.grad((sequence.exp() * (sequence - of_text)).sum(), logits, retain_graph=True)
        teacher, student = torch.zeros_like(own), torch.zeros_like(own).detach()
        for row, (of_teacher, of_student) in enumerate(credits):
            values = torch.tensor(logps[row], dtype=torch.float64)
            teacher[row].scatter_add_(0, torch.tensor(of_teacher, dtype=torch.long), values)
            chosen = own[row][mask[row]].detach()
            student[row].scatter_add_(0, torch.tensor(of_student, dtype=torch.long), chosen)
        rewards = token_rewards(teacher.detach(), student, mask)
        torch.testing.assert_close(rewards.sum(dim=1), (of_text - sequence).detach())  # whatever the credits
        returns = reward_to_go(rewards, mask, include_current=True, length_normalization=False)
        surrogate = -(sequence.exp().detach()[:, None] * returns * own).masked_fill(~mask, 0.0).sum()
        (found,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
        return relative_error(found, exact)

    def test_expected_gradient_is_that_of_the_kl_to_the_teachers_texts(self):
        readings, logits, logps = self.enumerate()
        credits = [(reading.of_teacher, reading.of_student) for reading in readings]
        assert self.error(credits, logits, logps) < 1e-9
        assert min(len({*teacher}) for teacher, student in credits if len(student) == 5) < 4  # some span has tokens

    def test_credit_to_the_last_token_of_a_span_is_biased(self):
        """As the text after a span decides about its end. The spans are the shortest with common boundaries."""
        readings, logits, logps = self.enumerate()
        student, teacher = bpe(["h|e"]), bpe(["h|e", "he|l", "hel|l"])
        sizes = [0, 2, 1, 1], token_bytes(teacher, "teacher")
        credits = []
        for reading, ids, real in zip(readings, self.PROBLEM.ids, self.PROBLEM.mask, strict=True):
            own = np.cumsum([sizes[0][token] for token in ids[real].tolist()])
            theirs = np.cumsum([0 if id_ == teacher.eos_token_id else len(sizes[1][id_]) for id_ in reading.ids])
            common = np.intersect1d(own, theirs)
            if real.sum() > 1 and ids[real][-1] == 0:  # the end of the text, and the end token after it
                own[-1] = theirs[-1] = own[-1] + 1
                common = np.append(common, own[-1])
            last = np.searchsorted(own, common, side="right") - 1
            credits.append(tuple(last[np.searchsorted(common, ends)] for ends in (theirs, own)))
        assert student.eos_token_id == teacher.eos_token_id == 0
        assert self.error(credits, logits, logps) == pytest.approx(0.053, abs=0.001)
