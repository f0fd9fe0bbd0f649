"""The E2E NLG data in the package: its bytes, its splits, its rows."""

import gzip
import hashlib
from pathlib import Path

import pytest

import minillm_trl.data
from minillm_trl.data import DataError, load_e2e, load_examples, unique_prompts
from minillm_trl.data.e2e import format_prompt, split_of

FOLDER = Path(minillm_trl.data.__file__).parent / "e2e_nlg"


@pytest.fixture(scope="module")
def e2e():
    return load_e2e()


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("dev.jsonl", "c31f4e6ba40a7fac6068ded87d243b87b25d8fac08a4f08e883494522ad4c375"),
        ("test.jsonl", "8dbaab14ebffbf5571881d19c68bef7226be5168e786cd81bceb997507c5a767"),
    ],
)
def test_packed_file_is_the_attributed_one_without_time_or_name(name, sha256):
    packed = (FOLDER / f"{name}.gz").read_bytes()
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == sha256
    assert sha256 in (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert packed[3:8] == bytes(5)  # gzip flags (no file name) and modification time


def test_licence_note_stands_beside_the_data():
    assert "CC BY-SA 4.0" in (FOLDER / "LICENSE").read_text(encoding="utf-8")


def test_split_sizes_are_pinned(e2e):
    assert {split: len(rows) for split, rows in e2e.items()} == {"train": 6671, "validation": 768, "test": 1659}
    assert {split: len(set(rows["mr"])) for split, rows in e2e.items()} == {
        "train": 874,
        "validation": 98,
        "test": 205,
    }


def test_no_meaning_representation_or_set_of_facts_is_in_two_splits(e2e):
    seen = [{frozenset(mr.split(", ")) for mr in rows["mr"]} for rows in e2e.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 1177


@pytest.mark.parametrize(
    ("mr", "split"),  # the SHA-256 modulo 100 is 9, 10, 19, 20 and, over UTF-8, 94
    [
        ("name[29]", "test"),
        ("name[374]", "validation"),
        ("name[293]", "validation"),
        ("name[48]", "train"),
        ("name[Café]", "train"),
    ],
)
def test_split_depends_on_the_sha256_alone(mr, split):
    assert split_of(mr) == split


def test_rows_have_all_references_of_their_meaning_representation(e2e):
    rows = e2e["test"].to_list()
    by_mr = {}
    for row in rows:
        by_mr.setdefault(row["mr"], []).append(row["completion"])
    assert all(row["references"] == by_mr[row["mr"]] for row in rows)
    assert all(len(set(references)) == len(references) for references in by_mr.values())
    assert all(row["prompt"] == format_prompt(row["mr"]) for row in rows)


def test_known_row_is_read_with_its_accents(e2e):
    rows = [
        row for split in e2e.values() for row in split if row["completion"].startswith("A coffee shop in the city")
    ]
    assert rows[0]["prompt"] == "name: Blue Spice | eatType: coffee shop | area: city centre\n"
    assert rows[0]["references"] == [
        "A coffee shop in the city centre area called Blue Spice.",
        "Blue Spice is a coffee shop in city centre.",
    ]
    assert any("near: Café Sicilia" in prompt for prompt in e2e["train"]["prompt"])


@pytest.mark.parametrize("mr", ["", "name", "name[]", "name[a], food", "name[a],food[b]", "name[a[b]]"])
def test_malformed_meaning_representation_is_refused(mr):
    with pytest.raises(DataError, match="not written as"):
        format_prompt(mr)


def test_load_examples_gives_the_split_and_unique_prompts_one_row_each(e2e):
    examples = load_examples("e2e", split="validation", require_completion=True)
    assert examples.column_names == ["prompt", "completion", "references", "mr"]
    assert examples["completion"][:] == e2e["validation"]["completion"][:]
    prompts = unique_prompts(examples)
    assert len(prompts) == 98
    assert sum(map(len, prompts["references"])) == 768


def test_unknown_split_offers_the_nearest():
    message = "^e2e: no split 'valid'; its splits are 'train', 'validation', 'test'. Did you mean 'validation'"
    with pytest.raises(DataError, match=message):
        load_examples("e2e", split="valid")
