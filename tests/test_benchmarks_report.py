"""The page of recorded benchmarks: made from records alone, and up to date with them."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil

import jax
import pytest

from pallas_kernels import gpu
from tests.support import ROOT


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for who runs the script
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "report", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


CIRCUMSTANCES = {
    "device": "NVIDIA H100", "platform": "cuda", "jax": "1", "jaxlib": "1", "flax": "1",
    "commit": "abcdefghij", "command": "fastvim bench scan",
}  # fmt: skip
SCAN = {"shape": [128, 14, 384], "dtype": "float32", "gradient": False, "implementation": "pallas"}


def write(folder, name, date, *rows, bench="scan"):
    record = {
        "bench": bench, "circumstances": CIRCUMSTANCES | {"date": date}, "complete": True, "rows": rows,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(record))


def line_of(report, rows, what, ratio=None):
    (target,) = [t for t in report.targets() if t.what == what]
    return target.row(rows, ratio)


def test_the_latest_right_row_counts(report, tmp_path):
    what = "scan f32 forward 128×14×384"
    write(tmp_path, "a", "2026-01-03", SCAN | {"median": 0.009})
    write(tmp_path, "b", "2026-01-02", SCAN | {"median": 0.001})
    rows = report.load(tmp_path)
    assert line_of(report, rows, what)[3:] == ["0.01", "0.007", "**0.009**", "–", "yes", "`a`"]
    write(tmp_path, "c", "2026-01-04", SCAN | {"median": 0.02})
    assert line_of(report, report.load(tmp_path), what)[5:8:2] == ["**0.02**", "no"]
    write(tmp_path, "c", "2026-01-04", SCAN | {"median": 0.006, "correct": True})
    assert line_of(report, report.load(tmp_path), what)[5:8:2] == ["**0.006**", "aim"]
    write(tmp_path, "c", "2026-01-04", SCAN | {"median": 0.006, "correct": False})
    assert line_of(report, report.load(tmp_path), what)[5:] == ["wrong result", "", "", ""]
    write(tmp_path, "c", "2026-01-05", {"implementation": "pallas", "skipped": "no GPU"})
    assert line_of(report, report.load(tmp_path), what)[5] == "**0.009**"


def test_rows_beside_other_programs_give_way_and_have_no_time_by_the_clock(report, tmp_path):
    row = {
        "model": "fastvim_tiny_patch16_224", "pixels": 224, "batch": 128, "dtype": "bfloat16", "blocks": "unroll",
        "precision": "bf16", "activations": "compute", "ms": 4.0,
    }  # fmt: skip
    what = "FastVim-T forward bf16 224 px, batch 128"
    busy = row | {"quiet": False, "images_per_s": 20000, "device_ms": 2.0}
    write(tmp_path, "model_b", "2", busy, bench="model")
    line = line_of(report, report.load(tmp_path), what)
    assert line[0] == "FastVim-T forward bf16 (compute) 224 px, batch 128"
    assert line[5:7] == ["**64,000**", "–"]
    write(tmp_path, "model_a", "1", row | {"quiet": True, "images_per_s": 31000}, bench="model")
    assert line_of(report, report.load(tmp_path), what)[5:7] == ["**31,000**", "31,000"]


def test_more_images_a_second_are_better(report, tmp_path):
    row = {
        "model": "fastvim_tiny_patch16_224", "pixels": 224, "batch": 128, "dtype": "bfloat16",
        "precision": "bf16", "activations": "compute", "ms": 4.0,
    }  # fmt: skip
    what = "FastVim-T forward bf16 224 px, batch 128"
    write(tmp_path, "model_a", "1", row | {"blocks": "scan", "images_per_s": 31000}, bench="model")
    write(
        tmp_path, "model_b", "2", row | {"blocks": "unroll", "images_per_s": 33000}, bench="model"
    )
    line = line_of(report, report.load(tmp_path), what)
    assert line[3:8] == [
        "1.15 × DeiT", "1.6 × DeiT", "**33,000**", "33,000", "DeiT not measured"
    ]  # fmt: skip
    for ratio, met in ((1.14, "no"), (1.15, "yes"), (1.6, "aim")):
        assert line_of(report, report.load(tmp_path), what, ratio)[7] == met
    device = row | {"blocks": "unroll", "images_per_s": 40000, "device_ms": 2.0}
    write(tmp_path, "model_c", "3", device, bench="model")
    line = line_of(report, report.load(tmp_path), what)
    assert line[5:7] == ["**64,000**", "40,000"]


def test_images_a_second_are_divided_by_the_peers(report, tmp_path):
    assert report.peer_section([], []) == ""
    row = {
        "model": "fastvim_tiny_patch16_224", "pixels": 224, "batch": 128, "dtype": "bfloat16",
        "precision": "bf16", "activations": "compute", "ms": 2.0, "blocks": "unroll",
    }  # fmt: skip
    date = "2026-01-02 10:00 UTC"
    write(tmp_path, "model_a", date, row | {"images_per_s": 60000}, bench="model")
    write(tmp_path, "train_a", date, row | {"images_per_s": 14000}, bench="train")
    ours = {"model": "vit_tiny_patch16_224", "images_per_s": 44000}
    write(tmp_path, "model_v", date, row | ours, bench="model")
    write(tmp_path, "model_w", date, row | ours | {"model": "vim_tiny_patch16_224"}, bench="model")
    peer = {"pixels": 224, "batch": 128, "precision": "bf16", "model": "deit_tiny_patch16_224"}
    rows = [
        peer | {"row": "forward", "images_per_s": 40000},
        peer | {"row": "step", "images_per_s": 20000},
    ]

    def section(**changes):
        how = {"command": "c", "device": "NVIDIA H100", "torch": "2", "timm": "1"} | changes
        (tmp_path / "peer_deit.json").write_text(json.dumps({"circumstances": how, "rows": rows}))
        return report.peer_section(report.read_peers(tmp_path), report.load(tmp_path))

    text = section(date="2026-01-02 10:29 UTC")
    assert "| 60,000 | 40,000 | **1.500** |" in text and "| 14,000 | 20,000 | **0.700** |" in text
    assert "| our ViT-T | forward, " in text and "| 44,000 | 40,000 | **1.100** |" in text
    assert "im-T" not in text.replace("FastVim-T", "")  # Vim is compared with nothing.
    assert section(date="2026-01-02 10:31 UTC") == ""  # another run
    assert section(date="2026-01-02 10:00 UTC", device="NVIDIA H200") == ""  # another card


def test_each_table_is_of_one_card(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    shutil.copytree(ROOT / "benchmarks" / "results" / "h100", tmp_path / "results" / "h100")
    ours, other = tmp_path / "results" / "h100", tmp_path / "results" / "h200"
    other.mkdir()
    date = "2026-11-28 06:00 UTC"
    for name in ("scan_lengths", "mixer_core_f32", "model_tiny_224", "train_tiny"):
        record = json.loads((ours / f"{name}.json").read_text())
        record["circumstances"] |= {"device": "NVIDIA H200", "date": date}
        for row in record["rows"]:  # No ceilings are known for it.
            for key in [key for key in row if key.startswith("floor")]:
                del row[key]
            if "images_per_s" in row:
                row["images_per_s"] = 66_666.0  # by the clock
                row["quiet"] = True
            if "device_ms" in row:
                row["device_ms"] = 1e3 * row["batch"] / 77_777.0
        (other / f"{name}.json").write_text(json.dumps(record))
    peer = {"pixels": 224, "batch": 128, "precision": "bf16", "model": "deit_tiny_patch16_224",
            "row": "forward", "images_per_s": 77_777.0 / 1.25}  # fmt: skip
    how = {"command": "c", "device": "NVIDIA H200", "torch": "2", "timm": "1", "date": date}
    (other / "peer_deit.json").write_text(json.dumps({"circumstances": how, "rows": [peer]}))
    report.main()
    page = (tmp_path / "README.md").read_text()
    targets = page.split("## Selective scan")[0]
    first, second = targets.split("One H100:")[1].split("One H200:")
    assert "mamba 0.201" in first and "over DeiT" not in first and "77,777" not in first
    assert "mamba" not in second.split("What others ran")[0]
    (line,) = [
        x for x in second.splitlines() if "FastVim-T forward bf16 (compute) 224 px, batch 128" in x
    ]
    assert line.split(" | ")[-5:-1] == ["**77,777**", "66,666", "yes", "1.250"]
    scans = page.split("## Selective scan")[1].split("## Both directions")[0]
    of_first, of_second = scans.split("One H100:")[1].split("One H200:")
    assert "results/h200" not in of_first and "results/h100" not in of_second.replace(
        "--json benchmarks/results/h100", ""
    )
    assert "NVIDIA H200" in of_second and "scan_h200.png" in of_second
    assert (tmp_path / "scan_h200.png").stat().st_size > 10_000
    peers = page.split("## Against DeiT")[1]
    assert "One H200:" in peers and "One H100:" not in peers
    shutil.copy(ours / "train_small.json", other)
    with pytest.raises(
        ValueError, match="train_small.json is of NVIDIA H100 80GB HBM3: move it to"
    ):
        report.main()


def test_wrong_results_are_named_and_in_no_table(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "h100").mkdir(parents=True)
    write(
        tmp_path / "results" / "h100",
        "a",
        "2026-01-04",
        SCAN | {"median": 0.0012345, "correct": False},
    )
    report.main()
    page = (tmp_path / "README.md").read_text()
    assert "Wrong results, in no other table:\n\n- `fastvim bench scan`" in page
    assert "wrong result" in page and "0.0012" not in page


def test_a_record_says_if_it_is_of_changed_code_or_ended_early(report, tmp_path):
    changed = CIRCUMSTANCES | {"commit": "abcdefghij with changes", "date": "1"}
    record = {
        "bench": "scan",
        "circumstances": changed,
        "complete": False,
        "rows": [SCAN | {"median": 1.0}],
    }
    (tmp_path / "a.json").write_text(json.dumps(record))
    line = report.sources(report.load(tmp_path))
    assert "commit abcdefg with changes, 1;" in line and line.endswith("; ended early\n")


def test_nothing_recorded_is_nothing_measured(report):
    lines = [target.row([]) for target in report.targets()]
    assert len(lines) > 35 and all(line[5] == "not measured" for line in lines)


@pytest.mark.skipif(jax.__version_info__ < gpu.OLDEST_JAX, reason="it counts the kernels' steps")
def test_the_page_is_the_one_made_from_the_records(report, tmp_path):
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    report.main()
    assert (tmp_path / "README.md").read_text() == (
        ROOT / "benchmarks" / "README.md"
    ).read_text(), "run `python benchmarks/report.py`"
    assert (tmp_path / "scan.png").stat().st_size > 10_000


def test_the_page_of_the_families_is_the_one_made_from_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import family

    assert (
        family.page(family.read(family.RESULTS)) == (ROOT / "benchmarks" / "family.md").read_text()
    ), "run `python benchmarks/family.py`"
    required = [
        {"bench": "model", "about": CIRCUMSTANCES | {"date": "1"}, "model": "channelvim_small_patch16_224",
         "batch": 8, "precision": "bf16", "images_per_s": speed, "device_ms": 1.0}
        for speed in (2339.0, 2340.0)
    ]  # fmt: skip
    met = [
        line.split("|")[-2].strip()
        for line in family.page(required).splitlines()
        if "channelvim" in line
    ]
    assert met == ["no", "yes"]


TIMED = re.compile(
    r"batch (?P<batch>\d+)[^.]* takes (?P<ms>[\d.]+) ms \((?P<rate>[\d,]+) images/s, docs/scaling.md\), "
    r"so the steps alone are about (?P<hours>\d+) hours"
)


def test_experiments_cite_the_newest_record(report):
    """Compare times of steps in docstrings with the newest record.

    The hours that 300 epochs of ImageNet then take are compared, too.
    """
    rows = report.load(ROOT / "benchmarks" / "results" / "h100")
    found = 0
    for file in sorted((ROOT / "experiments").rglob("*.py")):
        text = " ".join(ast.get_docstring(ast.parse(file.read_text())).split())
        cited = TIMED.search(text)
        assert (cited is None) == ("images/s" not in text), f"{file}: not in the form of TIMED"
        if cited is None:
            continue
        (row,) = report.find(
            rows, bench="train", kind="time", model=f"{file.stem}_patch16_224", pixels=224,
            batch=int(cited["batch"]), precision="bf16", activations="compute", blocks="unroll",
        )  # fmt: skip
        assert cited["ms"] == f"{row['ms']:.1f}", file
        assert cited["rate"] == f"{row['images_per_s']:,.0f}", file
        assert cited["hours"] == f"{300 * 1_281_167 / row['images_per_s'] / 3600:.0f}", file
        found += 1
    assert found >= 2


HALF = re.compile(r"\b(bf16|bfloat16)\b", re.IGNORECASE)
MODE = re.compile(r"compute|wide|fast=True|bf16, fast|bf16 \(fast\)|step, fast|forward, fast")
MODEL = re.compile(r"(vim|vit)_\w|Vi[mT]-[TSB]\b")  # Kernels have a dtype and no mode.


def without_mode(text):
    """List the rows of tables, and paragraphs that cite speeds, that say bfloat16 of a model and not which mode."""
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("|")
        and MODEL.search(line)
        and "mixer core" not in line
        and "timm" not in line
    ]
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    speeds = [part.strip() for part in prose.split("\n\n") if re.search(r"\d images/s", part)]
    return [part for part in rows + speeds if HALF.search(part) and not MODE.search(part)]


def test_every_bf16_row_names_its_mode():
    """Find no speed without its mode, because "compute" has wider error bounds than "wide"."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    found = {
        p.name: rows
        for p in pages
        if p.name != "NOTES.md" and (rows := without_mode(p.read_text()))
    }
    assert not found
    assert without_mode(
        "| fastvim_tiny | 128 | bf16 | 41,276 |\n\nIn bf16 it makes 41 images/s."
    ) == [
        "| fastvim_tiny | 128 | bf16 | 41,276 |",
        "In bf16 it makes 41 images/s.",
    ]


