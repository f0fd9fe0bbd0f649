"""The law of speculative mixing, by enumeration and by statistics, and what does not change its samples."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from conftest import FAMILIES, build_model
from kept_states import check_kept_states
from test_sampling import EOS, HORIZON, LONG_PROMPTS, PROMPTS, distance, mixture_law, tiny

import minillm_trl.rollouts.speculative
from minillm_trl.rollouts.coins import row_coin_keys
from minillm_trl.rollouts.compiled_steps import CompiledDecoding
from minillm_trl.rollouts.engine_drafts import MARGIN, Draft, EngineDrafts
from minillm_trl.rollouts.keyed_random import keyed_uniforms, toss_coins
from minillm_trl.rollouts.sampling import sample_prompts
from minillm_trl.rollouts.slots import Slots
from minillm_trl.rollouts.speculative import SpeculativeSampling, block_length, judge_drafts, speculative_numbers


class TestLaw:
    """Of one token: draft y from q, keep it if the toss is not below alpha or the teacher agrees, else replace it."""

    @staticmethod
    def exact_law(teacher: torch.Tensor, student: torch.Tensor, alpha: float, temperature: float) -> torch.Tensor:
        """Return the probability of each token, adding the lengths of the intervals of the numbers that lead to it.

        The numbers at which the outcome changes are tried on both sides.
        """
        p, q = (torch.softmax(logits / temperature, dim=-1) for logits in (teacher, student))
        size, margin = len(p), 1e-9
        residual = (p - q).clamp(min=0)
        bounds = torch.cat([torch.zeros(1, dtype=torch.float64), (residual / residual.sum()).cumsum(0)])
        law = (1 - alpha) * q
        for draft in range(size):
            threshold = min(1.0, (p[draft] / q[draft]).item())
            for token in range(size):
                interval = (bounds[token + 1] - bounds[token]).item()
                if interval > 2 * margin and threshold < 1.0:
                    inside = [bounds[token].item() + margin, bounds[token + 1].item() - margin]
                    for number in inside:
                        assert TestLaw.judge(teacher, student, draft, threshold + margin, number, temperature) == (
                            False,
                            token,
                        )
                law[token] += alpha * q[draft] * (1 - threshold) * interval
            kept = [margin, threshold - margin] if threshold > 2 * margin else []
            assert all(
                TestLaw.judge(teacher, student, draft, number, 0.5, temperature) == (True, draft) for number in kept
            )
            law[draft] += alpha * q[draft] * threshold
        return law

    @staticmethod
    def judge(teacher, student, draft: int, verdict: float, replacement: float, temperature: float):
        numbers = (torch.tensor([number], dtype=torch.float64) for number in (verdict, replacement))
        kept, token = judge_drafts(teacher[None], student[None], torch.tensor([draft]), *numbers, temperature)
        return kept.item(), token.item()

    @pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_token_follows_the_mixture_exactly(self, alpha: float, temperature: float):
        torch.manual_seed(0)
        for _ in range(20):
            teacher, student = 1.5 * torch.randn(2, 5, dtype=torch.float64)
            p, q = (torch.softmax(logits / temperature, dim=-1) for logits in (teacher, student))
            law = self.exact_law(teacher, student, alpha, temperature)
            torch.testing.assert_close(law, alpha * p + (1 - alpha) * q, rtol=0, atol=1e-12)

    def test_excluded_token_of_the_teacher_is_always_rejected(self):
        teacher = torch.tensor([-torch.inf, 0.0, 1.0], dtype=torch.float64)
        assert self.judge(teacher, torch.zeros(3, dtype=torch.float64), 0, 0.0, 0.0, 1.0) == (False, 2)

    def test_equal_models_reject_nothing(self):
        logits = torch.randn(3, dtype=torch.float64)
        assert self.judge(logits, logits, 1, 1 - 2**-53, 0.5, 1.0) == (True, 1)

    def test_a_difference_without_a_residual_is_rounding(self):
        """Then no token could replace the draft; the residual of another row does not matter."""
        torch.manual_seed(0)
        student = torch.randn(4000, 4)
        teacher = student.clone()
        teacher[:, 0] = torch.nextafter(student[:, 0], torch.tensor(-torch.inf))
        p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
        rounding = (p[:, 0] < q[:, 0]) & ((p - q).amax(dim=-1) <= 0)
        assert rounding.any()
        teacher = torch.cat([teacher[rounding], torch.tensor([[-torch.inf, 0.0, 0.0, 0.0]])])
        student = torch.cat([student[rounding], torch.zeros(1, 4)])
        numbers = torch.tensor([1 - 2**-53, 0.5], dtype=torch.float64)[:, None].expand(2, len(student))
        kept, tokens = judge_drafts(teacher, student, torch.zeros(len(student), dtype=torch.long), *numbers, 1.0)
        assert kept.tolist() == [True] * int(rounding.sum()) + [False]
        assert tokens.tolist() == [0] * int(rounding.sum()) + [2]

    def test_lower_precisions_are_judged_in_float32(self):
        torch.manual_seed(0)
        teacher, student = torch.randn(2, 500, 6).bfloat16()
        drafts, numbers = torch.randint(6, (500,)), torch.rand(2, 500, dtype=torch.float64)
        found = judge_drafts(teacher, student, drafts, *numbers, 0.7)
        expected = judge_drafts(teacher.float() / 0.7, student.float() / 0.7, drafts, *numbers, 1.0)
        assert all(torch.equal(*parts) for parts in zip(found, expected, strict=True))
        assert 100 < found[0].sum() < 450


@torch.no_grad()
@pytest.mark.parametrize(("family", "slots"), [("gpt2", None), ("llama", 300)])
def test_samples_follow_the_law_of_the_mixture(family: str, slots: int | None):
    student, teacher, alpha, rows = tiny(0, family), tiny(1, family), 0.4, 2400
    counts: dict[tuple, float] = {}
    completions = sample_prompts(
        student,
        [PROMPTS[0], *[PROMPTS[1]] * rows],  # the first one is padded
        keys=[(0, row) for row in range(rows + 1)],
        max_new_tokens=HORIZON,
        eos_token_ids=[EOS],
        pad_token_id=1,
        batch_size=slots,
        teacher=teacher,
        alpha=alpha,
        mixing="speculative",
    )
    for completion in completions[1:]:
        counts[tuple(completion)] = counts.get(tuple(completion), 0.0) + 1 / rows
    assert distance(counts, mixture_law(student, teacher, PROMPTS[1], alpha, 1.0)) < 0.05
    assert distance(counts, mixture_law(student, teacher, PROMPTS[1], 0.0, 1.0)) > 0.08
    assert distance(counts, mixture_law(student, teacher, PROMPTS[1], 1.0, 1.0)) > 0.08


def sample(
    family: str, batch_size: int | None, prompts=LONG_PROMPTS, alpha: float = 0.4, of_teacher: str = "", **options
):
    return sample_prompts(
        build_model(family, vocab_size=50, width=16, layers=2),
        prompts,
        keys=[(7, sum(prompt)) for prompt in prompts],
        max_new_tokens=24,
        eos_token_ids=[0, 3],
        pad_token_id=1,
        batch_size=batch_size,
        alpha=alpha,
        coin_key=(9,),
        teacher=build_model(of_teacher or family, vocab_size=50, seed=1, width=16, layers=2),
        mixing="speculative",
        **options,
    )


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "mpt"])
def test_a_completion_depends_on_neither_other_rows_nor_blocks(monkeypatch: pytest.MonkeyPatch, family: str):
    alone = sample(family, batch_size=1)
    assert len({len(completion) for completion in alone}) > 3  # rows finish at different steps
    for length, slots in ((1, 12), (3, 5), (9, 4), (32, 12)):
        monkeypatch.setattr(minillm_trl.rollouts.speculative, "block_length", lambda *_, length=length: length)
        assert sample(family, batch_size=slots) == alone
        assert sample(family, batch_size=slots, prompts=LONG_PROMPTS[::-1]) == alone[::-1]


@pytest.mark.parametrize("family", ["bloom", "llama", "mistral"])
def test_rows_finish_in_blocks_without_a_verdict(monkeypatch: pytest.MonkeyPatch, family: str):
    """There the teacher's states of the row are not complete yet, so it keeps its slot."""
    found = []
    for length, slots in ((1, 1), (3, 5)):
        monkeypatch.setattr(minillm_trl.rollouts.speculative, "block_length", lambda *_, length=length: length)
        found.append(sample(family, batch_size=slots, alpha=0.02))
    assert found[0] == found[1]


