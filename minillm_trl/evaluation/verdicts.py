"""Collect a judge's verdicts with several threads, and store them on disk as they arrive."""

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

MAX_ASKED = 3  # attempts until a reply can be parsed
MAX_REFUSED = 5  # after this many refusals in a row, the endpoint probably refuses everything

ScorePair = tuple[float, float]


@dataclass(frozen=True)
class Verdict:
    """The judge's reply to a request.

    Attributes:
        key (`str`): digest of the request.
        scores (`tuple[float, float]`, *optional*): scores of the first and the second answer; `None` if no reply could
            be parsed.
        reply (`str`): the last reply.
        asked (`int`): number of replies, at most [`MAX_ASKED`].
        retries (`int`): failed requests in between.
        model (`str`, *optional*): model that answered, as the endpoint names it.
        prompt_tokens, completion_tokens (`int`): tokens of all replies, as reported by the endpoint.
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
    """Read the verdicts of a file by key; an incomplete last line, left by a kill, is ignored.

    Raises:
        ValueError: if another line is not a verdict, with its number.
    """
    if not path.is_file():
        return {}
    verdicts = {}
    *lines, _ = path.read_bytes().split(b"\n")  # the rest after the last line break is empty or incomplete
    for number, line in enumerate(lines, start=1):
        try:
            values = check(parse_json(line), Verdict)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: not a verdict ({error}). Delete this line to request it again."
            ) from error
        scores = None if values["scores"] is None else tuple(map(float, values["scores"]))
        verdicts[values["key"]] = Verdict(**{**values, "scores": scores})
    return verdicts


def collect_verdicts(
    requests: Mapping[str, dict[str, Any]],
    path: Path,
    client: ChatClient,
    parse: Callable[[str], ScorePair | None],
    *,
    concurrency: int,
    progress: bool = True,
) -> tuple[dict[str, Verdict], dict[str, str]]:
    """Request the verdicts that the file lacks, and append them as they arrive.

    Args:
        requests (`Mapping[str, dict]`): request bodies by key.
        path (`Path`): path of `verdicts.jsonl`.
        client ([`ChatClient`]): client of the judge.
        parse (`Callable`): returns the scores in a reply, or `None` without scores, which repeats the request.
        concurrency (`int`): number of requests in flight.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        The verdicts by key, and the endpoint's messages to requests that it refuses, such as prompts that are too
        long. Refusals are not in the file.

    Raises:
        ChatError: if the endpoint fails permanently or refuses [`MAX_REFUSED`] requests in a row. Verdicts received so
            far are stored.
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
            file.write(json.dumps(asdict(verdict)) + "\n")  # ASCII: a truncated reply may end in half a character
            file.flush()
            verdicts[verdict.key] = verdict
            bar.update()

        futures = {executor.submit(_ask, client, key, requests[key], parse): key for key in missing}
        try:
            refused = _keep_all(futures, keep)
        except BaseException as error:  # Ctrl-C too
            client.stop()
            executor.shutdown()  # waits for requests in flight
            _keep_finished(futures, verdicts, keep)
            if isinstance(error, ChatError):
                kept = (
                    f"{len(verdicts)} of {len(requests)} verdicts are in {path}. Rerun the same command for the rest."
                )
                raise ChatError(f"{error} {kept}") from error
            raise
    return verdicts, refused


def _keep_all(futures: dict[Future[Verdict], str], keep: Callable[[Verdict], None]) -> dict[str, str]:
    """Store verdicts as they arrive; return the endpoint's messages to refused requests."""
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


def _keep_finished(
    futures: dict[Future[Verdict], str], verdicts: Mapping[str, Verdict], keep: Callable[[Verdict], None]
) -> None:
    """Store the verdicts that arrived after an error."""
    for future, key in futures.items():
        if key not in verdicts and future.exception() is None:
            keep(future.result())


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
