"""Verdicts are collected once each, and survive failures of the endpoint."""

import json
import threading
from pathlib import Path

import pytest
from judge_server import SLOW, Server, verdict

from minillm_trl.evaluation.chat_client import ChatClient, ChatError
from minillm_trl.evaluation.judge import parse_scores
from minillm_trl.evaluation.verdicts import MAX_ASKED, MAX_REFUSED, collect_verdicts, read_verdicts

pytest_plugins = ["judge_server"]  # the fixture `server`


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
        assert {key: verdict.scores for key, verdict in verdicts.items()} == {"k0": (1, 9), "k1": (2, 9), "k2": (3, 9)}
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
        assert [(verdict.scores, verdict.reply, verdict.asked, verdict.retries) for verdict in verdicts.values()] == [
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
        with pytest.raises(ValueError, match=r"verdicts.jsonl:2: not a verdict .* Delete this line"):
            read_verdicts(path)

    def test_endpoint_that_fails_in_the_middle_loses_nothing(self, server: Server, tmp_path: Path):
        path = tmp_path / "verdicts.jsonl"
        server.script = ["1 2", "3 4", 500, 500, 500]
        with pytest.raises(
            ChatError, match=r"failed 3 times.* 2 of 6 verdicts are in .*verdicts.jsonl. Rerun the same comm"
        ):
            self.collect(server, path, 6)
        assert [verdict.scores for verdict in read_verdicts(path).values()] == [(1, 2), (3, 4)]
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
        assert [verdict.key for verdict in read_verdicts(path).values()] == ["k0"]
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
