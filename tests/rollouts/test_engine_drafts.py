"""Mixing with drafts of an engine whose probabilities differ from the student's, by enumeration and by statistics."""

import math

import pytest
import torch
from conftest import build_model
from kept_states import check_kept_states
from test_sampling import EOS, HORIZON, LONG_PROMPTS, PROMPTS, distance, mixture_law, tiny

import minillm_trl.models.fused_head
import minillm_trl.rollouts.engine_drafts
import minillm_trl.rollouts.speculative
from minillm_trl.errors import UserError
from minillm_trl.rollouts.engine_drafts import Draft, EngineDrafts, Verdicts, judge_engine_drafts
from minillm_trl.rollouts.keyed_random import keyed_uniforms
from minillm_trl.rollouts.sampling import sample_prompts
from minillm_trl.rollouts.speculative import judge_drafts


class StandIn:
    """Draws segments as an engine does, from a model's distribution times `tilt` `(V,)`."""

    def __init__(self, model, ends: list[int], temperature: float = 1.0, tilt: torch.Tensor | None = None):
        self.model, self.ends, self.temperature, self.tilt = model, ends, temperature, tilt
        self.known: dict[tuple[int, ...], torch.Tensor] = {}
        self.calls: list[tuple[list[list[int]], list[int]]] = []
        self.seeds: list[int] = []

    @torch.no_grad()
    def probs(self, text: tuple[int, ...]) -> torch.Tensor:
        if text not in self.known:
            logits = self.model(torch.tensor([text]), use_cache=False).logits[0, -1].double()
            weights = torch.softmax(logits / self.temperature, -1)
            weights = weights if self.tilt is None else weights * self.tilt
            self.known[text] = weights / weights.sum()
        return self.known[text]

    def __call__(self, texts: list[list[int]], limits: list[int], seeds: list[int]) -> list[Draft]:
        self.calls.append((texts, limits))
        self.seeds += seeds
        drafts = []
        for text, limit, seed in zip(texts, limits, seeds, strict=True):
            tokens, logps = [], []
            for number in keyed_uniforms(limit, seed):
                probs = self.probs((*text, *tokens))
                tokens.append(min(int((probs.cumsum(0) <= number).sum()), len(probs) - 1))
                logps.append(float(probs[tokens[-1]].log()))
                if tokens[-1] in self.ends:
                    break
            drafts.append(Draft(tokens, logps))
        return drafts


