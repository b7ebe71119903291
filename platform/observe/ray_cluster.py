"""A Ray cluster to run on: the one this process belongs to, or a private one on the loopback interface."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import longtake
from longtake.platform.observe.job import debugging

# Set before Ray is imported here or in a child: these are read at import time.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# torch's OpenMP threads spin while they wait. Where actors share the cores of a small machine, each then waits for
# threads that the other's spinning keeps from running. A process that runs alone loses a little by this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import ray  # noqa: E402
import ray.data  # noqa: E402
from ray._private import ray_constants  # noqa: E402

_LONGEST_TEMP_DIR = 40  # a unix socket's path holds 107 characters, of which Ray's session folder takes some 65


def connect(num_cpus: int = 8) -> None:
    """Connect this process to Ray; does nothing when it is connected already.

    Inside a submitted job, and where RAY_ADDRESS names a cluster, join it. Otherwise start one that ends with this
    process: bound to 127.0.0.1, without dashboard, with at least `num_cpus` logical CPUs. Those are bookkeeping, not
    cores: on a small machine, actors that hold every CPU would leave none for the tasks that they wait for.

    In a source tree the workers import `longtake` from it, installed or not.

    ValueError when RAY_ADDRESS is a dashboard's URL (which only `ray job submit` understands), ConnectionError when
    no cluster answers there.
    """
    if ray.is_initialized():
        return
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    address = os.environ.get("RAY_ADDRESS", "")
    if not submitted and address.startswith(("http://", "https://")):
        raise ValueError(
            f"RAY_ADDRESS={address} is a dashboard: give it to `ray job submit`, "
            "or set RAY_ADDRESS to the cluster's host:6379, or unset it to run on this machine alone"
        )
    if submitted:
        _init(address="auto")
    elif address and address != "local":
        _init(address=address, runtime_env=_ship_source(address))
    else:
        _start_local(max(num_cpus, os.cpu_count() or 1))
    _quiet_data()


def _start_local(num_cpus: int) -> None:
    # Without this Ray binds to every interface and replaces 127.0.0.1 by the machine's outer address.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    if longtake.source_root is not None:
        os.environ["PYTHONPATH"] = _python_path(longtake.source_root)  # the workers inherit it
    folder = _temp_dir()
    _init(address="local", num_cpus=num_cpus, include_dashboard=False, _temp_dir=str(folder))
    atexit.register(_end_local, folder)


def _init(**options: Any) -> None:
    level = logging.INFO if debugging() else logging.ERROR
    ray.init(logging_level=level, log_to_driver=debugging(), **options)


def _ship_source(address: str) -> dict[str, Any]:
    """The runtime environment that lets a joined cluster's workers import this source tree."""
    if longtake.source_root is None:
        return {}
    if address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]"):
        return {"env_vars": {"PYTHONPATH": _python_path(longtake.source_root)}}
    return {"working_dir": str(longtake.source_root)}


def _python_path(root: Path) -> str:
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(root)]
    return os.pathsep.join([str(root), *others])


def _temp_dir() -> Path:
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="longtake-", dir=base if len(base) + 18 <= _LONGEST_TEMP_DIR else "/tmp"))
    folder.chmod(0o700)
    return folder


def _end_local(folder: Path) -> None:
    ray.shutdown()
    if debugging():
        print(f"Ray's logs stay in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _quiet_data() -> None:
    """Of Ray Data's narration keep the warnings: jobs report their own progress, and errors are raised as well."""
    if debugging():
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.addFilter(lambda record: record.levelno == logging.WARNING and "Progress bars" not in record.msg)