def test_verdicts_are_asked_for_where_coins_would_call_the_teacher():
    keys = [(1, 2), (3,)]
    tosses, replacements = speculative_numbers(keys, 50)
    for own, key in zip(tosses, keys, strict=True):
        assert (own < 0.3).tolist() == toss_coins(50, 0.3, *key).tolist()
    assert len(np.unique(np.concatenate([tosses, replacements]))) == 200


@torch.no_grad()
def test_completions_are_those_of_judging_one_token_after_another(monkeypatch: pytest.MonkeyPatch):
    """Each token has its own three numbers: one draws it, one judges it, and one draws what replaces it."""
    student, teacher = (build_model("llama", vocab_size=12, seed=seed, width=16, layers=1) for seed in (0, 1))
    teacher.get_output_embeddings().weight.mul_(3.0)  # so that it often disagrees
    alpha, temperature, most = 0.6, 0.7, 12
    prompts, keys = [[3, 4, 9, 1]] * 4 + [[2, 7]] * 4 + [[5]] * 4, [(4, row) for row in range(12)]
    tosses, replacements = speculative_numbers(row_coin_keys(None, 0, keys), most)

    def pick(weights: torch.Tensor, number: float) -> int:
        return int((weights.cumsum(0) <= number * weights.sum()).sum())

    expected, verdicts, shares = [], [], {7 / 10}
    for row, prompt in enumerate(prompts):
        completion: list[int] = []
        numbers = zip(keyed_uniforms(most, 4, row), tosses[row], replacements[row], strict=True)
        for number, toss, replacement in numbers:
            ids = torch.tensor([[*prompt, *completion]])
            p, q = (torch.softmax(model(ids).logits[0, -1].double() / temperature, -1) for model in (teacher, student))
            token = pick(q, number)
            if toss < alpha:
                verdicts.append(toss / alpha < (p[token] / q[token]).item())
                shares.add((7 + sum(verdicts)) / (10 + len(verdicts)))
                token = token if verdicts[-1] else pick((p - q).clamp(min=0), replacement)
            completion.append(token)
            if token == 0:
                break
        expected.append(completion)
    assert len({len(completion) for completion in expected}) > 3
    assert 10 < sum(verdicts) < len(verdicts) - 10

    used: list[float] = []  # shares of kept drafts
    monkeypatch.setattr(
        minillm_trl.rollouts.speculative, "block_length", lambda _, share, *__: used.append(share) or 4
    )
    options = {"max_new_tokens": most, "eos_token_ids": [0], "pad_token_id": 1, "mixing": "speculative"}
    options |= {"keys": keys, "teacher": teacher, "alpha": alpha, "temperature": temperature}
    assert sample_prompts(student, prompts, **options) == expected
    used.clear()
    assert sample_prompts(student, prompts, **options, batch_size=1) == expected
    assert len(used) > 20
    assert shares.issuperset(used)


