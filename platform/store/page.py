"""index.html: the selected videos with their trajectories and scores, made from results.parquet alone."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from longtake.platform.store.files import write
from longtake.platform.store.table import AFTER, RATINGS

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --path: #0a7cff; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; }
main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
article { border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
article.long { grid-column: 1 / -1; }
article > div { padding: .5rem .8rem .8rem; }
video { display: block; width: 100%; background: #000; }
h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .2rem 0; }
svg { width: 45%; max-width: 11rem; background: var(--soft); border-radius: .3rem; }
svg path { fill: none; stroke: var(--path); stroke-width: 2.5; stroke-linejoin: round; }
svg line { stroke: currentColor; opacity: .45; }
svg circle { fill: currentColor; }
svg text { font-size: 9px; fill: currentColor; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; white-space: nowrap; }
td.n, th.n { text-align: right; }
tr.chosen, li.chosen { background: var(--soft); }
ul { list-style: none; margin: 0; padding-left: 1.2rem; border-left: 1px solid var(--line); }
"""
_EXPLAINED = (
    "follow: share of tracked points that move as the camera says (1 is best). sharpness: against the start image "
    "(1 is best). drift: change of colour and sharpness from the first second to the last (0 is best). novelty: "
    "distance from the other videos of the image. total: their weighted sum. Shaded rows are selected."
)


def write_page(table: Path, note: str = "") -> Path:
    """Write index.html beside `table`; videos are linked relative to it. Needs no network and no script.

    note: what else is to be said of the run, one line.
    """
    rows = pq.read_table(table).to_pylist()
    chosen = [row for row in rows if row["video"]]
    images, selected = len({row["image"] for row in rows}), sum(row["selected"] for row in rows)
    summary = f"{len(rows)} candidates from {images} images, {selected} selected, {len(chosen)} refined"
    body = "\n".join(
        [
            "<h1>Search then refine</h1>",
            f"<p>{summary}. Poses, scores and provenance: <a href='{table.name}'>{table.name}</a>.</p>",
            *([f"<p>{escape(note[:1].upper() + note[1:])}.</p>"] if note else []),
            "<main>",
            *(_card(row) for row in sorted(chosen, key=lambda row: row["purpose"] != "long")),
            "</main>",
            "<h2 style='margin-top:1.5rem'>All candidates</h2>",
            f"<p>{_EXPLAINED}</p>",
            _scores(rows),
            *_trees(rows),
        ]
    )
    path = table.with_name("index.html")
    write(
        path,
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>Search: {escape(summary)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n",
    )
    return path


def _card(row: dict[str, Any]) -> str:
    c2w = np.asarray(row["c2w"], dtype=np.float64).reshape(-1, 4, 4)
    seconds = row["num_frames"] / row["fps"]
    names = [name for name in AFTER if row[f"refined_{name}"] is not None]
    scores = " ".join(f"{name} {row[f'refined_{name}']:.2f}" for name in names)
    return (
        f"<article class='{escape(row['purpose'])}'><video src='{escape(row['video'])}' controls muted loop "
        f"playsinline preload='metadata'></video><div><h2>{escape(row['image'])}, {escape(row['trajectory'])}</h2>"
        f"<p>{seconds:.0f} s, seed {row['seed']}, {escape(row['licence'])}</p>"
        f"<p>{escape(row['caption'])}</p><p>{scores}</p>"
        f"{_drawn(c2w, (0, 2), 'from above')} {_drawn(c2w, (2, 1), 'from the side')}</div></article>"
    )


def _drawn(c2w: np.ndarray, axes: tuple[int, int], label: str) -> str:
    """The path projected to two world axes (x right, y down, z forward), with the view directions on it.

    From above, forward is up: the second axis is z, which SVG's downward axis would turn around.
    """
    flip = np.array([1.0, -1.0 if axes[1] == 2 else 1.0])
    places, views = c2w[:, axes, 3] * flip, c2w[:, axes, 2] * flip
    centre = (places.max(0) + places.min(0)) / 2
    size = max(float((places.max(0) - places.min(0)).max()), 1e-3)
    points = (places - centre) / size * 70 + 60
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points[:: max(1, len(points) // 240)])
    every = range(0, len(points), max(1, len(points) // 8))
    rays = "".join(
        f"<line x1='{x:.1f}' y1='{y:.1f}' x2='{x + 12 * u:.1f}' y2='{y + 12 * v:.1f}'/>"
        for (x, y), (u, v) in ((points[i], views[i]) for i in every)
    )
    return (
        f"<svg viewBox='0 0 120 120' role='img' aria-label='trajectory {label}'><path d='{path}'/>{rays}"
        f"<circle cx='{points[0, 0]:.1f}' cy='{points[0, 1]:.1f}' r='3'/>"
        f"<text x='4' y='115'>{label}, {size:.1f} m</text></svg>"
    )


def _scores(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("image", "trajectory", "seed"))
    head += "".join(f"<th class='n'>{name}</th>" for name in RATINGS) + "<th>video</th>"
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(str(row[name]))}</td>" for name in ("image", "trajectory", "seed"))
        numbers = ("" if row[name] is None else f"{row[name]:.3f}" for name in RATINGS)
        cells += "".join(f"<td class='n'>{number}</td>" for number in numbers)
        link = f"<a href='{escape(row['video'])}'>refined</a>" if row["video"] else ""
        lines.append(f"<tr{' class=chosen' if row['selected'] else ''}>{cells}<td>{link}</td></tr>")
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _trees(rows: list[dict[str, Any]]) -> list[str]:
    """A tree for each image and seed that has one, with the best total behind each of its nodes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["branches"]:
            found.setdefault(f"{row['image']}, seed {row['seed']}", []).append(row)
    return [
        f"<h2 style='margin-top:1.5rem'>Tree of {escape(name)}</h2>\n"
        f"<p>Each branch with the best total behind it.</p>{_level(leaves, 0)}"
        for name, leaves in found.items()
    ]


def _level(leaves: list[dict[str, Any]], level: int) -> str:
    behind: dict[str, list[dict[str, Any]]] = {}
    for row in leaves:
        behind.setdefault(row["branches"][level], []).append(row)
    items = []
    for branch, rows in behind.items():
        last = level + 1 == len(rows[0]["branches"])
        text = f"{escape(branch)} <b>{max(row['total'] for row in rows):.3f}</b>"
        if last and rows[0]["video"]:
            text += f" <a href='{escape(rows[0]['video'])}'>refined</a>"
        chosen = " class=chosen" if last and rows[0]["selected"] else ""
        items.append(f"<li{chosen}>{text}{'' if last else _level(rows, level + 1)}</li>")
    return f"<ul>{''.join(items)}</ul>"
