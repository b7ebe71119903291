"""results.parquet: one row a candidate."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from longtake.platform.store.files import write
from longtake.platform.store.run_folder import RunFolder

SCORES = ("follow", "sharpness", "drift", "total")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("purpose", pa.string()),  # "search" or "long"
        ("image", pa.string()),
        ("caption", pa.string()),
        ("trajectory", pa.string()),
        ("actions", pa.string()),
        ("seed", pa.int64()),
        *((name, pa.float64()) for name in SCORES),
        ("selected", pa.bool_()),
        ("video", pa.string()),  # relative to the table; null where not selected
        *((f"refined_{name}", pa.float64()) for name in SCORES),
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
    rows = []
    for key in run.finished():
        record, rollout, refined = run.record(key), run.rollout(key), run.refined(key)
        if record is None or rollout is None:
            continue
        scores = record["scores"]
        after = refined["scores"] if refined else {}
        rows.append(
            {name: record.get(name) for name in SCHEMA.names}
            | {name: scores[name] for name in SCORES}
            | {f"refined_{name}": after.get(name) for name in SCORES}
            | {
                "selected": refined is not None,
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
