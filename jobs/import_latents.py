"""Turn SANA-WM's example training set into a store of latents; run it again to resume."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from longtake.model import presets
from longtake.platform.data.captions import CaptionEncoder, check_encoder
from longtake.platform.data.latents import EncodedClip, LatentStore
from longtake.platform.data.official import OfficialZip, pairs
from longtake.platform.data.store import DamagedShard
from longtake.platform.observe.job import run_job
from longtake.platform.observe.notices import say
from longtake.platform.observe.progress import Progress


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = presets.get(args.preset)
    stride = config.vae_stride[0]
    if args.frames < 1 or (args.frames - 1) % stride or args.shard < 1:
        raise ValueError(f"--frames {args.frames} must be {stride} k + 1, and --shard {args.shard} at least 1")
    if args.text:
        if not config.text.frozen:
            raise ValueError(f"--text: preset {args.preset!r} trains its own text encoder")
        check_encoder(args.text)
    zips = pairs(Path(args.data), Path(args.cache))
    if args.dry_run:
        print(json.dumps(vars(args) | {"zips": len(zips), "text": args.text and str(args.text)}, indent=2))
        return
    store = LatentStore(args.latents)
    encoding = {"preset": args.preset, "frames": args.frames, "from": "zips", "shard": args.shard}
    store.claim(encoding | ({"text": True} if args.text else {}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captions = CaptionEncoder(config, args.text, device) if args.text else None
    done, written = set(store.shards()), 0
    with Progress(len(zips), "zips", "import") as progress:
        for path, cache in zips:
            try:
                source = OfficialZip(path, cache, config, args.frames, args.licence, args.min_bytes)
                written += _write(store, source, args.shard, done, captions)
            except DamagedShard as error:
                say(f"{error}; going on without it")
            progress.update(1, clips=written)
    if not store.shards():
        raise ValueError(f"no clip of {args.data} has {args.frames} frames: lower --frames or --min-bytes")
    print(f"{len(store)} encoded clips in {args.latents}")


def _write(store: LatentStore, source: OfficialZip, size: int, done: set[str], captions: CaptionEncoder | None) -> int:
    """The clips written: `size` a shard, those of shards that are there already left out."""

    def read(key: str) -> EncodedClip | None:
        try:
            return source.clip(key)
        except DamagedShard as error:
            say(f"{error}; going on without it")

    written, keys = 0, source.keys
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(keys), size):
            name = f"{source.path.stem}-{start:06d}"
            if name in done:
                continue
            if clips := [clip for clip in pool.map(read, keys[start : start + size]) if clip]:
                store.write_shard(name, captions(clips) if captions else clips)
                written += len(clips)
    return written


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="import-latents", description=__doc__)
    add = parser.add_argument
    add("--preset", default="sana-wm", help=f"one of {', '.join(presets.names())} (default: %(default)s)")
    add("--data", required=True, metavar="FOLDER", help="zips of captions, and their sidecars")
    add("--cache", required=True, metavar="FOLDER", help="zips of latents")
    add("--latents", required=True, help="store of latents to write: folder or s3://bucket/prefix")
    add(
        "--text",
        type=Path,
        metavar="FOLDER",
        help="text_encoder/ and tokenizer/, whose features of captions sana-wm reads",
    )
    add("--frames", type=int, default=961, help="frames a row, longer clips are cut (default: %(default)s, a minute)")
    add("--min-bytes", type=int, default=10 << 20, help="smaller entries of latents are left out (default: 10 MiB)")
    add("--shard", type=int, default=16, help="clips a shard (default: %(default)s)")
    add("--licence", default="non-commercial", help="of the clips (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)