@pytest.mark.parametrize("families", [("llama", "mistral"), ("mistral", "llama")])
def test_dropped_drafts_leave_no_trace_if_one_model_has_windows(monkeypatch: pytest.MonkeyPatch, families):
    found = []
    for length, slots in ((1, 1), (8, 12)):
        monkeypatch.setattr(minillm_trl.rollouts.speculative, "block_length", lambda *_, length=length: length)
        found.append(sample(families[0], batch_size=slots, alpha=1.0, of_teacher=families[1]))
    assert found[0] == found[1]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4, 32])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom"])
def test_kept_states_are_those_of_a_plain_forward_pass(monkeypatch: pytest.MonkeyPatch, family: str, length: int):
    monkeypatch.setattr(minillm_trl.rollouts.speculative, "block_length", lambda *_: length)
    batches = []
    options = {"keep_states": True, "on_batch": lambda rows, sampled: batches.append((rows, sampled))}
    completions = sample(family, batch_size=5, **options)
    models = [build_model(family, vocab_size=50, seed=seed, width=16, layers=2) for seed in (0, 1)]
    assert sorted(row for rows, _ in batches for row in rows) == list(range(12))
    check_kept_states(models, LONG_PROMPTS, completions, batches)


def test_columns_of_dropped_drafts_are_removed(monkeypatch: pytest.MonkeyPatch):
    """Without windows when they are many, with windows always."""
    monkeypatch.setattr(minillm_trl.rollouts.speculative, "block_length", lambda *_: 8)
    found = {}
    align, run_step = Slots.align, SpeculativeSampling._refill
    for family in ("llama", "mistral"):
        removed, left = [], []
        monkeypatch.setattr(Slots, "align", lambda self, removed=removed: [removed.append(self.holes), align(self)])

        def refill(self, left=left):
            run_step(self)
            left.append(max(self.slots.holes, default=0))

        monkeypatch.setattr(SpeculativeSampling, "_refill", refill)
        sample(family, batch_size=12, alpha=1.0)
        found[family] = len(removed), max(left)
    assert found["mistral"][0] > found["llama"][0] > 0
    assert found["mistral"][1] == 0 < found["llama"][1]


