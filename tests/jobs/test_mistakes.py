"""What users get wrong ends in one line that says what to change, and status 2; what was written before stays."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from longtake.jobs.encode_latents import ShardEncoder
from longtake.model import weights
from longtake.model.camera import parse_actions
from longtake.model.presets import get
from longtake.platform.data.clip import Clip
from longtake.platform.data.latents import EncodedClip, LatentStore
from longtake.platform.data.store import ClipStore
from longtake.platform.observe.job import run_job, user_message
from longtake.platform.store.run_folder import RunFolder

pytestmark = pytest.mark.cpu

Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def desk(small_weights, tmp_path_factory) -> Path:
    """A folder with everything that can be confused: images, trajectories, weights and stores, good and bad."""
    folder = tmp_path_factory.mktemp("desk")
    good = parse_actions("w-16", image_size=(64, 96))
    poses = good.c2w.numpy()
    scaled, missing = poses.copy(), poses.copy()
    scaled[3, :3, :3] *= 2
    missing[3, 0, 3] = np.nan
    for name, array in (("good", poses), ("scaled", scaled), ("nan", missing), ("flat", poses[:, :3])):
        np.save(folder / f"{name}.npy", array)
    shutil.copy(folder / "good.npy", folder / "good.npz")
    for name in ("text.png", "text.npy", "file"):
        (folder / name).write_text("some text\n")
    whole = (small_weights / "images" / "hall.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:2000])
    (folder / "empty").mkdir()

    for name in ("weights", "other", "newer", "broken", "partless", "cut", "imageless"):
        shutil.copytree(small_weights, folder / name)
    config = json.loads((small_weights / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(config | {"name": "sana-wm"}))
    (folder / "newer" / "config.json").write_text(json.dumps(config | {"depths": 4}))
    (folder / "broken" / "config.json").write_text(json.dumps(config)[:40])
    shutil.rmtree(folder / "partless" / "refiner")
    cut_in_half(folder / "cut" / "transformer" / "model.safetensors")
    shutil.rmtree(folder / "imageless" / "images")

    frames = np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), dtype=np.uint8)
    clips = [
        Clip(f"start/{n}", frames, poses, good.intrinsics.numpy(), 16.0, "", 1.0, "CC0-1.0", split="test")
        for n in range(2)
    ]
    for name in ("fan", "damaged", "truncated"):
        ClipStore(folder / name).write_shard("a", clips)
    cut_in_half(folder / "truncated" / "a.parquet")
    damaged = bytearray((folder / "damaged" / "a.parquet").read_bytes())
    damaged[: len(damaged) * 9 // 10] = b"?" * (len(damaged) * 9 // 10)
    (folder / "damaged" / "a.parquet").write_bytes(damaged)

    encoded = [EncodedClip("one", np.zeros((4, 3, 2, 3), np.float16), poses, good.intrinsics.numpy())]
    for name in ("encoded", "cut_latents"):
        LatentStore(str(folder / name)).write_shard("a", encoded)
    cut_in_half(folder / "cut_latents" / "a.parquet")
    (folder / "foreign").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), folder / "foreign" / "a.parquet")
    ClipStore(folder / "training").write_shard("a", [dataclasses.replace(clip, split="train") for clip in clips])
    return folder


def cut_in_half(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


@pytest.fixture
def refusal(desk, monkeypatch, capsys) -> Refusal:
    """The one line with which a job, given those words in the desk's folder, ends with status 2."""
    monkeypatch.chdir(desk)

    def run(job: str, words: str) -> str:
        with pytest.raises(SystemExit) as end:
            run_job(importlib.import_module(f"longtake.jobs.{job}").main, words.split())
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--images text.png", "text.png cannot be read as an image"),
        ("--images cut.png", "cut.png cannot be read as an image"),
        ("--images nowhere.png", "there is no image at nowhere.png"),
        ("--images empty", "no images in empty: put .png or .jpg files there"),
        ("--weights imageless", "imageless ships no images/: give some with --images"),
        ("--weights nowhere", "there is no weights folder at nowhere: give a folder or hf://owner/name"),
        ("--weights other", "other holds weights of preset 'sana-wm', not of 'tiny': change one of the two"),
        ("--weights newer", "newer/config.json is not the configuration of weights that this version reads"),
        ("--weights broken", "broken/config.json is not the configuration of weights that this version reads"),
        ("--weights partless", "partless has no refiner/"),
        ("--weights cut", "cut/transformer/model.safetensors is not a whole safetensors file, fetch it again"),
        ("--preset tinny", "did you mean 'tiny'?"),
        ("--actions forward-16", "unknown keys for: use adijklsw or none"),
        ("--actions w16", "'w16' must be KEYS-FRAMES"),
        ("--trajectory scaled.npy", "scaled.npy: c2w of frame 3 is not a rotation"),
        ("--trajectory nan.npy", "nan.npy: c2w of frame 3 has values that are not finite: remove NaN"),
        ("--trajectory flat.npy", "flat.npy: c2w must be (frames, 4, 4), not (17, 3, 4)"),
        ("--trajectory text.npy", "text.npy holds no arrays of numbers"),
        ("--trajectory good.npz", "good.npz is a single array, no saved trajectory: name it .npy"),
        ("--trajectory nowhere.npy", "there is no trajectory at nowhere.npy"),
        ("--trajectory good.npy --fov 180", "180.0 degrees is outside 25 to 120"),
        ("--fov nan", "nan degrees is outside 25 to 120"),
        ("--out file", "file is a file: --out needs a folder"),
        ("--out s3://bucket/run", "must be a local folder"),
    ],
)
def test_of_a_search(refusal, desk, words, says):
    assert says in refusal("search_refine", f"--weights weights --actions w-16 --long 0 --out out {words}")
    assert not (desk / "out").exists()


