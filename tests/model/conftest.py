"""What the model's tests share."""

import pytest

from longtake.model.config import WorldModelConfig


@pytest.fixture
def config(small_config: WorldModelConfig) -> WorldModelConfig:
    return small_config
