"""The parts of check-faults; the job itself takes minutes."""

from __future__ import annotations

import json

import fsspec
import pytest
import s3fs

from longtake.jobs import check_faults
from longtake.jobs.check_faults import BUCKET, ObjectStore
from longtake.platform.train import run, stages
from longtake.platform.train.settings import Settings

pytestmark = pytest.mark.cpu


def test_a_dry_run_prints_the_stages_and_short_runs_are_refused(capsys):
    check_faults.main(["--dry-run", "--steps", "9"])
    assert [stage["steps"] for stage in json.loads(capsys.readouterr().out)["stages"]] == [9, 9, 9]
    with pytest.raises(ValueError, match="--steps 7 must be at least 8"):
        check_faults.main(["--steps", "7"])


def test_an_object_store_that_was_killed_holds_its_folder_again(s3_server, tmp_path, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")  # to be as it was afterwards
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "a").write_bytes(b"first")
    s3fs.S3FileSystem.clear_instance_cache()
    with ObjectStore(tmp_path) as store:
        for content in (b"first", b"second"):
            (tmp_path / "latents" / "a").write_bytes(content)
            store.start()
            assert fsspec.filesystem("s3").cat_file(f"{BUCKET}/latents/a") == content
            store.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_fault_that_did_not_come_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "launch", lambda settings: None)
    settings = Settings(stages.get("stage1_gdn", "tiny"), check_faults.presets.get("tiny"), (), str(tmp_path), {})
    with pytest.raises(RuntimeError, match="ended before its fault came"):
        check_faults._final_loss(settings, lambda ended: check_faults._wait(ended, lambda: False))
