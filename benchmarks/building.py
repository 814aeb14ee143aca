"""Packing: samples per second by engine and by img2dataset on the same local files, and memory at a million rows.

    python -m benchmarks.building FLICKR8K [--ray] [--img2dataset PYTHON] [--samples 4000]
    python -m benchmarks.building --million [--rows 1000000]

FLICKR8K is the folder with captions.jsonl. Every build decodes each photo and writes it as JPEG of quality 90 with at
most 96 px, in shards of 1,000. ``--img2dataset`` names the python of an environment that has it; it reads the same
files by file:// URLs, with two processes, and writes webdataset shards.
A run of 20 samples comes first, "start": what it takes to begin. Samples per second are those of the whole run, start
included.
``--million`` packs a parquet table with an image's bytes and a caption a row and prints its memory as it goes.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dualenc_data_tools.build import build
from dualenc_data_tools.sources import from_tables, sources

SIZE, QUALITY, SHARD = 96, 90, 1000
_IMG2DATASET = """
import sys, img2dataset
if __name__ == "__main__":
    img2dataset.download(url_list=sys.argv[1], input_format="jsonl", url_col="url", caption_col="caption",
        output_folder=sys.argv[2], output_format="webdataset", image_size=96, resize_mode="keep_ratio_largest",
        encode_quality=90, processes_count=int(sys.argv[3]), thread_count=4, number_sample_per_shard=1000,
        enable_wandb=False, compute_hash=None, extract_exif=False, disable_all_reencoding=False)
"""


def timed(run: Callable[[Path, int], int], folder: Path, samples: int) -> str:
    """Seconds of a short and of the whole run, and samples per second of the whole one, start included."""
    seconds, done = [], []
    for k, count in enumerate((20, samples)):
        out = folder / f"out{k}"
        began = time.perf_counter()
        done.append(run(out, count))
        seconds.append(time.perf_counter() - began)
        shutil.rmtree(out)
    return f"| {done[1]:,} | {seconds[0]:.1f} | {seconds[1]:.1f} | {done[1] / seconds[1]:,.0f} |"


def throughput(flickr8k: Path, samples: int, ray: bool, python: str | None) -> None:
    """Print the table."""
    settings: dict[str, Any] = {
        "path": str(flickr8k / "captions.jsonl"), "split": "train", "size": SIZE, "encode": "jpeg",
        "quality": QUALITY, "shard_samples": SHARD,
    }  # fmt: skip

    def ours(engine: str, processes: int) -> Callable[[Path, int], int]:
        how = {**settings, "processes": processes}
        return lambda out, n: build("jsonl", out, how, limit=n, progress=False, engine=engine, address="local").samples

    runs = {f"local, {'4 threads' if n == 1 else f'{n} processes'}": ours("local", n) for n in (1, 2)}
    if ray:
        runs |= {f"Ray, {n} actors": ours("ray", n) for n in (2, 4)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if python is not None:
            rows = [json.loads(x) for x in (flickr8k / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
            rows = [r for r in rows if r["split"] == "train"][:samples]
            lines = [{"url": f"file://{flickr8k / r['image']}", "caption": r["captions"][0]} for r in rows]
            for n in (20, samples):
                text = "".join(json.dumps(x) + "\n" for x in lines[:n])
                (folder / f"urls-{n}.jsonl").write_text(text, encoding="utf-8")
            (folder / "run.py").write_text(_IMG2DATASET, encoding="utf-8")
            runs["img2dataset, 2 processes"] = lambda out, n: img2dataset(python, folder, out, n)
        print("| | samples | start, s | all, s | samples/s |\n|---|---|---|---|---|")
        for name, run in runs.items():
            print(f"| {name} {timed(run, folder, samples)}", flush=True)


def img2dataset(python: str, folder: Path, out: Path, samples: int) -> int:
    """Run img2dataset in two processes; how many samples it wrote."""
    command = [python, str(folder / "run.py"), str(folder / f"urls-{samples}.jsonl"), str(out), "2"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return sum(json.loads(p.read_text())["successes"] for p in out.glob("*_stats.json"))


def rss() -> float:
    """MB of memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def million(rows: int) -> None:
    """Pack a parquet table of so many rows, and print memory on the way."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(out, "JPEG")
        schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
        with pq.ParquetWriter(folder / "rows.parquet", schema) as table:
            for start in range(0, rows, 20_000):
                captions = [f"picture number {i}" for i in range(start, min(rows, start + 20_000))]
                table.write_table(pa.table([[out.getvalue()] * len(captions), captions], schema=schema))
        size = (folder / "rows.parquet").stat().st_size
        print(f"{rows:,} rows, {rows * len(out.getvalue()) / 1e6:,.0f} MB of images ({size / 1e6:,.0f} MB as parquet)")
        began = time.perf_counter()
        real = from_tables.table_records

        def told(kind: str, cfg: Any) -> Any:
            for number, record in enumerate(real(kind, cfg)):
                if number % (rows // 8) == 0:
                    print(f"{number:,} rows: {rss():,.0f} MB, {time.perf_counter() - began:,.0f} s", flush=True)
                yield record

        kind = sources["parquet"]
        object.__setattr__(kind, "records", lambda cfg: told("parquet", cfg))
        report = build(
            "parquet", folder / "out", path=str(folder / "rows.parquet"), verify=False, shard_samples=10_000,
            progress=False,
        )  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(
            f"{report.samples:,} samples in {len(report.shards)} shards, peak {peak:,.0f} MB, {report.seconds:,.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("flickr8k", type=Path, nargs="?")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--img2dataset", metavar="PYTHON")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    if given.million:
        million(given.rows)
    elif given.flickr8k is not None:
        throughput(given.flickr8k.resolve(), given.samples, given.ray, given.img2dataset)
    else:
        parser.error("name FLICKR8K, or --million")


if __name__ == "__main__":
    main()
