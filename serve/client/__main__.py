"""Ask a Longtake server for a video, and save it: longtake-client hall.png --actions w-48,dw-24 --seconds 6"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import httpx

from . import ApiError, Client, Video, VideoFailed

_WIDTH = 40


def main(argv: list[str] | None = None) -> None:
    """Ends with status 2 and one line when the server refuses, or is not there."""
    args = _parser().parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in ("actions", "seconds", "seed", "fov_deg")}
    try:
        with Client(args.server, args.key) as client:
            video = client.create(args.image, args.prompt, **given)
            client.wait(video.id, _show)
            print(file=sys.stderr)
            client.save(video.id, args.out, args.poses)
            if not args.keep:
                client.delete(video.id)
    except (ApiError, VideoFailed, OSError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(args.out)


def _show(video: Video) -> None:
    done = "#" * (video.progress * _WIDTH // 100)
    print(f"\r[{done:{_WIDTH}}] {video.progress:3} % {video.status:12}", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longtake-client", description=__doc__)
    add = parser.add_argument
    add("image", type=Path, help="PNG, JPEG, WebP or BMP, with which the video begins")
    add("--actions", default="w-24", help="keys that are repeated to the end (default: %(default)s)")
    add("--seconds", type=float, help="by default what the actions last")
    add("--prompt", default="", help="what is to be seen")
    add("--seed", type=int, default=0)
    add("--fov-deg", type=float, help="horizontal field of view of the image")
    add("--out", type=Path, default=Path("video.mp4"), help="(default: %(default)s)")
    add("--poses", type=Path, help="also write where the camera was, as NumPy's .npz")
    add("--keep", action="store_true", help="leave the video on the server")
    add("--server", default=os.environ.get("LONGTAKE_SERVER", "http://127.0.0.1:8000"), help="(default: %(default)s)")
    add("--key", default=os.environ.get("LONGTAKE_KEY"), help="if it asks for one (default: LONGTAKE_KEY)")
    return parser


if __name__ == "__main__":
    main()