@pytest.fixture
def counted() -> tuple[dict, Counter[str]]:
    """Return a student and a teacher as arguments, and the number of passes of each."""
    models = {name: build_model("llama", 50, seed, width=16) for seed, name in enumerate(("student", "teacher"))}
    calls: Counter[str] = Counter()
    for name, model in models.items():
        model.base_model.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return models, calls


@pytest.mark.parametrize(("alpha", "asked"), [(0.1, range(2, 10)), (1e-9, range(1, 2))])
def test_teacher_runs_only_after_drafts_that_ask_for_it(counted, alpha: float, asked: range):
    """And once more, at the end."""
    models, calls = counted
    options = {"max_new_tokens": 100, "eos_token_ids": [], "pad_token_id": 1, "mixing": "speculative"}
    sample_prompts(**models, prompt_ids=[[5]], keys=[(1,)], alpha=alpha, **options)
    assert calls["teacher"] in asked
    assert 100 <= calls["student"] < 140


def test_a_block_ends_with_its_last_row(monkeypatch: pytest.MonkeyPatch, counted):
    monkeypatch.setattr(minillm_trl.rollouts.speculative, "block_length", lambda *_: 8)
    models, calls = counted
    options = {"max_new_tokens": 20, "eos_token_ids": [*range(50)], "pad_token_id": 1, "mixing": "speculative"}
    completions = sample_prompts(**models, prompt_ids=[[5], [6]], keys=[(1,), (2,)], alpha=0.5, **options)
    assert [len(completion) for completion in completions] == [1, 1]
    assert calls["student"] == 1


class TestBlockLength:
    def test_certain_tokens_are_drafted_up_to_the_first_question(self):
        asked = np.array([[0, 0, 0, 1, 0, 0]])
        assert block_length(asked, 0.9, 1.0, 100.0, 0.0) == 3  # the teacher is asked in the next block
        assert block_length(asked[:, 3:], 0.0, 1.0, 100.0, 0.0) == 1

    def test_most_expected_tokens_per_cost(self):
        """By enumerating the lengths; the longest of equally good ones."""
        generator = np.random.default_rng(0)
        lengths = set()
        for kept, teacher_cost, share in product((0.3, 0.8, 0.95), (0.5, 1.0, 12.0), (0.05, 0.3)):
            asked = (generator.random((4, 20)) < share).astype(int)
            asked[0, 7:] = -1
            rates = []
            for length in range(1, 21):
                expected = 0.0
                for row in asked[:, :length]:
                    alive = 1.0
                    for flag in row:
                        expected += alive if flag >= 0 else 0.0
                        alive *= kept if flag == 1 else 1.0
                asks = (asked[:, :length] == 1).any()
                rates.append(expected / (length * (1 + 4 / 16) + asks * teacher_cost * (1 + 4 * length / 16)))
            best = max(length for length, rate in enumerate(rates, 1) if rate > max(rates) - 1e-12)
            assert block_length(asked, kept, 1.0, teacher_cost, 1 / 16) == best
            lengths.add(best)
        assert len(lengths) > 5

    def test_models_that_agree_draft_longer(self):
        asked = np.tile([1, 0, 0, 0, 0], (4, 6))
        lengths = [block_length(asked, kept, 1.0, 8.0, 0.05) for kept in (0.3, 0.8, 0.97)]
        assert lengths == sorted(lengths)
        assert lengths[0] < lengths[-1]


