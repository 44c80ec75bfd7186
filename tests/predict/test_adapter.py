"""--adapter: what a LoRA run trained, added to the weights of the model it started from."""

import json

import pytest
import torch
from safetensors.torch import save_file

from photon_data.errors import UsageError
from photon_train.answering.loading import load_predictor
from photon_train.checkpoint import ADAPTER, STATE, write_digests

LAYER = "base_model.model.model.language_model.layers.1.self_attn.q_proj"


@pytest.fixture
def checkpoint(model_dir, tmp_path):
    """Return a function that writes a checkpoint of a LoRA run of rank 2 and alpha 6, with an update of one layer."""
    plain = load_predictor(str(model_dir), device="cpu").model
    weight = plain.model.language_model.layers[1].self_attn.q_proj.weight
    norm = "base_model.model.model.language_model.norm.weight"

    def write(**changed):
        torch.manual_seed(0)
        tensors = {
            f"{LAYER}.lora_A.default.weight": torch.randn(2, weight.shape[1]),
            f"{LAYER}.lora_B.default.weight": torch.randn(weight.shape[0], 2),
            norm: torch.full((weight.shape[1],), 3.0),
        }
        folder = tmp_path / "checkpoint-1"
        folder.mkdir()
        save_file(tensors | {name: value for name, value in changed.items() if name != "settings"}, folder / ADAPTER)
        settings = changed.get("settings", {"lora_rank": 2, "lora_alpha": 6})
        state = {"step": 1, "epoch": 0, "step_in_epoch": 1, "rows": "", "settings": settings}
        (folder / STATE).write_text(json.dumps(state))
        write_digests(folder, [ADAPTER, STATE])
        return folder, plain, tensors

    return write


def test_an_update_is_added_by_alpha_over_rank_and_other_weights_are_replaced(model_dir, checkpoint):
    folder, plain, tensors = checkpoint()
    found = load_predictor(str(model_dir), device="cpu", adapter=str(folder)).model
    down, up = tensors[f"{LAYER}.lora_A.default.weight"], tensors[f"{LAYER}.lora_B.default.weight"]
    before, after = (m.model.language_model.layers[1].self_attn.q_proj.weight.detach() for m in (plain, found))
    by_hand = [
        [float(before[i, j]) + 3 * sum(float(up[i, r] * down[r, j]) for r in range(2)) for j in range(4)]
        for i in range(4)
    ]
    torch.testing.assert_close(after[:4, :4], torch.tensor(by_hand), atol=1e-5, rtol=1e-5)
    assert found.model.language_model.norm.weight.eq(3.0).all()
    changed = [n for (n, a), b in zip(plain.named_parameters(), found.parameters(), strict=True) if not a.equal(b)]
    assert len(changed) == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base_model.model.elsewhere.lora_A.default.weight": torch.ones(2, 2)}, "elsewhere"),
        ({f"{LAYER}.lora_A.default.weight": torch.ones(2, 3)}, "update of"),
        ({"settings": {}}, "lora_rank"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(model_dir, checkpoint, changed, said):
    folder, _, _ = checkpoint(**changed)
    with pytest.raises(UsageError, match=said):
        load_predictor(str(model_dir), device="cpu", adapter=str(folder))


def test_a_folder_without_an_adapter_and_a_damaged_one_are_refused(model_dir, checkpoint):
    with pytest.raises(UsageError, match="expected a checkpoint of a LoRA run"):
        load_predictor(str(model_dir), device="cpu", adapter=str(model_dir))
    folder, _, _ = checkpoint()
    content = bytearray((folder / ADAPTER).read_bytes())
    content[-1] ^= 1
    (folder / ADAPTER).write_bytes(bytes(content))
    with pytest.raises(UsageError, match="with other content"):
        load_predictor(str(model_dir), device="cpu", adapter=str(folder))
