"""An LLM as judge: what it is asked, and the scores of its verdicts, by hand."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from judge_server import answers, verdict

from minillm_trl.data.templates import format_instruction, split_instruction
from minillm_trl.evaluation.judge import (
    PROMPT_SHA256,
    Pair,
    Protocol,
    Scores,
    parse_scores,
    question_text,
    score_pairs,
)
from minillm_trl.evaluation.statistics import bootstrap_ratio


class TestProtocol:
    PAIR = Pair(0, "What is {up}?", "the model's", "the gold")

    def test_judge_reads_the_question_and_both_answers_in_both_orders(self):
        requests = Protocol("judge", 64, {}).requests(self.PAIR)
        assert [request.model_first for request in requests] == [True, False]
        assert [answers(request.body) for request in requests] == [
            ("the model's", "the gold"),
            ("the gold", "the model's"),
        ]
        body = requests[0].body
        assert {key: body[key] for key in ("model", "temperature", "max_tokens")} == {
            "model": "judge",
            "temperature": 0,
            "max_tokens": 64,
        }
        text = body["messages"][1]["content"]
        assert text.startswith("[User Instruction and Input]\nWhat is {up}?\n\n[The Start of Assistant 1's Answer]\n")
        assert (
            "on a scale of 1 to 10, where a higher score indicates better overall performance.\nPlease first" in text
        )
        assert text.endswith("the order in which the responses were presented does not affect your judgment.")

    def test_page_says_how_long_the_prompt_is(self):
        (request,) = Protocol("judge", 64, {}, swap=False).requests(Pair(0, "", "", ""))
        length = sum(len(message["content"]) for message in request.body["messages"])
        assert f" {length:,} characters" in (Path(__file__).parents[2] / "docs" / "judge.md").read_text()

    def test_wording_is_that_of_recorded_verdicts(self):
        # a change makes verdicts incomparable with those before it: change it on purpose only
        assert PROMPT_SHA256 == "710d2387e1fb8a1adeaadec28acc8cc1f75bd179827da5e5050b21f9fba0e41a"

    def test_without_swap_the_model_stands_first_at_every_other_prompt(self):
        protocol = Protocol("judge", 64, {}, swap=False)
        orders = [protocol.requests(Pair(prompt, "q", "a", "b")) for prompt in range(4)]
        assert [[request.model_first for request in requests] for requests in orders] == [
            [True],
            [False],
            [True],
            [False],
        ]

    def test_key_depends_on_all_that_is_asked_and_on_nothing_else(self):
        protocols = [
            Protocol("judge", 64, {}),
            Protocol("other", 64, {}),
            Protocol("judge", 65, {}),
            Protocol("judge", 64, {"seed": 1}),
        ]
        pairs = [self.PAIR, Pair(0, "What?", "the model's", "the gold"), Pair(0, "What is {up}?", "x", "the gold")]
        keys = [request.key for protocol in protocols for pair in pairs for request in protocol.requests(pair)]
        assert len(set(keys)) == len(keys) == 24
        same = Protocol("judge", 64, {}, swap=False).requests(Pair(2, *("What is {up}?", "the model's", "the gold")))
        assert same[0].key == keys[0]

    def test_extra_fields_are_added_and_null_leaves_one_out(self):
        body = Protocol("judge", 64, {"max_tokens": None, "max_completion_tokens": 9}).requests(self.PAIR)[0].body
        assert set(body) == {"model", "messages", "temperature", "max_completion_tokens"}

    @pytest.mark.parametrize(
        ("reply", "scores"),
        [
            ("8 7", (8, 7)),
            ("10 1\nAssistant 1 is better. 3 4", (10, 1)),
            ("\n 8.5\t9 \r\nwhy", (8.5, 9)),
            ("8, 7", (8, 7)),
            ("**8 7**\n", (8, 7)),
            ("<think>\n1 1\n</think>\n\n6 5\nwhy", (6, 5)),
            ("", None),
            ("8", None),
            ("8 7 6", None),
            ("0 7", None),
            ("8 11", None),
            ("8 -7", None),
            ("8/10 7/10", None),
            ("Scores: 8 7", None),
            ("Both are good.\n8 7", None),
            ("<think>\n8 7", None),
            ("nan 7", None),
        ],
    )
    def test_scores_are_two_numbers_from_1_to_10_alone_in_the_first_line(self, reply: str, scores):
        assert parse_scores(reply) == scores

    @pytest.mark.parametrize(("instruction", "context"), [("Say it.\n\n### Response", ""), ("Count.", "a b\n\nc")])
    def test_wrapper_is_taken_off(self, instruction: str, context: str):
        prompt = format_instruction(instruction, context)
        assert split_instruction(prompt) == (instruction, context)
        assert question_text(prompt) == f"{instruction}\n\n{context}".rstrip()

    def test_other_prompts_are_shown_as_they_are(self):
        assert split_instruction("the mill\n") is None
        assert split_instruction(format_instruction("a", "b").replace("### Input:", "### Facts:")) is None
        assert question_text("the mill\n") == "the mill"
        user = {"role": "user", "content": "the mill"}
        assert question_text([user]) == "the mill"
        assert (
            question_text([{"role": "system", "content": "Be short."}, user]) == "system: Be short.\n\nuser: the mill"
        )


class TestScores:
    def score(self, verdicts: list[list[tuple[float, float] | None]], prompts: list[int] | None = None) -> Scores:
        """Scores of pairs from the verdicts in both orders, first that with the model's answer first."""
        protocol = Protocol("judge", 64, {})
        pairs = [Pair((prompts or range(9))[i], "q", f"answer {i}", "gold") for i in range(len(verdicts))]
        keys = [[request.key for request in protocol.requests(pair)] for pair in pairs]
        found = {
            key: verdict(key, scores)
            for i, row in enumerate(verdicts)
            for key, scores in zip(keys[i], row, strict=True)
        }
        return score_pairs(pairs, protocol, found)

    def test_scores_are_means_over_both_orders(self):
        # order 1: the model first, 6 to 8; order 2: the gold first, 9 to 5
        scores = self.score([[(6, 8), (9, 5)]])
        assert scores.per_prompt == [
            {"model": 5.5, "other": 8.5, "win": 0, "tie": 0, "loss": 100, "position": ((6 - 8) + (9 - 5)) / 2}
        ]
        assert scores.summary["ratio"].mean == pytest.approx(100 * 5.5 / 8.5)
        assert scores.counts == {"pairs": 1, "judged": 1, "one_order": 0, "unparsed": 0, "missing": 0}

    def test_ratio_is_of_sums_and_not_the_mean_of_ratios(self):
        scores = self.score([[(2, 4), (4, 2)], [(9, 6), (6, 9)], [(5, 5), (5, 5)]])
        means = {name: interval.mean for name, interval in scores.summary.items()}
        assert means["ratio"] == pytest.approx(100 * (2 + 9 + 5) / (4 + 6 + 5))
        assert (means["model"], means["other"]) == pytest.approx((16 / 3, 15 / 3))
        assert (means["win"], means["tie"], means["loss"]) == pytest.approx((100 / 3,) * 3)
        assert means["position"] == 0

    def test_judge_that_only_looks_at_the_position_is_a_tie_with_the_effect_shown(self):
        scores = self.score([[(8, 5), (8, 5)]] * 3)
        means = {name: interval.mean for name, interval in scores.summary.items()}
        assert means == {"ratio": 100, "model": 6.5, "other": 6.5, "win": 0, "tie": 100, "loss": 0, "position": 3}

    def test_order_without_scores_is_left_out_and_counted(self):
        scores = self.score([[(6, 8), None], [None, None], [(3, 4), (4, 3)]])
        assert [means and (means["model"], means["other"]) for means in scores.per_prompt] == [(6, 8), None, (3, 4)]
        assert "position" not in scores.per_prompt[0]
        assert scores.summary["position"].n == 1
        assert scores.summary["ratio"].mean == pytest.approx(100 * (6 + 3) / (8 + 4))
        assert scores.counts == {"pairs": 3, "judged": 2, "one_order": 1, "unparsed": 3, "missing": 0}

    def test_each_prompt_counts_alike_whatever_the_number_of_its_judged_samples(self):
        scores = self.score([[(2, 4), (4, 2)], [(4, 4), (4, 4)], [None, None], [(9, 3), (3, 9)]], [0, 0, 1, 1])
        assert [(means["model"], means["other"], means["tie"]) for means in scores.per_prompt] == [
            (3, 4, 50),
            (9, 3, 0),
        ]
        assert scores.summary["ratio"].mean == pytest.approx(100 * (3 + 9) / (4 + 3))
        assert scores.summary["ratio"].n == 2

    def test_nothing_judged_has_no_summary(self):
        assert self.score([[None, None]]).summary == {}


