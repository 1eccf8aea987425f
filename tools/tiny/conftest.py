"""What several tests of `tiny`'s training build once. PyTorch is imported only by those that ask."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def tokenizer():
    """Build the tokenizer once."""
    import tokenizer as tiny_tokenizer

    return tiny_tokenizer.build_tokenizer(0)


@pytest.fixture(scope="module")
def processor():
    """Build the image processor once."""
    import architecture
    import tower

    return tower.build_image_processor(architecture.build_vision_config(), architecture.SOFT_TOKENS)
