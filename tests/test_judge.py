"""An LLM as judge: the protocol by hand, and the client against a local server that fails in every way."""

import json
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import conftest
import numpy as np
import pytest
from evaluation_results import SETTINGS

from minillm_trl.cli import main
from minillm_trl.data.templates import format_instruction, split_instruction
from minillm_trl.evaluation.chat_client import ChatClient, ChatError, RequestRefused, check_base_url
from minillm_trl.evaluation.judge import (
    PROMPT_SHA256,
    Pair,
    Protocol,
    Scores,
    parse_scores,
    question_text,
    score_pairs,
)
from minillm_trl.evaluation.metrics import bootstrap_ratio
from minillm_trl.evaluation.verdicts import MAX_ASKED, MAX_REFUSED, Verdict, collect_verdicts, read_verdicts

KEY = "sk-secret-1234567890"
DROP, SLOW = "drop", "slow"  # what a scripted server does in place of an answer


class Server(ThreadingHTTPServer):
    """An endpoint that first follows `script` (statuses, texts of replies, DROP, SLOW), then answers `reply(body)`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.script: list = []
        self.reply: Callable[[dict], object] = by_quality
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            step = self.server.script.pop(0) if self.server.script else self.server.reply(body)
        if self.path != "/v1/chat/completions":
            step = (404, {}, "no such path")
        if step == DROP:
            return
        if step == SLOW:
            time.sleep(0.6)
            step = "1 1"
        if isinstance(step, int):
            step = (step, {}, json.dumps({"error": {"message": f"said to {self.headers['Authorization']}"}}))
        status, headers, text = step if isinstance(step, tuple) else (200, {}, completion(step))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def completion(text: str | None) -> str:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    return json.dumps({"model": "judge-2030", "choices": [{"message": message}], "usage": usage})


def answers(body: dict) -> tuple[str, str]:
    """The two answers in the order in which the judge reads them."""
    text = body["messages"][-1]["content"]
    return tuple(re.search(rf"Start of Assistant {n}'s Answer\]\n(.*?)\n\n\[The End", text, re.S)[1] for n in (1, 2))


def by_quality(body: dict) -> str:
    """An answer's score is the number that it ends with; the one that stands first gets one more."""
    first, second = (int(answer.split()[-1]) for answer in answers(body))
    return f"{first + 1} {second}\nAssistant 1 stands first."


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(conftest.ENVIRONMENT, "NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def write_run(
    folder: Path, samples: dict[str, list[str]], reference: str | None = "gold 8", task: str = "dolly"
) -> Path:
    """A run of `evaluate`: the answers to each instruction, one a sampling seed."""
    folder.mkdir(parents=True)
    settings = {**SETTINGS, "dataset": f"data/{task}", "prompts": len(samples)}
    results = {"settings": settings, "summary": {}, "per_prompt": [{} for _ in samples]}
    results |= {"by_seed": {}, "corpus": {}, "buckets": [], "exposure_bias": None, "calibration": None}
    (folder / "results.json").write_text(json.dumps(results))
    references = [] if reference is None else [reference, "another 1"]
    rows = [
        {"prompt": format_instruction(question), "references": references, "outputs": outputs}
        for question, outputs in samples.items()
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def verdict(key: str, scores: tuple[float, float] | None, **values) -> Verdict:
    fields = {"reply": "", "asked": 1, "retries": 0, "model": None, "prompt_tokens": 0, "completion_tokens": 0}
    return Verdict(key, scores, **{**fields, **values})


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
        assert f" {length:,} characters" in (Path(__file__).parents[1] / "docs" / "judge.md").read_text()

    def test_wording_is_that_of_recorded_verdicts(self):
        # a change makes verdicts incomparable with those before it: change it on purpose only
        assert PROMPT_SHA256 == "710d2387e1fb8a1adeaadec28acc8cc1f75bd179827da5e5050b21f9fba0e41a"

    def test_without_swap_the_model_stands_first_at_every_other_prompt(self):
        protocol = Protocol("judge", 64, {}, swap=False)
        orders = [protocol.requests(Pair(prompt, "q", "a", "b")) for prompt in range(4)]
        assert [[request.model_first for request in each] for each in orders] == [[True], [False], [True], [False]]

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
            key: verdict(key, each) for i, row in enumerate(verdicts) for key, each in zip(keys[i], row, strict=True)
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
        assert [each and (each["model"], each["other"]) for each in scores.per_prompt] == [(6, 8), None, (3, 4)]
        assert "position" not in scores.per_prompt[0]
        assert scores.summary["position"].n == 1
        assert scores.summary["ratio"].mean == pytest.approx(100 * (6 + 3) / (8 + 4))
        assert scores.counts == {"pairs": 3, "judged": 2, "one_order": 1, "unparsed": 3, "missing": 0}

    def test_each_prompt_counts_alike_whatever_the_number_of_its_judged_samples(self):
        scores = self.score([[(2, 4), (4, 2)], [(4, 4), (4, 4)], [None, None], [(9, 3), (3, 9)]], [0, 0, 1, 1])
        assert [(each["model"], each["other"], each["tie"]) for each in scores.per_prompt] == [(3, 4, 50), (9, 3, 0)]
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

    @pytest.mark.parametrize(("values", "baseline"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
    def test_what_has_no_ratio_is_refused(self, values: list[float], baseline: list[float]):
        with pytest.raises(ValueError, match="bootstrap_ratio needs"):
            bootstrap_ratio(values, baseline)


class TestClient:
    BODY = {"model": "judge", "messages": [{"role": "user", "content": "hello"}]}  # noqa: RUF012

    def ask(self, server: Server, script: list, **options) -> tuple[object, list[float]]:
        """The reply or the error, and how long it would have waited."""
        server.script, server.reply = list(script), lambda _: "8 7"
        waits: list[float] = []
        with ChatClient(server.url, KEY, sleep=waits.append, **options) as client:
            try:
                return client.complete(self.BODY), waits
            except ChatError as error:
                return error, waits

    def test_request_carries_body_and_key_and_the_reply_its_tokens(self, server: Server):
        reply, waits = self.ask(server, [])
        assert server.bodies == [self.BODY]
        assert server.keys == [f"Bearer {KEY}"]
        assert (reply.text, reply.model, reply.prompt_tokens, reply.completion_tokens) == ("8 7", "judge-2030", 100, 7)
        assert (reply.retries, waits) == (0, [])

    def test_without_a_key_none_is_sent(self, server: Server):
        server.reply = lambda _: "8 7"
        with ChatClient(server.url) as client:
            client.complete(self.BODY)
        assert server.keys == [None]

    @pytest.mark.parametrize(
        "failure",
        [
            408,
            429,
            500,
            503,
            DROP,
            SLOW,
            (200, {}, "<html>not JSON</html>"),
            (200, {}, '{"choices": [{"mess'),
            (200, {}, '{"choices": []}'),
            (200, {}, '{"choices": [{"message": {"content": 8}}]}'),
            (200, {}, '["choices"]'),
        ],
        ids=str,
    )
    def test_failure_that_may_pass_is_tried_again(self, server: Server, failure):
        reply, waits = self.ask(server, [failure, failure], timeout=0.3)
        assert (reply.text, reply.retries) == ("8 7", 2)
        assert len(server.bodies) == 3
        assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2

    def test_waits_double_up_to_a_minute_and_end_after_the_last_retry(self, server: Server):
        error, waits = self.ask(server, [500] * 20, max_retries=8)
        assert len(server.bodies) == 9
        bounds = [1, 2, 4, 8, 16, 32, 60, 60]
        assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
        assert "failed 9 times, last with HTTP 500, 'said to Bearer (key)'" in str(error)

    def test_endpoint_that_does_not_answer_in_time_is_named(self, server: Server):
        error, _ = self.ask(server, [SLOW], timeout=0.3, max_retries=0)
        assert "last with no answer within 0.3 s." in str(error)

    def test_waits_differ_from_each_other(self, server: Server):
        assert len({self.ask(server, [429], max_retries=1)[1][0] for _ in range(5)}) == 5

    def test_server_s_own_wait_is_kept_to(self, server: Server):
        _, waits = self.ask(server, [(429, {"Retry-After": "7"}, ""), (503, {"Retry-After": "0"}, "")])
        assert 7 <= waits[0] <= 8
        assert 0 <= waits[1] <= 1
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
        _, waits = self.ask(server, [(429, {"Retry-After": date}, "")])
        assert 95 <= waits[0] <= 101
        _, waits = self.ask(server, [(429, {"Retry-After": "soon"}, "")])
        assert 0.5 <= waits[0] <= 1

    def test_server_that_asks_for_an_hour_is_not_waited_for(self, server: Server):
        error, waits = self.ask(server, [(429, {"Retry-After": "3600"}, "slow down")])
        assert "asks to wait for 3600 s (HTTP 429, 'slow down')" in str(error)
        assert (len(server.bodies), waits) == (1, [])

    @pytest.mark.parametrize(
        ("status", "message"),
        [
            (401, "rejected the API key: HTTP 401, 'said to Bearer (key)'. Check the key in OPENAI_API_KEY."),
            (403, "rejected the API key: HTTP 403"),
            (404, "does not exist, or has no model 'judge': HTTP 404"),
            (302, "does not answer as an OpenAI-compatible endpoint: HTTP 302"),
            (405, "does not answer as an OpenAI-compatible endpoint: HTTP 405"),
        ],
    )
    def test_refusal_of_all_fails_at_once(self, server: Server, status: int, message: str):
        error, waits = self.ask(server, [status])
        assert message in str(error)
        assert KEY not in repr(error)
        assert not isinstance(error, RequestRefused)
        assert (len(server.bodies), waits) == (1, [])

    def test_redirect_is_not_followed(self, server: Server):
        error, _ = self.ask(server, [(307, {"Location": f"{server.url}/chat/completions"}, "")])
        assert "does not answer as an OpenAI-compatible endpoint: HTTP 307" in str(error)
        assert len(server.bodies) == 1

    def test_missing_key_is_named(self, server: Server):
        server.script = [401]
        with ChatClient(server.url) as client, pytest.raises(ChatError, match="No key was sent: set OPENAI_API_KEY"):
            client.complete(self.BODY)

    @pytest.mark.parametrize("status", [400, 413, 422])
    def test_refusal_of_a_request_is_told_apart(self, server: Server, status: int):
        error, waits = self.ask(server, [status])
        assert isinstance(error, RequestRefused)
        assert (len(server.bodies), waits) == (1, [])

    def test_endpoint_that_is_down_is_named(self, server: Server):
        waits: list[float] = []
        message = r"127.0.0.1:9/v1/chat/completions failed 3 times, last with ConnectError"
        with (
            ChatClient("http://127.0.0.1:9/v1", max_retries=2, sleep=waits.append) as client,
            pytest.raises(ChatError, match=message),
        ):
            client.complete(self.BODY)
        assert len(waits) == 2

    def test_stop_ends_the_waiting(self, server: Server):
        server.script = [(429, {"Retry-After": "200"}, "")]
        with ChatClient(server.url) as client:
            threading.Timer(0.2, client.stop).start()
            with pytest.raises(ChatError, match="stopped before"):
                client.complete(self.BODY)
        assert len(server.bodies) == 1

    def test_reply_without_text_is_an_empty_one(self, server: Server):
        assert self.ask(server, [None])[0].text == ""

    def test_key_is_struck_out_of_replies_and_of_long_messages(self, server: Server):
        assert self.ask(server, [f"8 7\nYour key is {KEY}."])[0].text == "8 7\nYour key is (key)."
        error, _ = self.ask(server, [(400, {}, "x" * 195 + KEY)])  # cutting first would leave a part of it
        assert "sk-" not in str(error)

    @pytest.mark.parametrize("key", [f"{KEY}\nx", f"Bearer {KEY}", f"{KEY}é"])
    def test_key_that_no_header_carries_is_refused_unseen(self, key: str):
        with pytest.raises(ValueError, match="MY_KEY holds characters that no HTTP header carries") as caught:
            ChatClient("http://127.0.0.1/v1", key, key_name="MY_KEY")
        assert KEY not in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("localhost:8000/v1", "no http or https address"),
            ("ftp://host/v1", "no http or https address"),
            ("http:///v1", "no http or https address"),
            ("http://host:port/v1", "is no address"),
            (f"http://user:{KEY}@host/v1", "must end with its path"),
            (f"http://host/v1?key={KEY}", "must end with its path"),
            ("http://host/v1/chat/completions/", "leave out /chat/completions"),
        ],
    )
    def test_address_that_cannot_be_used_is_refused_without_its_secrets(self, url: str, message: str):
        with pytest.raises(ValueError, match=message) as caught:
            check_base_url(url)
        assert KEY not in str(caught.value)
        assert check_base_url("https://host/v1/") == "https://host/v1"


class TestVerdicts:
    def collect(self, server: Server, path: Path, count: int, concurrency: int = 1, parse=parse_scores):
        requests = {f"k{i}": {"model": "judge", "messages": [], "number": i} for i in range(count)}
        with ChatClient(server.url, sleep=lambda _: None, max_retries=2) as client:
            return collect_verdicts(requests, path, client, parse, concurrency=concurrency, progress=False)

    def numbers(self, server: Server) -> list[int]:
        return [body["number"] for body in server.bodies]

    def test_each_is_asked_once_in_all_runs(self, server: Server, tmp_path: Path):
        server.reply = lambda body: f"{body['number'] + 1} 9\nwhy"
        verdicts, refused = self.collect(server, tmp_path / "new" / "verdicts.jsonl", 3, concurrency=3)
        assert {key: each.scores for key, each in verdicts.items()} == {"k0": (1, 9), "k1": (2, 9), "k2": (3, 9)}
        assert refused == {}
        assert verdicts["k1"] == verdict(
            "k1", (2, 9), reply="2 9\nwhy", model="judge-2030", prompt_tokens=100, completion_tokens=7
        )
        assert self.collect(server, tmp_path / "new" / "verdicts.jsonl", 3) == (verdicts, {})
        assert sorted(self.numbers(server)) == [0, 1, 2]
        more, _ = self.collect(server, tmp_path / "new" / "verdicts.jsonl", 5)
        assert self.numbers(server)[3:] == [3, 4]
        assert len(more) == 5

    def test_reply_without_scores_is_asked_for_again_and_given_up(self, server: Server, tmp_path: Path):
        server.script = [500, "I cannot say.", "8 7", "Hm.", "Hm!", "No."]
        verdicts, _ = self.collect(server, tmp_path / "verdicts.jsonl", 2)
        assert self.numbers(server) == [0, 0, 0, 1, 1, 1]
        assert [(each.scores, each.reply, each.asked, each.retries) for each in verdicts.values()] == [
            ((8, 7), "8 7", 2, 1),
            (None, "No.", MAX_ASKED, 0),
        ]
        assert verdicts["k1"].prompt_tokens == 300
        assert self.collect(server, tmp_path / "verdicts.jsonl", 2)[0] == verdicts  # unparsed ones are kept too
        assert len(server.bodies) == 6

    def test_reply_that_ends_in_half_a_character_is_kept(self, server: Server, tmp_path: Path):
        server.script = ["8 7\nGood \ud83d", "8 7\nè\u2028"]
        verdicts, _ = self.collect(server, tmp_path / "verdicts.jsonl", 2)
        assert verdicts["k0"].reply == "8 7\nGood \ud83d"
        assert read_verdicts(tmp_path / "verdicts.jsonl") == verdicts

    def test_torn_last_line_is_dropped_and_asked_for_again(self, server: Server, tmp_path: Path):
        server.reply = lambda _: "8 7"
        path = tmp_path / "verdicts.jsonl"
        self.collect(server, path, 2)
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        assert list(read_verdicts(path)) == ["k0"]
        server.bodies.clear()
        assert len(self.collect(server, path, 2)[0]) == 2
        assert self.numbers(server) == [1]
        assert path.read_bytes() == whole

    @pytest.mark.parametrize("line", ["{", "[]", '{"key": "k0"}', '{"key": "k0", "scores": 8}', "\udcff"])
    def test_broken_line_is_named(self, tmp_path: Path, line: str):
        path = tmp_path / "verdicts.jsonl"
        good = json.dumps({"key": "k", "scores": [1, 2], "reply": "", "asked": 1, "retries": 0, "model": None})
        good = good[:-1] + ', "prompt_tokens": 1, "completion_tokens": 1}'
        path.write_bytes(f"{good}\n{line}\n{good}\n".encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"verdicts.jsonl:2: no verdict of a judge .* Delete this line"):
            read_verdicts(path)

    def test_endpoint_that_fails_in_the_middle_loses_nothing(self, server: Server, tmp_path: Path):
        path = tmp_path / "verdicts.jsonl"
        server.script = ["1 2", "3 4", 500, 500, 500]
        with pytest.raises(
            ChatError, match=r"failed 3 times.* 2 of 6 verdicts are in .*verdicts.jsonl; the same comm"
        ):
            self.collect(server, path, 6)
        assert [each.scores for each in read_verdicts(path).values()] == [(1, 2), (3, 4)]
        server.bodies.clear()
        server.script, server.reply = [], lambda _: "5 6"
        assert len(self.collect(server, path, 6)[0]) == 6
        assert self.numbers(server) == [2, 3, 4, 5]

    def test_answers_on_their_way_are_kept_when_another_fails(self, server: Server, tmp_path: Path):
        path, late = tmp_path / "verdicts.jsonl", threading.Event()

        def reply(body: dict):
            if body["number"] == 0:
                return SLOW
            late.set()
            return 401

        server.reply = reply
        with pytest.raises(ChatError, match=r"rejected the API key.* 1 of 20 verdicts"):
            self.collect(server, path, 20, concurrency=2)
        assert late.is_set()
        assert [each.key for each in read_verdicts(path).values()] == ["k0"]
        assert len(server.bodies) < 20

    def test_waiting_for_a_retry_ends_when_another_request_fails_for_good(self, server: Server, tmp_path: Path):
        server.reply = lambda body: (429, {"Retry-After": "20"}, "") if body["number"] == 0 else 401
        requests = {f"k{number}": {"model": "judge", "messages": [], "number": number} for number in range(9)}
        with ChatClient(server.url) as client, pytest.raises(ChatError, match="rejected the API key"):
            collect_verdicts(
                requests, tmp_path / "verdicts.jsonl", client, parse_scores, concurrency=2, progress=False
            )
        assert self.numbers(server).count(0) == 1
        assert len(server.bodies) < 9

    def test_ctrl_c_keeps_what_came(self, server: Server, tmp_path: Path):
        def parse(reply: str):
            if reply == "stop":
                raise KeyboardInterrupt
            return parse_scores(reply)

        server.script = ["1 2", "3 4", "stop"]
        with pytest.raises(KeyboardInterrupt):
            self.collect(server, tmp_path / "verdicts.jsonl", 9, parse=parse)
        assert list(read_verdicts(tmp_path / "verdicts.jsonl"))[:2] == ["k0", "k1"]
        assert len(server.bodies) < 9

    def test_refused_requests_are_left_out_and_not_kept(self, server: Server, tmp_path: Path):
        server.reply = lambda body: 400 if body["number"] in (1, 3) else "8 7"
        verdicts, refused = self.collect(server, tmp_path / "verdicts.jsonl", 5)
        assert list(verdicts) == ["k0", "k2", "k4"]
        assert list(refused) == ["k1", "k3"]
        assert "HTTP 400" in refused["k1"]
        server.bodies.clear()
        self.collect(server, tmp_path / "verdicts.jsonl", 5)
        assert self.numbers(server) == [1, 3]

    def test_refusals_between_verdicts_do_not_end_the_run(self, server: Server, tmp_path: Path):
        server.reply = lambda body: 400 if body["number"] % 2 else "8 7"
        verdicts, refused = self.collect(server, tmp_path / "verdicts.jsonl", 3 * MAX_REFUSED)
        assert len(refused) > MAX_REFUSED
        assert len(verdicts) + len(refused) == 3 * MAX_REFUSED

    def test_endpoint_that_refuses_every_request_is_not_asked_on(self, server: Server, tmp_path: Path):
        server.reply = lambda _: 400
        with pytest.raises(ChatError, match=r"refuses a request: HTTP 400, .*\. 0 of 50 verdicts are in "):
            self.collect(server, tmp_path / "verdicts.jsonl", 50)
        assert MAX_REFUSED <= len(server.bodies) < 50


class TestCommand:
    @pytest.fixture
    def runs(self, tmp_path: Path) -> dict[str, Path]:
        return {
            "sft": write_run(tmp_path / "sft", {"one?": ["a 5", "b 1"], "two?": [" c 4 ", "d 9"]}),
            "minillm": write_run(tmp_path / "minillm", {"one?": ["e 9", "f 1"], "two?": ["g 4", "h 9"]}),
        }

    def words(self, server: Server, tmp_path: Path, *words: object) -> list[str]:
        options = ["--base_url", server.url, "--judge_model", "judge", "--output_dir", tmp_path / "out"]
        return ["judge", *map(str, [*words, *options])]

    def results(self, tmp_path: Path) -> dict:
        return json.loads((tmp_path / "out" / "judge.json").read_text())

    def test_models_are_scored_against_the_references(self, server: Server, tmp_path, runs, capsys):
        assert main(self.words(server, tmp_path, *runs.values())) == 0
        results = self.results(tmp_path)
        sft, minillm = (results["tasks"]["dolly"][name] for name in ("sft", "minillm"))
        # the score is the number in the answer, 8 of the gold, and half a point more for standing first in one of two
        assert sft["per_prompt"][0] == {"model": 5.5, "other": 8.5, "win": 0, "tie": 0, "loss": 100, "position": 1}
        assert sft["summary"]["ratio"]["mean"] == pytest.approx(100 * (5.5 + 4.5) / (8.5 + 8.5))
        assert minillm["summary"]["ratio"]["mean"] == pytest.approx(100 * (9.5 + 4.5) / (8.5 + 8.5))
        assert (minillm["summary"]["win"]["mean"], minillm["summary"]["loss"]["mean"]) == (50, 50)
        assert (minillm["pairs"], minillm["judged"], results["verdicts"], results["unparsed"]) == (2, 2, 8, 0)
        assert (results["prompt_tokens"], results["completion_tokens"]) == (800, 56)
        assert results["settings"]["answered_as"] == ["judge-2030"]
        assert results["settings"]["both_orders"] is True
        output = capsys.readouterr().out
        assert "8 requests to judge; 0 were answered before." in output
        rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith(("sft", "mini"))}
        assert rows["sft"][:3] == ["58.8", "±", "5.9"]
        assert "4 of 4 pairs judged, 0 of them in one order only." in output

    def test_second_run_asks_nothing_and_writes_the_same(self, server: Server, tmp_path, runs, capsys):
        words = self.words(server, tmp_path, *runs.values())
        server.script = [500, "no scores"]
        assert main(words) == 0
        before = (tmp_path / "out" / "judge.json").read_bytes()
        assert main(words) == 0
        assert len(server.bodies) == 10
        assert (tmp_path / "out" / "judge.json").read_bytes() == before
        assert "0 requests to judge; 8 were answered before." in capsys.readouterr().out

    def test_equal_answers_are_judged_once(self, server: Server, tmp_path, runs):
        assert main(self.words(server, tmp_path, f"a={runs['sft']}", f"b={runs['sft']}")) == 0
        assert len(server.bodies) == 4
        assert self.results(tmp_path)["tasks"]["dolly"].keys() == {"a", "b"}

    def test_against_another_run_wins_are_counted(self, server: Server, tmp_path, runs, capsys):
        words = self.words(server, tmp_path, runs["minillm"], "--against", runs["sft"], "--samples_per_prompt", "2")
        assert main(words) == 0
        minillm = self.results(tmp_path)["tasks"]["dolly"]["minillm"]
        means = {name: interval["mean"] for name, interval in minillm["summary"].items()}
        # 9 to 5 and 1 to 1 for the first prompt, 4 to 4 and 9 to 9 for the second
        assert (means["win"], means["tie"], means["loss"]) == (25, 75, 0)
        assert means["ratio"] == pytest.approx(100 * (9.5 + 1.5 + 4.5 + 9.5) / (5.5 + 1.5 + 4.5 + 9.5))
        assert "Score in % of sft" in capsys.readouterr().out

    def test_one_order_halves_the_requests_and_is_said(self, server: Server, tmp_path, runs, capsys):
        assert main(self.words(server, tmp_path, runs["sft"], "--no_swap")) == 0
        assert len(server.bodies) == 2
        results = self.results(tmp_path)
        assert results["settings"]["both_orders"] is False
        summary = results["tasks"]["dolly"]["sft"]["summary"]
        assert results["tasks"]["dolly"]["sft"]["one_order"] == 0
        assert "position" not in summary
        assert summary["ratio"]["mean"] == pytest.approx(100 * (6 + 4) / (8 + 9))  # first, then second
        assert "2 of 2 pairs judged, each in one order." in capsys.readouterr().out

    def test_every_task_of_a_folder_is_judged_or_those_that_are_named(self, server: Server, tmp_path, capsys):
        for task in ("dolly", "vicuna"):
            write_run(tmp_path / "run" / task, {f"{task}?": ["a 5"]}, task=task)
        write_run(tmp_path / "run" / "boolq", {"boolq?": []}, task="boolq")
        assert main(self.words(server, tmp_path, tmp_path / "run")) == 0
        assert self.results(tmp_path)["tasks"].keys() == {"dolly", "vicuna"}
        assert "run, boolq: no answers in words, so left out." in capsys.readouterr().out
        assert main(self.words(server, tmp_path, tmp_path / "run", "--tasks", "vicuna")) == 0
        assert self.results(tmp_path)["tasks"].keys() == {"vicuna"}

    def test_dry_run_estimates_and_neither_asks_nor_writes(self, server: Server, tmp_path, runs, capsys):
        words = self.words(server, tmp_path, runs["sft"], "--max_tokens", "100", "--dry_run")
        assert main([*words, "--price_per_million", "1000", "10000"]) == 0
        assert server.bodies == []
        assert not (tmp_path / "out").exists()
        bodies = [
            request.body
            for prompt, (question, answer) in enumerate([("one?", "a 5"), ("two?", "c 4")])
            for request in Protocol("judge", 100, {}).requests(Pair(prompt, question, answer, "gold 8"))
        ]
        tokens = sum(len(message["content"]) for body in bodies for message in body["messages"]) // 4
        output = capsys.readouterr().out
        assert "4 requests to judge; 0 were answered before." in output
        assert f"Estimate: {tokens:,} input tokens (characters / 4) and at most 400 output tokens" in output
        assert f"at most {tokens / 1000 + 4:.2f} at the given prices" in output

    def test_tokens_can_be_counted(self, server: Server, tmp_path, runs, capsys, model_dir, tokenizer):
        words = self.words(server, tmp_path, runs["sft"], "--dry_run", "--max_rows", "1", "--no_swap")
        assert main([*words, "--tokenizer", model_dir("llama")]) == 0
        (request,) = Protocol("judge", 512, {}, swap=False).requests(Pair(0, "one?", "a 5", "gold 8"))
        count = sum(len(tokenizer(message["content"])["input_ids"]) for message in request.body["messages"])
        assert f"Estimate: {count:,} input tokens (tokenizer of {model_dir('llama')})" in capsys.readouterr().out

    def test_more_requests_than_allowed_are_refused_counting_what_is_missing(self, server, tmp_path, runs, capsys):
        words = self.words(server, tmp_path, runs["sft"], "--max_requests", "3")
        assert main(words) == 2
        assert "--max_requests 3: 4 are needed. Nothing was asked." in capsys.readouterr().err
        assert server.bodies == []
        assert main(self.words(server, tmp_path, runs["sft"], "--max_rows", "1", "--max_requests", "2")) == 0
        assert main(words) == 0  # two are answered already
        assert len(server.bodies) == 4

    def test_key_is_sent_and_appears_nowhere(self, server: Server, tmp_path, runs, monkeypatch, capsys):
        monkeypatch.setenv("MY_KEY", KEY)
        server.script, server.reply = [f"8 7\n{KEY} is what I was sent.", 500], lambda _: 401
        words = self.words(server, tmp_path, runs["sft"], "--api_key_env", "MY_KEY", "--concurrency", 1)
        assert main(words) == 2
        refused = capsys.readouterr()
        assert (
            "rejected the API key: HTTP 401, 'said to Bearer (key)'. Check the key in MY_KEY. 1 of 4 ver"
            in refused.err
        )
        monkeypatch.setenv("MINILLM_TRL_TRACEBACK", "1")
        with pytest.raises(ChatError) as caught:
            main(words)
        traced = "".join(traceback.format_exception(caught.value))
        server.reply = by_quality
        assert main(words) == 0
        output = capsys.readouterr()
        assert set(server.keys) == {f"Bearer {KEY}"}
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"verdicts.jsonl", "judge.json"}
        written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
        assert any("(key) is what I was sent" in text for text in written)
        assert not any(KEY in text for text in [*written, *output, *refused, traced])

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            (["--api_key", KEY], "unknown option '--api_key'. Did you mean 'api_key_env'?"),
            ([f"--api_key={KEY}"], "unknown option '--api_key'. Did you mean 'api_key_env'?"),
            (["--api_key_env", KEY], "--api_key_env: no environment variable of this name is set."),
        ],
    )
    def test_key_on_the_command_line_is_refused_and_not_shown(self, server, tmp_path, runs, capsys, option, message):
        assert main([*self.words(server, tmp_path, runs["sft"]), *option]) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert KEY not in output.err + output.out
        assert server.bodies == []

    @pytest.mark.cli
    def test_killed_run_goes_on_where_it_was(self, server: Server, tmp_path):
        run = write_run(tmp_path / "run", {f"{i}?": [f"a {i % 9 + 1}"] for i in range(10)})
        killed = threading.Event()

        def reply(body: dict):
            if len(server.bodies) > 8:
                killed.wait(300)
            return by_quality(body)

        server.reply = reply
        words = self.words(server, tmp_path, run, "--concurrency", 1)
        path = tmp_path / "out" / "verdicts.jsonl"
        process = subprocess.Popen(
            [sys.executable, "-m", "minillm_trl", *words], env=conftest.ENVIRONMENT, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (path.is_file() and path.read_bytes().count(b"\n") == 8):
            time.sleep(0.01)
        process.kill()
        process.wait()
        killed.set()
        assert len(read_verdicts(path)) == 8
        assert not (tmp_path / "out" / "judge.json").exists()
        with path.open("a") as file:
            file.write('{"key": "torn')
        server.bodies.clear()
        server.reply = by_quality
        assert main(words) == 0
        assert len(server.bodies) == 20 - 8
        assert self.results(tmp_path)["verdicts"] == 20

    def test_judge_that_is_down_is_one_clear_error(self, tmp_path, runs, server, capsys):
        words = self.words(server, tmp_path, runs["sft"], "--max_retries", "0", "--base_url", "http://127.0.0.1:9/v1")
        assert main([*words, "--base_url", "http://127.0.0.1:9/v1"]) == 2
        error = capsys.readouterr().err
        assert "minillm-trl judge: http://127.0.0.1:9/v1/chat/completions failed 1 times" in error
        assert "0 of 4 verdicts" in error

    def test_missing_client_is_named_before_anything_is_read(self, tmp_path, runs, server, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "openai", None)
        assert main(self.words(server, tmp_path, runs["sft"], "--dry_run")) == 0  # an estimate needs no client
        assert main(self.words(server, tmp_path, tmp_path / "no_run")) == 2
        assert "pip install 'minillm-trl[judge]'" in capsys.readouterr().err
        assert server.bodies == []

    def test_unparsed_and_refused_verdicts_are_reported(self, server: Server, tmp_path, runs, capsys):
        def reply(body: dict):
            return {"a 5": "Both are fine.", "c 4": by_quality(body), "g 4": 400}.get(
                answers(body)[0], by_quality(body)
            )

        server.reply = reply
        assert main(self.words(server, tmp_path, *runs.values(), "--concurrency", 1)) == 0
        results = self.results(tmp_path)
        sft, minillm = (results["tasks"]["dolly"][name] for name in ("sft", "minillm"))
        assert {name: sft[name] for name in ("judged", "one_order", "unparsed", "missing")} == {
            "judged": 2,
            "one_order": 1,
            "unparsed": 1,
            "missing": 0,
        }
        assert (minillm["one_order"], minillm["missing"]) == (1, 1)
        assert (results["verdicts"], results["unparsed"], results["asked_again"]) == (7, 1, 2)
        output = capsys.readouterr().out
        assert "1 verdicts are left out, as no reply to them could be parsed." in output
        assert "1 verdicts are missing. " in output
        assert "HTTP 400" in output

    def test_judge_that_never_scores_is_an_error_with_its_reply(self, server: Server, tmp_path, runs, capsys):
        server.reply = lambda _: "As a language model"
        assert main(self.words(server, tmp_path, runs["sft"])) == 2
        assert (
            "No reply has two scores from 1 to 10 in its first line; one is 'As a language" in capsys.readouterr().err
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--samples_per_prompt", "3"], "prompt 0 (counting from 0) has 2 answers. Lower --samples_per_prompt 3"),
            (["--tasks", "vicuna"], "--tasks vicuna: there are only dolly."),
            (["--against", "{other}"], "sft and other were evaluated on different prompts of dolly."),
            (["{other}"], "sft and other were evaluated on different prompts or references of dolly."),
            (["{bare}"], "bare, dolly, prompt 0 (counting from 0) has no reference."),
            (["--against", "{elsewhere}"], "elsewhere was not evaluated on dolly, sft was. Leave it out with --tasks"),
            (["{sft}"], "each run needs a name of its own"),
            (["--concurrency", "0"], "--concurrency must be positive, got 0."),
            (["--max_retries", "-1"], "--max_retries must not be negative, got -1."),
            (["--price_per_million", "1", "-2"], "--price_per_million must not be negative, got -2.0."),
            (["--extra_body", '{"max_tokens": null}'], "Set max_completion_tokens in its place"),
            (["--api_key_env", "NOT_SET_ANYWHERE"], "--api_key_env: no environment variable of this name is set"),
        ],
    )
    def test_mistakes_are_named_before_anything_is_asked(self, server, tmp_path, runs, capsys, options, message):
        write_run(tmp_path / "other", {"three?": ["x 1"], "four?": ["y 1"]})
        write_run(tmp_path / "bare", {"one?": ["x 1"], "two?": ["y 1"]}, reference=None)
        write_run(tmp_path / "elsewhere", {"one?": ["x 1"], "two?": ["y 1"]}, task="vicuna")
        places = {name: tmp_path / name for name in ("sft", "other", "bare", "elsewhere")}
        options = [word if word.startswith("{m") or '"' in word else word.format(**places) for word in options]
        runs_first = [word for word in options[:1] if not word.startswith("--")]
        rest = options[len(runs_first) :]
        assert main([*self.words(server, tmp_path, runs["sft"], *runs_first), *rest]) == 2
        assert message in capsys.readouterr().err
        assert server.bodies == []

    @pytest.mark.parametrize("text", ["{", "[1]", '{"stream": true}', '{"messages": []}'])
    def test_extra_fields_that_cannot_be_sent_are_refused(self, server, tmp_path, runs, capsys, text: str):
        with pytest.raises(SystemExit) as ended:
            main([*self.words(server, tmp_path, runs["sft"]), "--extra_body", text])
        assert ended.value.code == 2
        assert "--extra_body: " in capsys.readouterr().err
