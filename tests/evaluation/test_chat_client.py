"""The client of chat endpoints against a local server that fails in every way."""

import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from judge_server import DROP, KEY, SLOW, Server

from minillm_trl.evaluation.chat_client import ChatClient, ChatError, RequestRefused, check_base_url

pytest_plugins = ["judge_server"]  # the fixture `server`


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
            (302, "HTTP 302"),
            (405, "HTTP 405"),
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
        assert "HTTP 307" in str(error)
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
            with pytest.raises(ChatError, match="was stopped"):
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
        with pytest.raises(ValueError, match="MY_KEY ") as caught:
            ChatClient("http://127.0.0.1/v1", key, key_name="MY_KEY")
        assert KEY not in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("localhost:8000/v1", "--base_url localhost:8000/v1 "),
            ("ftp://host/v1", "--base_url ftp://host/v1 "),
            ("http:///v1", "--base_url http:///v1 "),
            ("http://host:port/v1", "--base_url is not a URL"),
            (f"http://user:{KEY}@host/v1", "--base_url .* --api_key_env"),
            (f"http://host/v1?key={KEY}", "--base_url .* --api_key_env"),
            ("http://host/v1/chat/completions/", "/chat/completions"),
        ],
    )
    def test_address_that_cannot_be_used_is_refused_without_its_secrets(self, url: str, message: str):
        with pytest.raises(ValueError, match=message) as caught:
            check_base_url(url)
        assert KEY not in str(caught.value)
        assert check_base_url("https://host/v1/") == "https://host/v1"
