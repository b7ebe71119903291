"""results.parquet: one row a candidate. No costs or times are in it, which lie in the records: it is the same to the
byte however often a search was cut short, and whoever made what.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from longtake.platform.evaluate.scores import SCORES, WEIGHTS, total
from longtake.platform.store.files import write
from longtake.platform.store.run_folder import RunFolder

RATINGS = (*SCORES, "novelty", "total")  # novelty: among the candidates of the same image
AFTER = (*SCORES, "total")  # of the refined video; its novelty counts as before
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("purpose", pa.string()),  # "search" or "long"
        ("image", pa.string()),
        ("caption", pa.string()),
        ("trajectory", pa.string()),
        ("actions", pa.string()),
        ("branches", pa.list_(pa.string())),  # of a tree's leaf, the actions at each level
        ("seed", pa.int64()),
        *((name, pa.float64()) for name in RATINGS),
        ("selected", pa.bool_()),
        ("video", pa.string()),  # relative to the table; null until it is refined
        *((f"refined_{name}", pa.float64()) for name in AFTER),
        ("fps", pa.float64()),
        ("num_frames", pa.int32()),
        ("c2w", pa.list_(pa.float32())),  # (F, 4, 4), OpenCV axes, metres
        ("intrinsics", pa.list_(pa.float32())),  # (F, 4) fx, fy, cx, cy in pixels of the video
        ("licence", pa.string()),
        ("provenance", pa.string()),  # JSON
    ]
)


def write_table(run: RunFolder) -> Path:
    """Replace results.parquet by all that the folder holds now; best candidates of each image first."""
    selection = run.selection() or {"weights": WEIGHTS, "images": {}}
    ranked = {row["key"]: row for rows in selection["images"].values() for row in rows}
    rows = []
    for key in run.finished():
        record, rollout, refined = run.record(key), run.rollout(key), run.refined(key)
        if record is None or rollout is None:
            continue
        place = ranked.get(key, {"novelty": None, "selected": record["purpose"] == "long"})
        scores = record["scores"] | {"novelty": place["novelty"]}
        after = refined["scores"] | {"novelty": place["novelty"]} if refined else {}
        rows.append(
            {name: record.get(name) for name in SCHEMA.names}
            | {name: scores.get(name) for name in (*SCORES, "novelty")}
            | {"total": _total(scores, selection["weights"]), "selected": place["selected"]}
            | {f"refined_{name}": after.get(name) for name in SCORES}
            | {"refined_total": _total(after, selection["weights"]) if refined else None}
            | {
                "video": run.video_path(key) if refined else None,
                "c2w": rollout["c2w"].ravel(),
                "intrinsics": rollout["intrinsics"].ravel(),
                "provenance": json.dumps(record["provenance"] | (refined or {}).get("provenance", {}), sort_keys=True),
            }
        )
    rows.sort(key=lambda row: (row["purpose"] == "long", row["image"], -row["total"], row["key"]))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer)
    path = run.path / "results.parquet"
    write(path, buffer.getvalue())
    return path


def _total(scores: Mapping[str, float | None], weights: Mapping[str, float]) -> float:
    """Of those scores that are known: novelty is not of what was not ranked, such as the long video."""
    known = {name: score for name, score in scores.items() if score is not None}
    return total(known, {name: weight for name, weight in weights.items() if name in known})
