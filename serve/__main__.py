"""Serve worlds over HTTP: videos that play while they are made.

Starts a private Ray cluster on this machine and all deployments on it, or joins the cluster of RAY_ADDRESS; ends with
Ctrl-C. What was accepted is in --store, and a server that starts there again goes on with it. Any field of
`longtake.serve.settings.Settings` can be --set.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
from typing import Any

from longtake.platform.observe.job import run_job
from longtake.platform.observe.ray_cluster import connect
from longtake.serve.settings import Settings


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    given: dict[str, Any] = {"preset": args.preset, "weights": args.weights, "store": args.store, "keys": args.keys}
    for text in args.set:
        put(given, text)
    settings = Settings.checked(given)
    if args.host not in ("127.0.0.1", "localhost", "::1") and settings.keys is None:
        raise ValueError(f"--host {args.host} can be reached by others: give --keys, or serve 127.0.0.1 alone")
    if args.dry_run:
        print(settings.model_dump_json(indent=2))
        return
    connect(num_cpus=16)
    from ray import serve

    from longtake.serve.app import application

    serve.start(
        http_options={"host": args.host, "port": args.port, "request_timeout_s": None},
        logging_config={"log_level": "WARNING"},
    )
    serve.run(application(settings), name="longtake", route_prefix="/")
    print(
        f"serving {settings.config.name} at http://{args.host}:{args.port}/v1/videos, files in {settings.store}",
        flush=True,
    )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    serve.shutdown()


def put(given: dict[str, Any], text: str) -> None:
    """FIELD=VALUE, or DEPLOYMENT.FIELD=VALUE. ValueError for what is neither."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise ValueError(f"--set {text}: write FIELD=VALUE")
    *outer, last = name.split(".")
    for each in outer:
        given = given.setdefault(each, {})
    try:
        given[last] = json.loads(value)
    except ValueError:
        given[last] = value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="tiny-streaming", help="of a model that streams (default: %(default)s)")
    add("--weights", help="weights folder (default: those shipped)")
    add("--store", default="runs/serve", help="folder or s3:// prefix of what is made (default: %(default)s)")
    add("--keys", help="JSON file of API keys, without which only this machine may ask")
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    add("--port", type=int, default=8000, help="(default: %(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="such as stage1.most=4; can be repeated")
    add("--dry-run", action="store_true", help="print the resolved settings")
    return parser


if __name__ == "__main__":
    run_job(main)