@pytest.mark.parametrize(
    ("job", "words", "says"),
    [
        ("evaluate_worlds", "--store empty", "no clips in empty: render some"),
        ("evaluate_worlds", "--store truncated", "truncated/a.parquet is not a whole shard: delete it and make it"),
        ("evaluate_worlds", "--store damaged --long 0", "damaged/a.parquet is damaged: delete it and make it again"),
        ("evaluate_worlds", "--store fan --device gpu", "--device gpu cannot be used here"),
        ("evaluate_worlds", "--store fan --name My_figures", "must be lower-case words"),
        ("evaluate_worlds", "--store fan --out file", "--out file must be a local folder"),
        ("evaluate_worlds", "--store fan --out s3://bucket/sheets", "must be a local folder"),
        ("encode_latents", "--data encoded --latents new --frames 17", "encoded/a.parquet has no column 'frames'"),
        ("encode_latents", "--data foreign --latents new --frames 17", "foreign/a.parquet has no column 'key'"),
        ("encode_latents", "--data empty --latents new", "no clips in empty: render some"),
        ("encode_latents", "--data fan --latents new --frames 80", "--frames 80 must be 8 k + 1"),
        ("encode_latents", "--data fan --latents new --weights other", "other holds weights of preset 'sana-wm'"),
        ("encode_latents", "--data fan --latents new --preset tinny", "did you mean 'tiny'?"),
    ],
)
def test_of_other_users_of_weights(refusal, job, words, says):
    assert says in refusal(job, f"--weights weights {words}")


