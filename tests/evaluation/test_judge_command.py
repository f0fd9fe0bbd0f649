"""`minillm-trl judge` from the runs of `evaluate` to scores, against a local server."""

import json
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import conftest
import pytest
from judge_server import KEY, Server, answers, by_quality, write_run

from minillm_trl.cli import main
from minillm_trl.evaluation.chat_client import ChatError
from minillm_trl.evaluation.judge import Pair, Protocol
from minillm_trl.evaluation.verdicts import read_verdicts

pytest_plugins = ["judge_server"]  # the fixture `server`


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
        assert "run, boolq: skipped, as it has no text answers." in capsys.readouterr().out
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
            (["--against", "{elsewhere}"], "elsewhere was not evaluated on dolly, but sft was. Exclude"),
            (["{sft}"], "each run needs its own name"),
            (["--concurrency", "0"], "--concurrency must be positive, got 0."),
            (["--max_retries", "-1"], "--max_retries must not be negative, got -1."),
            (["--price_per_million", "1", "-2"], "--price_per_million must not be negative, got -2.0."),
            (["--extra_body", '{"max_tokens": null}'], "Set max_completion_tokens instead"),
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
        assert main([*self.words(server, tmp_path, runs["sft"]), "--extra_body", text]) == 2
        assert "--extra_body: " in capsys.readouterr().err