@pytest.mark.parametrize("by_engine", [False, True])
def test_block_lengths_follow_the_tosses_the_verdicts_and_the_sizes_of_the_models(
    monkeypatch: pytest.MonkeyPatch, by_engine: bool
):
    """Both models are uniform, so the teacher keeps every draft; so are those of an engine that is very unsure."""
    found, block, alpha, most = [], 3, 0.4, 10
    monkeypatch.setattr(minillm_trl.rollouts.speculative, "block_length", lambda *own: found.append(own) or block)
    student, teacher = (build_model("gpt2", 10, width=width, layers=1) for width in (8, 16))
    for model in (student, teacher):
        model.get_output_embeddings().weight.data.zero_()
    drafts = EngineDrafts(lambda _, limits, __: [Draft([5] * limit, [-50.0] * limit) for limit in limits])
    options = {
        "max_new_tokens": most,
        "eos_token_ids": [],
        "pad_token_id": 1,
        "mixing": "speculative",
        "batch_size": 2,
    }
    options |= {"drafts": drafts} if by_engine else {}
    keys = [(4, row) for row in range(3)]
    sample_prompts(student, [[3]] * 3, keys=keys, teacher=teacher, alpha=alpha, **options)
    tosses, _ = speculative_numbers(row_coin_keys(None, 0, keys), most)
    can_end = np.ones(tosses.shape, dtype=bool) if by_engine else tosses < alpha
    sizes = [model.num_parameters() for model in (student, teacher)]
    costs = (sizes[0], sum(sizes)) if by_engine else tuple(sizes)
    expected, judged = [], 0
    for rows in (slice(0, 2), slice(2, 3)):
        for start in range(0, most, block):
            asked = np.full((rows.stop - rows.start, 32), -1)
            asked[:, : most - start] = can_end[rows, start:]
            expected.append((asked.tolist(), (7 + judged) / (10 + judged), *costs, 1 / 16))
            judged += can_end[rows, start : start + block].sum()
    assert [(asked.tolist(), *others) for asked, *others in found] == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("teacher=None", {"teacher": None}),
        ("keys=None", {"keys": None}),
        ("on_every_process", {"on_every_process": bool}),
        ("no_repeat_ngram_size=1", {"no_repeat_ngram_size": 1}),
        ("compiled", {"compiled": True}),
    ],
)
def test_arguments_that_speculation_cannot_serve_are_refused(name: str, options: dict):
    student, teacher = (build_model("gpt2", vocab_size=20, seed=seed, width=8, layers=1) for seed in (0, 1))
    if "compiled" in options:
        options = {"compiled": CompiledDecoding(student, "eager")}
    common = {"keys": [(1,)], "max_new_tokens": 4, "eos_token_ids": [], "pad_token_id": 1, "teacher": teacher}
    with pytest.raises(ValueError, match=f"mixing='speculative' does not work with {name}"):
        sample_prompts(student, [[5]], **{**common, "alpha": 0.5, "mixing": "speculative", **options})


@pytest.mark.parametrize("length", [1, 3, 8])
def test_each_token_of_an_engine_is_judged_by_the_number_of_its_place(monkeypatch: pytest.MonkeyPatch, length: int):
    """Both models are uniform and the engine is twice as sure, so a draft is kept if its number is below a half."""
    monkeypatch.setattr(minillm_trl.rollouts.speculative, "block_length", lambda *_: length)
    models = [build_model("gpt2", vocab_size=10, seed=seed, width=8, layers=1) for seed in (0, 1)]
    for model in models:
        model.get_output_embeddings().weight.data.zero_()
    keys, most = [(4, row) for row in range(5)], 20
    drafts = EngineDrafts(lambda _, limits, __: [Draft([5] * limit, [np.log(0.2)] * limit) for limit in limits])
    options = {"max_new_tokens": most, "eos_token_ids": [], "pad_token_id": 1, "mixing": "speculative"}
    sample_prompts(models[0], [[3]] * 5, keys=keys, teacher=models[1], alpha=0.4, drafts=drafts, **options)
    tosses, _ = speculative_numbers(row_coin_keys(None, 0, keys), most)
    kept = int((tosses < np.exp(-MARGIN) / 2).sum())
    assert drafts.take_totals()["rollout/kept_drafts"] == (kept, 5 * most)
