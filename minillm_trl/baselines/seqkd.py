"""Sample the teacher's completions for sequence-level knowledge distillation (SeqKD), saving every batch."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import MissingPackageError
from ..models.encoding import encode_prompts
from ..models.end_tokens import find_turn_end
from ..models.fingerprints import model_fingerprint
from ..models.init_kwargs import parsed_kwargs
from ..models.pickled_weights import refuse_pickled_weights
from ..rollouts.keyed_random import sample_key
from ..rollouts.prompts import end_token_ids
from ..rollouts.sampling import sample_prompts
from .configs import SeqKDConfig
from .teacher_data import Job, TeacherCompletion, TeacherData

# Index of the job, token ids of its completion (including EOS), and whether it ended before the length limit
Answer = tuple[int, list[int], bool]
Sampler = Callable[[list[Job], list[list[int]]], Iterator[list[Answer]]]


def generation_settings(teacher: str, args: SeqKDConfig, prompts: Dataset) -> dict[str, Any]:
    """Return everything that the teacher's completions depend on, including a hash of a local teacher's files."""
    digest = hashlib.sha256("".join(json.dumps(prompt, sort_keys=True) for prompt in prompts["prompt"]).encode())
    names = [
        "num_generations",
        "generation_temperature",
        "generation_seed",
        "max_completion_length",
        "use_vllm",
        "teacher_model_init_kwargs",
    ]
    return {
        "teacher": teacher,
        **{name: getattr(args, name) for name in names},
        "chat_template_kwargs": args.chat_template_kwargs,
        "prompts": digest.hexdigest(),
        "teacher_files": model_fingerprint(Path(teacher)),
    }


def generate(
    data: TeacherData,
    found: Collection[Job],
    prompts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sampler,
    num_generations: int,
    process: int = 0,
    num_processes: int = 1,
    progress: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> None:
    """Generate this process's share of the missing completions, and append them batch by batch.

    Args:
        data ([`TeacherData`]): receives the completions.
        found (`Collection`): the finished jobs, from [`TeacherData.read`]. All processes must read them before any
            process generates, or the shares would overlap.
        prompts ([`~datasets.Dataset`]): has a column `prompt`, with one row per prompt.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the teacher's.
        sample (`Callable`): takes jobs and the token ids of their prompts, and yields answers batch by batch; see
            [`sample_with_transformers`] and [`sample_with_vllm`].
        num_generations (`int`): samples per prompt.
        process, num_processes (`int`): index of this process, and number of processes.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.
        chat_template_kwargs (`dict`, *optional*): further arguments of the chat template.
    """
    prompt_ids = encode_prompts(tokenizer, prompts["prompt"], chat_template_kwargs)
    missing = [
        (row, sample_number)
        for row in sorted(range(len(prompts)), key=lambda row: -len(prompt_ids[row]))  # similar lengths per batch
        for sample_number in range(num_generations)
        if (row, sample_number) not in found
    ]
    jobs = missing[process::num_processes]
    append = data.open_share(process)
    total = len(prompts) * num_generations
    with tqdm(total=total, initial=len(found), desc="Teacher", unit=" completions", disable=not progress) as bar:
        for batch in sample(jobs, [prompt_ids[row] for row, _ in jobs]):
            texts = [_text(tokenizer, prompts, prompt_ids, jobs[number][0], ids) for number, ids, _ in batch]
            append(
                [
                    TeacherCompletion(*jobs[number], text, len(ids), finished)
                    for text, (number, ids, finished) in zip(texts, batch, strict=True)
                ]
            )
            bar.update(min(len(batch) * num_processes, total - bar.n))


def _text(
    tokenizer: PreTrainedTokenizerBase, prompts: Dataset, prompt_ids: list[list[int]], row: int, ids: list[int]
) -> str:
    """Return the text of a completion, including its leading space.

    Some tokenizers drop the space if they decode the completion alone, so decode it after its prompt.
    """

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)  # a list only for a batch
        return text

    if not isinstance(prompts[row]["prompt"], str):
        return decode(ids)
    prompt = decode(prompt_ids[row])
    whole = decode([*prompt_ids[row], *ids])
    return whole[len(prompt) :] if whole.startswith(prompt) else decode(ids)


def sample_with_transformers(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SeqKDConfig, conversational: bool = False
) -> Sampler:
    """Return a sampler that uses this package's decoding.

    A completion depends only on the seed and the numbers of its prompt and sample. The teacher ends completions with
    its own end tokens (see [`find_end_tokens`]); `args.eos_tokens` are the student's.
    """
    ends = end_token_ids(teacher, tokenizer, conversational, None, parsed_kwargs(args.chat_template_kwargs))
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def sample(jobs: list[Job], prompt_ids: list[list[int]]) -> Iterator[list[Answer]]:
        for start in range(0, len(jobs), args.generation_batch_size):
            numbers = range(start, min(start + args.generation_batch_size, len(jobs)))
            sampled = sample_prompts(
                teacher,
                [prompt_ids[number] for number in numbers],
                keys=[sample_key(args.generation_seed, *jobs[number]) for number in numbers],
                max_new_tokens=args.max_completion_length,
                eos_token_ids=ends,
                pad_token_id=pad_token_id,
                temperature=args.generation_temperature,
                vocab_size=min(len(tokenizer), teacher.get_output_embeddings().weight.shape[0]),
            )
            yield [(number, ids, ids[-1] in ends) for number, ids in zip(numbers, sampled, strict=True)]

    return sample


def sample_with_vllm(
    teacher: str,
    tokenizer: PreTrainedTokenizerBase,
    args: SeqKDConfig,
    chunk: int = 256,
    conversational: bool = False,
) -> Sampler:
    """Return a sampler that uses vLLM, `chunk` prompts at a time, so that finished chunks are saved.

    vLLM ends completions with the end tokens of the teacher's generation config and tokenizer. Conversations also end
    with the token that the chat template writes after an assistant's turn.

    Raises:
        ImportError: if vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise MissingPackageError(
            "use_vllm=True needs vLLM: pip install 'minillm-trl[vllm]', or set use_vllm=False."
        ) from error
    init_kwargs = parsed_kwargs(args.teacher_model_init_kwargs) or {}
    if not args.allow_pickled_weights:
        refuse_pickled_weights(teacher, init_kwargs)
        init_kwargs = {"load_format": "safetensors", **init_kwargs}
    model = LLM(
        model=teacher,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        trust_remote_code=args.trust_remote_code,
        **init_kwargs,
    )

    turn_end = find_turn_end(tokenizer, parsed_kwargs(args.chat_template_kwargs)) if conversational else None
    stop = {} if turn_end is None else {"stop_token_ids": [turn_end]}

    def sampling_params(job: Job) -> Any:
        return SamplingParams(
            temperature=args.generation_temperature,
            max_tokens=args.max_completion_length,
            seed=_request_seed(args.generation_seed, job),
            **stop,
        )

    def sample(jobs: list[Job], prompt_ids: list[list[int]]) -> Iterator[list[Answer]]:
        for start in range(0, len(jobs), chunk):
            numbers = range(start, min(start + chunk, len(jobs)))
            outputs = model.generate(
                [{"prompt_token_ids": prompt_ids[number]} for number in numbers],
                [sampling_params(jobs[number]) for number in numbers],
                use_tqdm=False,
            )
            answers = [output.outputs[0] for output in outputs]
            yield [
                (number, list(answer.token_ids), answer.finish_reason == "stop")
                for number, answer in zip(numbers, answers, strict=True)
            ]

    return sample


def _request_seed(seed: int, job: Job) -> int:
    digest = hashlib.sha256(f"{seed}:{job[0]}:{job[1]}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # a positive 32-bit integer
