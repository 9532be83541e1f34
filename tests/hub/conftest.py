"""What the tests of this folder share: a hub on this machine, and a CLT to push."""

import pytest
import torch
from clts import connect_random, language_model, random_clt
from local_hub import local_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, with a cache of its own."""
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api

    with local_hub() as server:
        for module in (constants, hf_api, file_download):
            if hasattr(module, "ENDPOINT"):
                monkeypatch.setattr(module, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        huggingface_hub.utils.disable_progress_bars()
        yield server
        huggingface_hub.utils.enable_progress_bars()


@pytest.fixture(scope="module")
def clt():
    clt = random_clt(language_model("gpt2", torch.float32))
    connect_random(clt, 4)
    return clt.eval()
