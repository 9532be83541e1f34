"""A CLT read back: its device, and the dtype it was saved in or another one."""

import pytest
import torch
from clts import connect_random, language_model, random_clt
from torch import nn

from sparseclt.model.clt import SparseCLT


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A CLT in bf16 with learned connections, whose logits stay in fp32."""
    clt = random_clt(language_model("gpt2", torch.float32)).to(torch.bfloat16)
    connect_random(clt, 4)
    for module in clt:
        if module.upstream:
            module.logits = nn.Parameter(torch.randn(module.latents, 4))
    return clt, clt.save_pretrained(tmp_path_factory.mktemp("saved") / "clt")


def test_the_weights_keep_the_dtype_they_were_saved_in(saved):
    clt, path = saved
    loaded = SparseCLT.from_pretrained(path)
    expected, got = clt.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name].to(got[name].dtype)) for name in got)
    assert all(parameter.dtype == expected[name].dtype for name, parameter in loaded.named_parameters())


def test_another_dtype_can_be_asked_for(saved):
    clt, path = saved
    loaded = SparseCLT.from_pretrained(path, dtype=torch.float64)
    assert loaded.transcoder(1).W_dec.dtype == torch.float64 and loaded.transcoder(1).logits.dtype == torch.float32
    assert torch.equal(loaded.transcoder(1).W_dec, clt.transcoder(1).W_dec.double())


def test_the_device_is_that_which_was_asked_for(saved, monkeypatch):
    moves = []
    to = SparseCLT.to
    monkeypatch.setattr(SparseCLT, "to", lambda self, device, dtype: moves.append(device) or to(self, dtype=dtype))
    SparseCLT.from_pretrained(saved[1], device="cuda:1")
    assert moves == ["cuda:1"]
