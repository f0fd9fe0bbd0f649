"""Verdicts of a judge: asked by several threads, each kept on disk as it comes, none asked for twice."""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import UserError
from ..files.json_files import check, parse_json
from ..files.whole_files import make_folder, writing
from .chat_client import ChatClient, ChatError, RequestRefused

MAX_ASKED = 3  # times that a judge is asked until its reply can be parsed
MAX_REFUSED = 5  # refusals in a row that are about one request each; after as many all would be refused

ScorePair = tuple[float, float]


@dataclass(frozen=True)
class Verdict:
    """A judge's reply to a request.

    Attributes:
        key (`str`): digest of the request.
        scores (`tuple[float, float]`, *optional*): of the first and the second answer; `None` if no reply had any.
        reply (`str`): the last one.
        asked (`int`): replies until one could be parsed, or until it was given up.
        retries (`int`): failed tries to get them.
        model (`str`, *optional*): who answered, as the endpoint names it.
        prompt_tokens, completion_tokens (`int`): of all replies, as the endpoint counts them.
    """

    key: str
    scores: ScorePair | None
    reply: str
    asked: int
    retries: int
    model: str | None
    prompt_tokens: int
    completion_tokens: int


def read_verdicts(path: Path) -> dict[str, Verdict]:
    """The verdicts of a file by their keys; a last line that a kill has torn is left out.

    Raises:
        ValueError: if another line is no verdict, with its number.
    """
    if not path.is_file():
        return {}
    found = {}
    *lines, _ = path.read_bytes().split(b"\n")  # what ends without a line break is torn
    for number, line in enumerate(lines, start=1):
        try:
            values = check(parse_json(line), Verdict)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: no verdict of a judge ({error}). Delete this line, and it is asked for again."
            ) from error
        scores = None if values["scores"] is None else tuple(map(float, values["scores"]))
        found[values["key"]] = Verdict(**{**values, "scores": scores})
    return found


def collect_verdicts(
    requests: Mapping[str, dict[str, Any]],
    path: Path,
    client: ChatClient,
    parse: Callable[[str], ScorePair | None],
    *,
    concurrency: int,
    progress: bool = True,
) -> tuple[dict[str, Verdict], dict[str, str]]:
    """Ask for the verdicts that the file does not have, and append each to it as it comes.

    Args:
        requests (`Mapping[str, dict]`): bodies of requests by their keys.
        path (`Path`): of `verdicts.jsonl`.
        client ([`ChatClient`]): of the judge.
        parse (`Callable`): scores of a reply, or `None` if it has none; then the judge is asked again.
        concurrency (`int`): requests on their way at a time.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        The verdicts by key, and what the endpoint said to requests that it refuses (too long ones, for example), which
        are not in the file.

    Raises:
        ChatError: if the endpoint fails for good or refuses [`MAX_REFUSED`] requests in a row; what came is kept.
    """
    verdicts = {key: verdict for key, verdict in read_verdicts(path).items() if key in requests}
    missing = [key for key in requests if key not in verdicts]
    if not missing:
        return verdicts, {}
    make_folder(path.parent)
    _drop_torn_line(path)
    with (
        writing(path),
        open(path, "a", encoding="utf-8") as file,
        ThreadPoolExecutor(concurrency) as executor,
        tqdm(total=len(requests), initial=len(verdicts), desc="Judging", disable=not progress) as bar,
    ):

        def keep(verdict: Verdict) -> None:
            file.write(json.dumps(asdict(verdict)) + "\n")  # in ASCII: a cut reply may end in half a character
            file.flush()
            verdicts[verdict.key] = verdict
            bar.update()

        futures = {executor.submit(_ask, client, key, requests[key], parse): key for key in missing}
        try:
            refused = _keep_all(futures, keep)
        except BaseException as error:  # Ctrl-C too
            client.stop()
            executor.shutdown()  # waits for requests on their way
            for future, key in futures.items():
                if key not in verdicts and future.exception() is None:
                    keep(future.result())
            if isinstance(error, ChatError):
                kept = (
                    f"{len(verdicts)} of {len(requests)} verdicts are in {path}; the same command asks for the rest."
                )
                raise ChatError(f"{error} {kept}") from error
            raise
    return verdicts, refused


def _keep_all(futures: dict[Future[Verdict], str], keep: Callable[[Verdict], None]) -> dict[str, str]:
    """Keep the verdicts as they come; returns what was said to refused requests."""
    refused: dict[str, str] = {}
    in_a_row = 0
    for future in as_completed(futures):
        try:
            keep(future.result())
            in_a_row = 0
        except RequestRefused as error:
            refused[futures[future]] = str(error)
            in_a_row += 1
            if in_a_row == MAX_REFUSED:
                raise
    return refused


def _ask(client: ChatClient, key: str, body: dict[str, Any], parse: Callable[[str], ScorePair | None]) -> Verdict:
    replies = []
    while True:
        replies.append(client.complete(body))
        scores = parse(replies[-1].text)
        if scores is not None or len(replies) == MAX_ASKED:
            break
    return Verdict(
        key,
        scores,
        reply=replies[-1].text,
        asked=len(replies),
        retries=sum(reply.retries for reply in replies),
        model=replies[-1].model,
        prompt_tokens=sum(reply.prompt_tokens for reply in replies),
        completion_tokens=sum(reply.completion_tokens for reply in replies),
    )


def _drop_torn_line(path: Path) -> None:
    if path.is_file():
        end = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, end)
