"""What the platform's tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from longtake.platform.train.settings import Settings

FitAll = Callable[[Path, Sequence[Settings], int], None]


@pytest.fixture(scope="session")
def fit_all(ray_cluster: str) -> FitAll:
    """fit_all(scratch, runs, workers): train one run after the other in one Ray Train job, for starting one takes ten
    times as long as runs of tests.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def fit(scratch: Path, runs: Sequence[Settings], workers: int) -> None:
        from longtake.platform.train.loop import train

        for each in runs:
            each.folder.mkdir(parents=True, exist_ok=True)
        TorchTrainer(
            lambda config: [train(each) for each in config["runs"]],
            train_loop_config={"runs": runs},
            scaling_config=ScalingConfig(num_workers=workers),
            run_config=RunConfig(storage_path=str(scratch)),
        ).fit()

    return fit
