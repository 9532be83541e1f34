"""The atlas and the browser that the tests of this folder share."""

import pytest
from atlases import Atlas, make_atlas
from browser import chromium


@pytest.fixture(scope="session")
def atlas(tmp_path_factory) -> Atlas:
    return make_atlas(tmp_path_factory.mktemp("atlas") / "pages")


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser
