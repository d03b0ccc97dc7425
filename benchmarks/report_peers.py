"""Compare FastVim and our ViTs with the DeiT that `peers/deit.py` recorded on the same card in the same run."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

from jobs import card
from report_tables import table
from targets import Row, clock_images_per_s, device_images_per_s, find, half_mode, number

FAMILIES = {"fastvim": "FastVim", "vit": "our ViT"}
SAME_RUN = timedelta(minutes=30)
"""Two measurements count as one run if they were made on the same kind of card within this time."""


def read_peers(folder: Path) -> list[Row]:
    """Read the rows that `peers/deit.py` recorded, with the circumstances of each under the key `how`."""
    rows = []
    for file in sorted(folder.glob("peer_*.json")):
        record = json.loads(file.read_text())
        rows += [row | {"how": record["circumstances"]} for row in record["rows"]]
    return rows


def _same_run(ours: Row, how: Row) -> bool:
    dates = [datetime.strptime(x["date"], "%Y-%m-%d %H:%M UTC") for x in (ours, how)]
    return ours["card"] == card(how["device"]) and abs(dates[0] - dates[1]) <= SAME_RUN


def peer_of(ours: Row, peers: list[Row]) -> Row | None:
    """Return the latest row of the DeiT with the size and setting of `ours`, a FastVim or ViT row, of the same run."""
    family, _, rest = ours.get("model", "").partition("_")
    name = f"deit_{rest.removesuffix('_patch16_224')}" if family in FAMILIES else ""
    what = {"model": "forward", "train": "step"}.get(ours["bench"])
    if not name or what is None or ours.get("kind", "time") != "time":
        return None
    match = {key: ours.get(key) for key in ("pixels", "batch", "precision")}
    found = [
        peer
        for peer in find(peers, row=what, **match)
        if peer["model"].split("_patch")[0] == name and _same_run(ours, peer["how"])
    ]
    return max(found, key=lambda peer: peer["how"]["date"], default=None)


def peer_section(peers: list[Row], rows: list[Row]) -> str:
    """Tabulate our images per second divided by those of DeiT in the same run; "" if there are no such rows.

    Ours are from device time if it was recorded, because DeiT's are from a replayed CUDA graph, which a busy host does
    not slow down.
    """
    lines, said = [], {}
    for ours in find(rows, bench="model") + find(rows, bench="train", kind="time"):
        peer = peer_of(ours, peers)
        if peer is None:
            continue
        how, fast, slow = peer["how"], device_images_per_s(ours), peer["images_per_s"]
        said[how["command"]] = (
            f"- DeiT, `{how['command']}`: {how['device']}, torch {how['torch']}, timm {how['timm']}, {how['date']}\n"
        )
        family, size = ours["model"].split("_")[:2]
        lines.append(
            [f"{FAMILIES[family]}-{size[0].upper()}", f"{peer['row']}, {half_mode(ours)}", str(peer["pixels"]),
             str(peer["batch"]), ours["blocks"],
             f"{fast:,.0f}", number(clock_images_per_s(ours)), f"{slow:,.0f}", f"**{fast / slow:.3f}**",
             ours.get("commit", ""), how["date"]]
        )  # fmt: skip
    if not lines:
        return ""
    header = [
        "model", "what", "pixels", "batch", "blocks", "images/s of device time", "by the clock", "DeiT's", "ratio",
        "commit", "DeiT's date",
    ]  # fmt: skip
    return "\n".join([table(header, lines), *said.values()])
