"""The atlas that the tests of this folder share."""

import pytest
from atlases import Atlas, make_atlas


@pytest.fixture(scope="session")
def atlas(tmp_path_factory) -> Atlas:
    return make_atlas(tmp_path_factory.mktemp("atlas") / "pages")