class TestBootstrapRatio:
    def test_interval_is_that_of_all_resamples(self):
        values, baseline = [2.0, 9.0, 5.0], [4.0, 6.0, 8.0]
        every = [
            100 * sum(values[i] for i in rows) / sum(baseline[i] for i in rows) for rows in product(range(3), repeat=3)
        ]
        result = bootstrap_ratio(values, baseline)
        assert result.mean == pytest.approx(100 * 16 / 18)
        assert (result.low, result.high) == pytest.approx((min(every), max(every)))  # 1 of 27 is more than 2.5 %
        assert result.n == 3

    def test_proportional_scores_have_no_spread(self):
        result = bootstrap_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
        assert result[:3] == pytest.approx((50, 50, 50))
        assert result.standard_error == pytest.approx(0, abs=1e-12)

    def test_standard_error_is_the_spread_of_slow_resampling(self):
        generator = np.random.default_rng(1)
        values, baseline = generator.uniform(1, 10, 200), generator.uniform(5, 10, 200)
        ratios = []
        for _ in range(4000):
            rows = generator.integers(200, size=200)
            ratios.append(100 * values[rows].sum() / baseline[rows].sum())
        result = bootstrap_ratio(values, baseline)
        assert result.standard_error == pytest.approx(np.std(ratios), rel=0.05)
        assert (result.low, result.high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), rel=0.01)

    def test_standard_error_of_two_prompts_divides_by_the_degrees_of_freedom(self):
        # residuals -1 and 1: their standard deviation is sqrt(2), that of their mean 1, and the baseline's mean is 2
        assert bootstrap_ratio([1.0, 3.0], [2.0, 2.0]).standard_error == pytest.approx(50.0)

    @pytest.mark.parametrize(("values", "baseline"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
    def test_what_has_no_ratio_is_refused(self, values: list[float], baseline: list[float]):
        with pytest.raises(ValueError, match="bootstrap_ratio needs"):
            bootstrap_ratio(values, baseline)
