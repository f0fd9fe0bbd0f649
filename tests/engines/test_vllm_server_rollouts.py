"""Rollouts with `vllm_mode: server`, by vLLM's own server on a CPU.

TRL sends new weights to the server through NCCL alone, which needs a GPU. Here they go through a folder, from which
the server reloads. All else is TRL's and vLLM's own: the server's options, the walk over the weights, the requests.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm_on_cpu import build_word_model, needs_vllm, record
from vllm_runs import UPDATES, distances, gaps, make_trainer
from vllm_server import serving

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def server(student_folder):
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    command = build_command(ScriptArguments(model=student_folder, dtype="float32", max_model_len=64))
    own = command.index("serve") + 2  # the options after the model, without those of `serving`
    options = [option for option in command[own:] if option != "--enforce-eager"]
    for name in ("--host", "--port"):
        place = options.index(name)
        del options[place : place + 2]
    with serving(student_folder, *options, development=True) as url:
        yield url


@pytest.fixture
def weights_by_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, student_folder: str) -> list[int]:
    """Replace NCCL by a folder; return a list that gets the number of tensors of each update."""
    from trl.generation.vllm_client import VLLMClient

    folder, sent = tmp_path / "weights", []
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(student_folder) / name).read_bytes())

    def update_named_params(self, metadata, named_params) -> None:
        tensors = {name: value.detach().clone().contiguous() for name, value in named_params}
        assert [(name, str(t.dtype).removeprefix("torch."), [*t.shape]) for name, t in tensors.items()] == metadata
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._post(f"{self.base_url}/collective_rpc", json=call)
        sent.append(len(tensors))

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", update_named_params)
    return sent


def test_samples_of_the_server_follow_the_trained_student(tmp_path, student_folder, server, weights_by_folder):
    trainer = make_trainer(tmp_path / "out", student_folder, vllm_mode="server", vllm_server_base_url=server)
    trainer.train()
    gap = gaps(trainer)
    own, before = distances(trainer, {0})
    record(
        "server",
        {
            "dtype": "float32",
            "updates": UPDATES,
            "gap_mean": gap["mean"],
            "gap_max": gap["max"],
            "samples": 4096,
            "distance_to_own_law": own,
            "distance_to_law_before_training": before,
        },
    )
    assert weights_by_folder == [len([*build_word_model(0).parameters()])] * (UPDATES + 1)
    assert gap["max"] < 1e-4  # both models in float32
    assert abs(own) < 5 < before


def test_without_a_gpu_trl_refuses(tmp_path, student_folder, server):
    with pytest.raises(NotImplementedError, match="needs a CUDA device") as refusal:
        make_trainer(tmp_path, student_folder, vllm_mode="server", vllm_server_base_url=server)
    place = refusal.traceback[-1]
    assert place.path.name == "vllm_client.py"
    assert not torch.cuda.is_available()
    record("server_mode", {"file": f"trl/generation/{place.path.name}", "function": place.name})
    assert place.name == "init_communicator"
