"""Which losses of workers a run survives."""

import pytest
from ray.exceptions import ActorDiedError

from longtake.platform.train import checkpoint
from longtake.platform.train.recovery import survive

pytestmark = pytest.mark.cpu


class Lost(Exception):
    """What Ray Train raises; `kind` is the class of its one worker's failure."""

    def __init__(self, kind):
        self.worker_failures = {0: kind()}


@pytest.mark.parametrize(("progress_at", "calls_in_all"), [((), 3), ((2, 3), 5)])
def test_losses_are_survived_as_long_as_checkpoints_come(progress_at, calls_in_all, tmp_path, capsys):
    calls = []

    def fit():
        calls.append(None)
        if len(calls) in progress_at:
            checkpoint.write(tmp_path, len(calls), lambda path: None, rank=0, barrier=lambda: None)
        raise Lost(ActorDiedError)

    with pytest.raises(Lost):
        survive(fit, tmp_path, losses=2)
    assert len(calls) == calls_in_all
    where = "from step 3" if progress_at else "from the start"
    assert f"going on {where} (2 of 2 losses in a row)" in capsys.readouterr().err


def test_an_error_of_the_training_is_not_tried_again(tmp_path):
    calls = []

    def fit():
        calls.append(None)
        raise Lost(ValueError)

    with pytest.raises(Lost):
        survive(fit, tmp_path, losses=2)
    assert len(calls) == 1