@pytest.mark.parametrize(
    ("job", "words", "says"),
    [
        ("render_worlds", "--store file --clips 1", "file is a file: a clip store is a folder"),
        ("render_worlds", "--store new --clips 0", "0 clips of 81 frames: ask for at least 1"),
        ("render_worlds", "--store new --maps MAP99", "unknown map 'MAP99'"),
        ("stage0_vae", "--data empty", "has no train clips: make some with `longtake render-worlds`"),
        ("stage1_gdn", "--data empty", "has no train clips: make some with `longtake encode-latents`"),
        ("stage0_vae", "--data encoded", "holds no frames, which stage0_vae trains on: give a store that `render-"),
        ("stage1_gdn", "--data training", "holds no latents, which stage1_gdn trains on: give a store that `encode-"),
        ("stage0_vae", "--data truncated", "truncated/a.parquet is not a whole shard: delete it and make it again"),
        ("stage0_vae", "--data foreign", "foreign/a.parquet has no column 'split'"),
        ("stage0_vae", "--data damaged", "damaged/a.parquet is damaged: delete it and make it again"),
        ("stage1_gdn", "--data cut_latents", "cut_latents/a.parquet is not a whole shard: delete it and make it again"),
        ("stage1_gdn", "--data encoded --preset tinny", "did you mean 'tiny'?"),
        ("stage1_gdn", "--data encoded --run s3://bucket/run", "--run s3://bucket/run must be a local folder"),
        ("stage1_gdn", "--data empty --set batchsize=3", "did you mean 'batch_size'?"),
        ("stage3_minute", "--data empty", "give its run with --init"),
        ("stage5_refiner", "--data empty --init empty", "--init empty is neither a run nor a weights folder"),
        ("check_parity", "--preset tiny --weights empty", "empty is not a weights folder: it holds none of"),
        ("check_parity", "--cases head112", "did you mean 'head112_1x2x3'?"),
    ],
)
def test_of_makers_of_data_and_weights(refusal, job, words, says):
    assert says in refusal(job, words)


@pytest.mark.parametrize("store", ["truncated", "damaged"])
def test_a_damaged_shard_is_named_where_it_is_encoded(desk, store):
    config = weights.config_for(get("tiny"), desk / "weights")
    encoder = ShardEncoder(config, str(desk / store), str(desk / "new"), str(desk / "weights"), 17, 1)
    with pytest.raises(ValueError, match=f"{store}/a.parquet is .*: delete it and make it again"):
        encoder({"shard": np.array(["a"])})
    assert not (desk / "new").exists()


@pytest.fixture
def s3(s3_server, monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """To point AWS_ENDPOINT_URL elsewhere, without retries."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()  # an instance keeps the endpoint that it has met first
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def denying(s3) -> Iterator[None]:
    """An object store that answers every request with 403."""

    class Denier(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        do_HEAD = do_GET

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Denier)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    s3.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


ON_S3 = [
    ("render_worlds", "--store s3://bucket/clips --clips 1"),
    ("encode_latents", "--data s3://bucket/clips --latents new --weights weights"),
    ("encode_latents", "--data fan --latents s3://bucket/latents --weights weights --frames 17"),
    ("evaluate_worlds", "--store s3://bucket/clips --weights weights"),
    ("stage0_vae", "--data s3://bucket/clips"),
    ("stage1_gdn", "--data s3://bucket/latents"),
]


@pytest.mark.parametrize(("job", "words"), ON_S3)
def test_a_bucket_that_denies_access_names_the_credentials(denying, refusal, job, words):
    assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL" in refusal(job, words)


@pytest.mark.parametrize(("job", "words"), ON_S3[:1] + ON_S3[-1:])
def test_an_object_store_that_does_not_answer_names_its_endpoint(s3, refusal, job, words):
    s3.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    line = refusal(job, words)
    assert "http://127.0.0.1:9/" in line and "check AWS_ENDPOINT_URL" in line


def test_a_damaged_file_of_a_search_is_named(tmp_path):
    run = RunFolder(tmp_path / "out")
    run.write_record("one", {"score": 1})
    run.write_rollout("one", np.zeros((1, 1, 1, 1)), np.eye(4)[None], np.ones((1, 4)))
    for file, read in (("records/one.json", run.record), ("rollouts/one.npz", run.rollout)):
        cut_in_half(tmp_path / "out" / file)
        with pytest.raises(ValueError, match=f"{file} is damaged: delete it"):
            read("one")


def test_a_full_disk_is_named_and_spoils_nothing(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "out")
    run.write_record("first", {"score": 1})
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        whole(path, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    for key in ("first", "second"):
        with pytest.raises(OSError) as error:
            run.write_record(key, {"score": 2})
        file = tmp_path / "out" / "records" / f"{key}.json"
        assert user_message(error.value) == f"{file}: No space left on device"
    assert run.finished() == ["first"] and run.record("first") == {"score": 1}
    assert [path.name for path in (tmp_path / "out" / "records").iterdir()] == ["first.json"]
