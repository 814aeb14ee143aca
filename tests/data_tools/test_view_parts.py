"""``shards view`` shows images under names of their own and points without a calibration, such as objects of a
drive."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from dualenc_data_tools.view import view
from dualenc_data_tools.writer import ShardWriter


def png(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def points(n: int) -> bytes:
    out = io.BytesIO()
    np.save(out, np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32))
    return out.getvalue()


def pictures(page: Path) -> list[Image.Image]:
    found = re.findall(r"src='data:image/webp;base64,([^']+)'", page.read_text(encoding="utf-8"))
    return [Image.open(io.BytesIO(base64.b64decode(x))) for x in found]


def test_objects_show_their_image_and_their_points(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_samples=10, split="train")
    writer.write("a", {"cam.png": png((60, 30)), "lidar.npy": points(300)})
    writer.write("b", {"left.png": png((30, 30)), "right.png": png((30, 30))})
    writer.write("c", {"lidar.npy": points(5000)})
    writer.write("d", {"cam.png": b"broken", "txt": b"x"})
    writer.close()
    page = view([str(tmp_path / "train-000000.tar")], tmp_path / "view.html")
    found = pictures(page)
    assert [x.size for x in found] == [(512 + 256, 256), (512, 256), (256, 256)]
    assert np.asarray(found[0].convert("RGB"))[:, 512:].max() > 100, "the points are there"
    text = page.read_text(encoding="utf-8")
    assert "60×30, 300 points" in text
    assert "no image" not in text
    assert text.count("class='bad'") == 1