SPEED = re.compile(r"([\d,]*\d(?:\.\d+)?) images(?:/s| a second| per second)")


def recorded_speeds():
    """Collect every images a second of every record as pages print it, by the clock and of the device, from 10 on."""
    found = {f"{300 * 1_281_167 / 86_400:,.0f}"}  # 300 epochs of ImageNet in a day

    def collect(node):
        for value in node.values() if isinstance(node, dict) else node:
            if isinstance(value, dict | list):
                collect(value)
        if isinstance(node, dict):
            clock = (v for k, v in node.items() if k.startswith("images_per_s"))
            found.update(f"{v:,.0f}" for v in clock if v >= 10)
            if "device_ms" in node and "batch" in node:
                found.add(f"{1e3 * node['batch'] / node['device_ms']:,.0f}")

    for file in (ROOT / "benchmarks" / "results").rglob("*.json"):
        collect(json.loads(file.read_text()))
    return found


def test_speeds_in_prose_stand_in_a_record():
    """Find speeds of pages, docstrings and comments in a record.

    A number that was measured before the newest record is found, too.
    """
    code = [
        f
        for folder in ("fastvim_jax", "pallas_kernels", "experiments")
        for f in (ROOT / folder).rglob("*.py")
    ]
    recorded = recorded_speeds()
    cited = {
        f"{file.relative_to(ROOT)}: {speed[0]}": speed[1]
        for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *code]
        for speed in SPEED.finditer(file.read_text())
    }
    lines = (ROOT / "README.md").read_text().splitlines()
    table = [line for line in lines if re.match(r"\| (Tiny|Small|Base|training step)", line)]
    cells = [number for line in table for number in re.findall(r"\d+,\d{3}", line)]
    assert len(cited) >= 7 and len(cells) >= 12 and "1" not in recorded
    assert not [number for number in cells if number not in recorded]
    assert not [place for place, number in cited.items() if number not in recorded]
