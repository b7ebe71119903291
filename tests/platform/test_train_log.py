"""What a run's records say, and where they go."""

import json
import time

import pytest

from longtake.model import presets
from longtake.platform.train import log, stages
from longtake.platform.train.settings import Settings
from longtake.platform.train.tracking import tracking

pytestmark = pytest.mark.cpu

STAGE = stages.get("stage1_gdn", "tiny")


def test_a_record_says_how_much_of_the_peak_is_used(tmp_path):
    recorder = log.Log(tmp_path, STAGE, 0, clip_seconds=0.25)
    time.sleep(0.05)
    recorder.write(1, {"loss": 1.0}, 1e-3, 1.0)
    (record,) = log.read(tmp_path)
    assert record["mfu"] == pytest.approx(record["clips_per_second"] * 0.25, rel=0.01)


def test_records_go_to_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "run").mkdir()
    chosen = Settings(STAGE, presets.get("tiny"), (("clips", 1.0),), str(tmp_path / "run"), {})
    with tracking(chosen, "worlds") as send, log.shown(chosen.folder, chosen.stage, send):
        record = {"step": 1, "seconds": 1.0, "loss": 0.25, "lr": 1e-3, "clips_per_second": 2.0}
        (chosen.folder / log.NAME).write_text(json.dumps(record) + "\n")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # a process of its own writes it
    while b"clips_per_second" not in file.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