def random_laws(size: int, gap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits of p and q, and q', whose log-probs are at most `gap` away from q's."""
    teacher, student, noise = 1.5 * torch.randn(3, size, dtype=torch.float64)
    engine = torch.softmax(student, -1) * torch.exp(gap / 2 * torch.tanh(noise))
    return teacher, student, engine / engine.sum()


def judge(teacher, student, draft: int, logp: float, verdict: float, replacement: float, **options):
    numbers = (torch.tensor([number], dtype=torch.float64) for number in (logp, verdict, replacement))
    return judge_engine_drafts(
        teacher[None], student[None], torch.tensor([draft]), *numbers, temperature=1.0, **options
    )


def exact_law(teacher, student, engine, alpha: float, margin: float) -> tuple[torch.Tensor, float]:
    """Return the probability of each token, and the mean of the measured excess, over the drafts of `engine`.

    Adds the lengths of the intervals of the numbers that lead to a token, whose bounds are tried on both sides.
    """
    p, q = (torch.softmax(logits, -1) for logits in (teacher, student))
    common = math.exp(-margin) * ((1 - alpha) * q + alpha * torch.minimum(p, q))
    residual = alpha * p + (1 - alpha) * q - common
    bounds = [0.0, *(residual / residual.sum()).cumsum(0).tolist()]
    law, excess, side = torch.zeros_like(q), 0.0, 1e-9
    options = {"alpha": alpha, "margin": margin}
    for draft, probability in enumerate(engine.tolist()):
        logp, threshold = math.log(probability), min(1.0, (common[draft] / probability).item())
        for verdict, expected in ((threshold - side, True), (threshold + side, False)):
            if verdict < 1.0:
                found = judge(teacher, student, draft, logp, verdict, 0.5, **options)
                assert found.kept.item() == expected
                excess += probability * found.excess.item() * expected
                assert found.gaps.item() == pytest.approx(abs(logp - q[draft].log().item()), abs=1e-12)
        law[draft] += probability * threshold
        if threshold == 1.0:
            continue
        for token in range(len(q)):
            for number in (bounds[token] + side, bounds[token + 1] - side):
                found = judge(teacher, student, draft, logp, threshold + side, number, **options)
                assert (found.kept.item(), found.tokens.item()) == (False, token)
            law[token] += probability * (1 - threshold) * (bounds[token + 1] - bounds[token])
    return law, excess


class TestLaw:
    """Of one token: draft y from q', keep it with probability min(1, g(y)/q'(y)), else replace it."""

    @pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
    def test_token_follows_the_mixture_exactly_within_the_margin(self, alpha: float):
        torch.manual_seed(0)
        for _ in range(10):
            teacher, student, engine = random_laws(5, gap=0.3)
            law, excess = exact_law(teacher, student, engine, alpha, margin=0.3)
            p, q = (torch.softmax(logits, -1) for logits in (teacher, student))
            assert (engine - q).abs().max() > 0.01
            torch.testing.assert_close(law, alpha * p + (1 - alpha) * q, rtol=0, atol=1e-12)
            assert excess == 0.0

    def test_beyond_the_margin_drafts_bound_the_distance(self):
        torch.manual_seed(0)
        distances = []
        for _ in range(10):
            teacher, student, engine = random_laws(5, gap=0.6)
            law, excess = exact_law(teacher, student, engine, 0.4, margin=0.05)
            p, q = (torch.softmax(logits, -1) for logits in (teacher, student))
            found = (law - 0.4 * p - 0.6 * q).abs().sum().item() / 2
            common = math.exp(-0.05) * (0.6 * q + 0.4 * torch.minimum(p, q))
            assert excess == pytest.approx((common - engine).clamp(min=0).sum().item(), rel=1e-9)
            assert found <= excess + 1e-12
            distances.append(found)
        assert max(distances) > 0.02

    def test_without_a_mismatch_these_are_the_rules_of_speculative_mixing(self):
        torch.manual_seed(0)
        teacher, student = torch.randn(2, 500, 6, dtype=torch.float64)
        drafts, verdicts = torch.randint(6, (500,)), torch.rand(500, dtype=torch.float64)
        numbers, logps = torch.rand(500, dtype=torch.float64), torch.log_softmax(student, -1)
        found = judge_engine_drafts(
            teacher,
            student,
            drafts,
            logps.gather(1, drafts[:, None])[:, 0],
            verdicts,
            numbers,
            alpha=1.0,
            temperature=1.0,
            margin=1e-12,
        )
        kept, tokens = judge_drafts(teacher, student, drafts, verdicts, numbers, 1.0)
        assert torch.equal(found.kept, kept)
        assert torch.equal(found.tokens, tokens)
        assert 0.2 < kept.double().mean() < 0.8

    def test_token_with_an_infinite_log_prob_is_replaced(self):
        logits = torch.zeros(3, dtype=torch.float64)
        found = judge(logits, logits, 0, math.inf, 0.0, 0.9, alpha=0.5, margin=0.1)
        assert (found.kept.item(), found.tokens.item(), found.excess.item()) == (False, 2, 0.0)

    def test_temperature_divides_the_logits_of_both_models_in_float32(self):
        torch.manual_seed(0)
        teacher, student = torch.randn(2, 200, 6).bfloat16()
        numbers = torch.rand(3, 200, dtype=torch.float64)
        drafts, logps = torch.randint(6, (200,)), numbers[0].log()

        def judged(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> Verdicts:
            options = {"alpha": 0.6, "temperature": temperature, "margin": 0.1}
            return judge_engine_drafts(teacher, student, drafts, logps, numbers[1], numbers[2], **options)

        found, expected = judged(teacher, student, 0.7), judged(teacher.float() / 0.7, student.float() / 0.7, 1.0)
        assert 20 < found.kept.sum() < 180
        assert (found.excess >= 0).all()
        for part, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(part, reference)
        assert not torch.equal(judged(teacher, student, 1.0).gaps, found.gaps)


def samples(engine, student, teacher, alpha: float, rows: int = 2400, slots: int | None = None, **options):
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
        drafts=engine if engine is None else EngineDrafts(engine),
        **options,
    )
    counts: dict[tuple, float] = {}
    for completion in completions[1:]:
        counts[tuple(completion)] = counts.get(tuple(completion), 0.0) + 1 / rows
    return counts


def flat(seed: int, family: str = "gpt2"):
    """Build a tiny model whose next token is uncertain, so that a tilt changes its distribution."""
    model = tiny(seed, family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.25)
    return model


TILT = torch.tensor([1.5, 1.0, 0.7], dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize(("family", "slots"), [("gpt2", None), ("llama", 300)])
def test_samples_follow_the_mixture_and_not_the_engine(
    monkeypatch: pytest.MonkeyPatch, family: str, slots: int | None
):
    monkeypatch.setattr(minillm_trl.rollouts.engine_drafts, "MARGIN", 0.9)  # the tilt's largest change is below
    student, teacher, alpha = flat(0, family), tiny(1, family), 0.4
    counts = samples(StandIn(student, [EOS], tilt=TILT), student, teacher, alpha, slots=slots)
    assert distance(counts, mixture_law(student, teacher, PROMPTS[1], alpha, 1.0)) < 0.05
    for other in (0.0, 1.0):
        assert distance(counts, mixture_law(student, teacher, PROMPTS[1], other, 1.0)) > 0.08


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_margin_that_is_too_small_leaves_the_engines_tilt(monkeypatch: pytest.MonkeyPatch, family: str):
    student, teacher, alpha = flat(0, family), tiny(1, family), 0.05
    law = mixture_law(student, teacher, PROMPTS[1], alpha, 1.0)
    found = {}
    for margin in (0.02, 0.9):
        monkeypatch.setattr(minillm_trl.rollouts.engine_drafts, "MARGIN", margin)
        found[margin] = distance(samples(StandIn(student, [EOS], tilt=TILT), student, teacher, alpha), law)
    assert found[0.9] < 0.05
    assert found[0.02] > 0.06


@torch.no_grad()
def test_temperature_and_tokens_outside_the_shared_vocabulary():
    student, teacher = tiny(0), tiny(1)
    larger = build_model("gpt2", vocab_size=5, seed=2, width=8, layers=1).double()
    larger.transformer.load_state_dict(
        {
            name: torch.cat([value, value[:2]]) if name == "wte.weight" else value
            for name, value in student.transformer.state_dict().items()
        }
    )
    larger.tie_weights()
    engine = StandIn(larger, [EOS], temperature=0.7)
    assert engine.probs((1,))[3:].sum() > 0.1
    counts = samples(engine, student, teacher, 0.4, temperature=0.7)
    student_law = mixture_law(student, teacher, PROMPTS[1], 0.4, 0.7)
    assert counts.keys() <= student_law.keys()
    # the engine's other tokens are a mismatch that the margin is too small for
    assert distance(counts, student_law) < 0.2


def test_a_token_outside_the_shared_vocabulary_is_always_replaced():
    student, outside = tiny(0), 3
    drafts = EngineDrafts(lambda texts, limits, seeds: [Draft([outside], [-9.0]) for _ in texts])
    completions = sample_prompts(
        student,
        [PROMPTS[1]] * 50,
        keys=[(0, row) for row in range(50)],
        max_new_tokens=HORIZON,
        eos_token_ids=[EOS],
        pad_token_id=1,
        teacher=tiny(1),
        alpha=0.4,
        mixing="speculative",
        drafts=drafts,
    )
    assert drafts.take_totals()["rollout/kept_drafts"] == (0.0, sum(map(len, completions)))
    assert {token for completion in completions for token in completion} == {0, 1, 2}


def sample(family: str, batch_size: int | None, drafts: EngineDrafts | None = None, alpha: float = 0.4, **options):
    student = build_model(family, vocab_size=50, width=16, layers=2)
    return sample_prompts(
        student,
        LONG_PROMPTS,
        keys=[(7, sum(prompt)) for prompt in LONG_PROMPTS],
        max_new_tokens=24,
        eos_token_ids=[0, 3],
        pad_token_id=1,
        batch_size=batch_size,
        alpha=alpha,
        teacher=build_model(family, vocab_size=50, seed=1, width=16, layers=2),
        **{"mixing": "speculative", "drafts": drafts or EngineDrafts(StandIn(student, [0, 3])), **options},
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom"])
def test_with_segments_of_one_length_a_completion_does_not_depend_on_other_rows(monkeypatch, family: str):
    monkeypatch.setattr(minillm_trl.rollouts.speculative, "block_length", lambda *_: 5)
    alone = sample(family, batch_size=1)
    assert len({len(completion) for completion in alone}) > 3  # rows finish at different steps
    assert sample(family, batch_size=5) == sample(family, batch_size=12) == alone


def test_engine_reads_the_rows_so_far_and_no_seed_comes_twice():
    student = build_model("llama", vocab_size=50, width=16, layers=2)
    engine = StandIn(student, [0, 3])
    completions = sample("llama", 12, EngineDrafts(engine))
    assert len(engine.seeds) == len({*engine.seeds})
    whole = [tuple(prompt + completion) for prompt, completion in zip(LONG_PROMPTS, completions, strict=True)]
    for texts, limits in engine.calls:
        for text, limit in zip(texts, limits, strict=True):
            [row] = [row for row, ids in enumerate(whole) if ids[: len(text)] == tuple(text)]
            assert 1 <= limit <= len(LONG_PROMPTS[row]) + 24 - len(text)
    assert engine.calls[0][0] == sorted(LONG_PROMPTS, key=len, reverse=True)


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


def test_totals_of_an_engine_that_is_off():
    student, teacher = flat(0), tiny(1)
    found = {}
    for name, tilt in (("own", None), ("tilted", TILT)):
        drafts = EngineDrafts(StandIn(student, [EOS], tilt=tilt))
        sample_prompts(
            student,
            [PROMPTS[1]] * 200,
            keys=[(0, row) for row in range(200)],
            max_new_tokens=HORIZON,
            eos_token_ids=[EOS],
            pad_token_id=1,
            teacher=teacher,
            alpha=0.4,
            mixing="speculative",
            drafts=drafts,
        )
        found[name] = {metric: total / count for metric, (total, count) in drafts.take_totals().items() if metric}
        assert drafts.take_totals()["rollout/kept_drafts"] == (0.0, 0.0)
    gap, distance_, kept = "sampling/sampling_logp_difference/mean", "rollout/mixture_distance", "rollout/kept_drafts"
    assert found["own"][gap] < 1e-9
    assert found["own"][distance_] == 0.0
    assert 0.1 < found["tilted"][gap] < 0.5
    assert 0.002 < found["tilted"][distance_] < 0.05
    assert 0.8 < found["tilted"][kept] < 0.98


def test_totals_are_sums_until_they_are_taken():
    drafts = EngineDrafts(lambda *_: [])

    def note(kept: list[bool], excess: list[float], gaps: list[float]) -> None:
        drafts.note(Verdicts(torch.tensor(kept), torch.zeros(len(kept)), torch.tensor(excess), torch.tensor(gaps)))

    note([True, False, True], [0.25, 0.0, 0.5], [0.125, math.inf, 0.5])
    note([True, True], [0.0, 0.0], [0.25, 0.0])
    note([False], [0.0], [math.inf])  # of a token outside the student's vocabulary
    gap = "sampling/sampling_logp_difference"
    totals = {"rollout/kept_drafts": (4.0, 6.0), "rollout/mixture_distance": (0.75, 6.0)}
    totals |= {f"{gap}/mean": (0.875, 4.0), f"{gap}/max": (0.5, 4.0)}
    assert drafts.take_totals() == totals
    assert drafts.take_totals() == dict.fromkeys(totals, (0.0, 0.0))
    note([True], [0.0], [0.25])
    assert drafts.take_totals()[f"{gap}/max"] == (0.25, 1.0)


@pytest.mark.parametrize("slots", [None, 2])
def test_drafts_that_the_engine_hardly_ever_draws_are_all_kept(monkeypatch: pytest.MonkeyPatch, slots: int | None):
    """Its log-probs are far below those of both models, so the completions are those that it counts up to an end."""
    end, vocab_size, judged = 15, 20, []
    monkeypatch.setattr(minillm_trl.models.fused_head, "CHUNK_ELEMENTS", 2 * vocab_size)  # logits in memory

    def judge_part(logits: torch.Tensor, *arguments, **options) -> Verdicts:
        judged.append(len(logits))
        return judge_engine_drafts(logits, *arguments, **options)

    monkeypatch.setattr(minillm_trl.rollouts.engine_drafts, "judge_engine_drafts", judge_part)
    student, teacher = (build_model("llama", vocab_size, seed, width=8, layers=1) for seed in (0, 1))

    def count_up(texts: list[list[int]], limits: list[int], seeds: list[int]) -> list[Draft]:
        drafts = []
        for text, limit in zip(texts, limits, strict=True):
            tokens = list(range(text[-1] + 1, min(text[-1] + limit, end) + 1))
            assert 1 <= limit <= 10
            drafts.append(Draft(tokens, [-50.0] * len(tokens)))
        assert all(0 <= seed < 2**63 for seed in seeds)
        return drafts

    drafts = EngineDrafts(count_up)
    prompts = [[5, 5, 12], [3], [1, 2], [14]]
    options = {"keys": [(row,) for row in range(4)], "max_new_tokens": 10, "eos_token_ids": [end], "pad_token_id": 1}
    options |= {"teacher": teacher, "alpha": 0.5, "mixing": "speculative", "drafts": drafts}
    completions = sample_prompts(student, prompts, **options, batch_size=slots)
    assert completions == [[13, 14, 15], list(range(4, 14)), list(range(3, 13)), [15]]
    assert drafts.take_totals()["rollout/kept_drafts"] == (24.0, 24.0)
    assert (max(judged), sum(judged)) == (2, 24)


def test_drafts_without_speculative_mixing_are_refused():
    with pytest.raises(UserError, match="mixing='coins' does not use drafts"):
        sample("gpt2", 4, mixing="coins")
