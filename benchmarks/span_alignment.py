"""Question: how long are the spans in which the tokens of two real tokenizers agree?

    python benchmarks/span_alignment.py --tokenizers FOLDER FOLDER [--texts FILE]

Each of the two is the student's tokenizer once. Texts are the field `response` of a .jsonl file, by default the sample
of Dolly in tests/data. The record has the tokens of the student in a span, the share of texts that are a single span,
and the number of certain cuts inside a token of the teacher, which must be 0.
"""

import argparse
import json
from itertools import permutations
from pathlib import Path

import numpy as np
from measurement import write_record
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minillm_trl.rollouts.cross_tokenizer import TwoTokenizers
from minillm_trl.rollouts.spans import certain_cuts

SAMPLE = Path(__file__).parents[1] / "tests/data/dolly_sample.jsonl"


def measure(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, float]:
    both = TwoTokenizers(student, teacher)
    end = student.eos_token_id
    rows = [[*ids, end] for ids in student(texts, add_special_tokens=False)["input_ids"]]
    readings = both.read(rows, [end], teacher.eos_token_id)
    sizes, crossed = [], 0
    for text, reading in zip(texts, readings, strict=True):
        sizes.append(np.unique(reading.of_student[:-1], return_counts=True)[1])
        ends = np.cumsum([len(both.teacher_bytes[id_]) for id_ in reading.ids[:-1]])
        crossed += int((~np.isin(certain_cuts(text.encode(), both.pairs), ends)).sum())
    tokens = np.concatenate(sizes)
    return {
        "texts": len(texts),
        "student_tokens": int(tokens.sum()),
        "teacher_tokens": sum(len(reading.ids) - 1 for reading in readings),
        "spans": len(tokens),
        "tokens_of_a_span": round(float(tokens.mean()), 3),
        "largest_span": int(tokens.max()),
        "texts_of_one_span": sum(len(size) == 1 for size in sizes),
        "unreadable": sum(reading.fault is not None for reading in readings),
        "crossed_cuts": crossed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs=2, required=True, metavar="FOLDER")
    parser.add_argument("--texts", type=Path, default=SAMPLE)
    arguments = parser.parse_args()
    texts = [json.loads(line)["response"] for line in arguments.texts.read_text().splitlines()]
    loaded = {Path(folder).name: AutoTokenizer.from_pretrained(folder) for folder in arguments.tokenizers}
    pairs = {
        f"{student} read by {teacher}": measure(loaded[student], loaded[teacher], texts)
        for student, teacher in permutations(loaded, 2)
    }
    write_record(
        "span_alignment",
        ["tokenizers", "transformers"],
        {"texts": arguments.texts.name},
        pairs,
        command=f"python benchmarks/span_alignment.py --tokenizers {' '.join(loaded)}",
    )


if __name__ == "__main__":
    main()
