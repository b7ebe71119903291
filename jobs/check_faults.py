"""Train through faults and compare the losses with a calm run's.

A worker is killed twice, the object store is killed and restarts, a cut shard is added. Stages 2 and 3 follow a calm
stage 1, and through another restart the one with killed workers. On this machine alone, from random latents in an
object store that is started for it (infra/object_store.py).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec

import longtake
from longtake.model import presets
from longtake.platform.data.latents import LatentStore
from longtake.platform.data.random_latents import write_random
from longtake.platform.observe import measurements, notices
from longtake.platform.observe.job import run_job
from longtake.platform.train import checkpoint, log, run, stages
from longtake.platform.train.run import find_parts
from longtake.platform.train.settings import Settings
from longtake.platform.train.stages import Stage

BUCKET = "faults"
LIMIT = 1e-5  # of the relative difference between the final losses


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    chain = [_short(stages.get(name, args.preset), args.steps) for name in CHAIN]
    if args.steps < 8:
        raise ValueError(f"--steps {args.steps} must be at least 8: faults come at steps 2 and 4")
    if args.dry_run:
        print(json.dumps(vars(args) | {"stages": [dataclasses.asdict(stage) for stage in chain]}, indent=2))
        return
    os.environ.pop("RAY_ADDRESS", None)  # another cluster's workers would not see this object store
    preset = presets.get(args.preset)
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, ObjectStore(Path(folder, "objects")) as store:
        write_random(LatentStore(str(store.folder / "latents")), preset, chain[0].frames, clips=2 * args.steps)
        store.start()
        data = ((f"s3://{BUCKET}/latents", 1.0),)
        for name, planned in RUNS.items():
            stage = chain[planned.stage]
            config = run.configured(preset, stage)
            init = find_parts([f"{folder}/{planned.after}"]) if planned.after else {}
            chosen = Settings(stage, config, data, f"{folder}/{name}", init)
            losses[name] = _final_loss(chosen, planned.fault and planned.fault(store, chosen.folder))
    for name, loss in losses.items():
        print(f"{name:36} {loss:.8f}")
    calm = {RUNS[name].stage: loss for name, loss in losses.items() if name.startswith("undisturbed")}
    if other := [name for name, loss in losses.items() if not abs(loss / calm[RUNS[name].stage] - 1) <= LIMIT]:
        raise ValueError(f"{', '.join(other)}: not within {LIMIT:g} of the undisturbed loss")
    if args.write:
        figures = {
            name + ("_loss" if name.startswith("undisturbed") else "_final_loss"): losses[name] for name in losses
        }
        print(f"figures: {measurements.write('faults_train', figures)}")


def _short(stage: Stage, steps: int) -> Stage:
    return dataclasses.replace(
        stage,
        **dict(frames=9, window=9, batch_size=2, micro_batch_size=1, steps=steps, warmup=0, schedule="constant"),
        **dict(checkpoint_steps=2, log_every=1, cache=None, seed=7),  # read from the store to the end
    )


class ObjectStore(contextlib.AbstractContextManager):
    """The server process; the AWS_* variables point to it. What lies in `folder` is what it holds when it starts."""

    def __init__(self, folder: Path) -> None:
        if longtake.source_root is None:
            raise ValueError("check-faults needs infra/object_store.py: run it in a clone of the repository")
        self.folder, self.script = folder, longtake.source_root / "infra" / "object_store.py"
        self.process: subprocess.Popen | None = None
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            self.port = held.getsockname()[1]
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local"}

    def start(self) -> None:
        """Returns when it answers."""
        words = ["--port", str(self.port), "--bucket", BUCKET, "--folder", str(self.folder)]
        command = [sys.executable, str(self.script), *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        if "is ready" not in self.process.stdout.readline():
            raise RuntimeError(f"{self.script} did not start")

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def __exit__(self, *_: object) -> None:
        self.stop()


Fault = Callable[[ObjectStore, Path], Callable[[threading.Event], None]]  # of a run's folder; ends early by the event


def _kill_worker_twice(store: ObjectStore, folder: Path) -> Callable[[threading.Event], None]:
    def kill(ended: threading.Event) -> None:
        for step in (2, 4):
            _wait(ended, lambda step=step: checkpoint.reached(folder / "checkpoints") >= step)
            for process in _descendants(os.getpid()):
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    if "RayTrainWorker" in Path(f"/proc/{process}/cmdline").read_text():
                        os.kill(process, signal.SIGKILL)

    return kill


def _descendants(process: int) -> Iterator[int]:
    """The processes that this one started, and those that they started."""
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                yield child
                yield from _descendants(child)


def _restart_object_store(store: ObjectStore, folder: Path) -> Callable[[threading.Event], None]:
    def restart(ended: threading.Event) -> None:
        _wait(ended, lambda: checkpoint.reached(folder / "checkpoints") >= 2)
        store.stop()
        _wait(ended, lambda: any("does not answer" in line for line in notices.read(folder / log.NOTICES)))
        store.start()

    return restart


def _add_cut_shard(store: ObjectStore, folder: Path) -> Callable[[threading.Event], None]:
    whole = (store.folder / "latents" / "0000.parquet").read_bytes()
    fsspec.filesystem("s3").pipe_file(f"{BUCKET}/latents/cut.parquet", whole[: len(whole) // 2])
    return lambda ended: None


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run: which of the chain's stages, what happens in it, and the run that it starts from."""

    stage: int
    fault: Fault | None = None
    after: str | None = None


CHAIN = ("stage1_gdn", "stage2_hybrid", "stage3_minute")
RUNS = {
    "undisturbed": Planned(0),
    "worker_killed_twice": Planned(0, _kill_worker_twice),
    "object_store_restarted": Planned(0, _restart_object_store),
    "undisturbed_stage2": Planned(1, after="undisturbed"),
    "faults_until_stage2": Planned(1, _restart_object_store, after="worker_killed_twice"),
    "undisturbed_stage3": Planned(2, after="undisturbed_stage2"),
    "faults_until_stage3": Planned(2, after="faults_until_stage2"),
    "truncated_shard": Planned(0, _add_cut_shard),  # which stays in the store
}


def _wait(ended: threading.Event, happened: Callable[[], bool]) -> None:
    while not happened():
        if ended.wait(0.02):
            raise RuntimeError("the run ended before its fault came: raise --steps")


def _final_loss(settings: Settings, fault: Callable[[threading.Event], None] | None) -> float:
    """The loss of the last step of a run, in which the fault came to pass."""
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        came = pool.submit(fault, ended) if fault else None
        try:
            run.launch(settings)
        finally:
            ended.set()
    if came:
        came.result()
    last = log.read(settings.folder)[-1]
    assert last["step"] == settings.stage.steps
    return last["loss"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="check-faults", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--steps", type=int, default=12, help="of each of the four runs (default: %(default)s)")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)
