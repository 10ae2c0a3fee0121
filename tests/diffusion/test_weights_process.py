"""The diffusion process that a file of weights states, if it does."""

import pytest
import torch
from safetensors.torch import save_file
from util import small_net

from fastmask import EDM, load_maskdit
from fastmask.diffusion import Denoiser, RectifiedFlow
from fastmask.diffusion.weights import save_weights, weights_for


def test_a_file_that_states_no_process_is_said_to_be_read_as_edm(tmp_path, capsys):
    torch.save(small_net().state_dict(), tmp_path / "weights.pt")
    assert load_maskdit(tmp_path / "weights.pt", num_heads=2, decoder_num_heads=3).process == EDM()
    said = f"{tmp_path / 'weights.pt'} states no diffusion process: it is read as {EDM()}"
    assert " ".join(capsys.readouterr().out.split()) == said
    save_weights(tmp_path / "weights.safetensors", small_net())
    load_maskdit(tmp_path / "weights.safetensors")
    load_maskdit(small_net().state_dict(), num_heads=2, decoder_num_heads=3)
    assert capsys.readouterr().out == ""


def test_weights_that_state_no_process_start_another_with_a_note(tmp_path):
    torch.save(small_net().state_dict(), tmp_path / "weights.pt")
    flow = Denoiser(small_net().model, RectifiedFlow())
    assert weights_for(small_net(), tmp_path / "weights.pt")[1] == []
    assert "was trained with EDM(" in weights_for(flow, tmp_path / "weights.pt")[1][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "ddpm"}', "the process 'ddpm' is unknown; this version knows edm, flow, vp"),
        ('{"name": "edm", "sigma_data": -1}', "sigma_data must be a number above 0, not -1"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_process_that_cannot_be(tmp_path, text, message):
    stated = {"num_heads": "2", "decoder_num_heads": "3", "process": text}
    save_file(small_net().state_dict(), tmp_path / "weights.safetensors", stated)
    with pytest.raises(ValueError, match=f"process that its metadata state cannot be built: .*{message}"):
        load_maskdit(tmp_path / "weights.safetensors")
