"""``decode: fast``: the same crops, damage and decoded pixels as Pillow's, resized within a stated error."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _shared import DATA
from PIL import Image

from dualenc.config import settings_as
from dualenc.data.modalities import DecodeError, plain_jpeg
from dualenc.data.modalities.image import ImageConfig, ImageInput
from dualenc.data.modalities.picture import Picture
from dualenc.model.record import input_facts

WHITE = (255, 255, 255)


def make(**settings: Any) -> ImageInput:
    return ImageInput(settings_as(ImageConfig, settings, "input"))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def jpeg(image: Image.Image, **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **more)
    return out.getvalue()


@pytest.fixture(scope="session")
def small(pictures: list[bytes]) -> Image.Image:
    return Image.open(io.BytesIO(pictures[0])).convert("RGB").resize((96, 64))


@pytest.fixture
def by_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether simplejpeg gave the pixels, call by call."""
    pytest.importorskip("simplejpeg")
    given: list[bool] = []
    real = plain_jpeg.decoded

    def noted(*args: Any) -> Any:
        got = real(*args)
        given.append(got is not None)
        return got

    monkeypatch.setattr("dualenc.data.modalities.picture.decoded", noted)
    return given


def kinds(small: Image.Image) -> dict[str, tuple[bytes, bool]]:
    """JPEGs of many kinds, and whether Pillow is not needed for their pixels."""
    upright, turned = Image.Exif(), Image.Exif()
    upright[0x0112], turned[0x0112] = 1, 6
    xmp = b'<rdf tiff:Orientation="3"/>'
    return {
        "plain": (jpeg(small), True),
        "progressive": (jpeg(small, progressive=True, quality=30), True),
        "4:4:4 with restarts": (jpeg(small, subsampling=0, restart_marker_blocks=4), True),
        "4:2:2, odd size": (jpeg(small.resize((67, 41)), subsampling=1), True),
        "grey": (jpeg(small.convert("L")), True),
        "comment": (jpeg(small, comment=b"hello"), True),
        "EXIF and ICC": (jpeg(small, exif=upright, icc_profile=b"x" * 300), True),
        "EXIF, turned": (jpeg(small, exif=turned), False),
        "XMP, turned": (jpeg(small, xmp=xmp), False),
        "CMYK": (jpeg(small.convert("CMYK")), False),
    }


def test_every_kind_of_jpeg_has_pillow_s_pixels(small: Image.Image, by_simplejpeg: list[bool]) -> None:
    for name, (raw, plain) in kinds(small).items():
        for at_least in (None, 60, 30, 12, 7):
            by_simplejpeg.clear()
            fast, slow = Picture(raw, WHITE, fast=True), Picture(raw, WHITE)
            assert fast.size == slow.size, name
            assert np.array_equal(fast.pixels(at_least), np.asarray(slow.rgb(at_least))), (name, at_least)
            assert any(by_simplejpeg) is plain, name


def outcome(raw: bytes, fast: bool) -> Any:
    """The pixels, or the reason why there are none."""
    try:
        picture = Picture(raw, WHITE, fast)
        return picture.pixels() if fast else np.asarray(picture.rgb())
    except DecodeError as e:
        return str(e)


def test_damage_is_noticed_as_by_pillow(small: Image.Image, by_simplejpeg: list[bool]) -> None:
    """Cut, flipped and inserted bytes: the same reason, or the same pixels."""
    draw = random.Random(0)
    raws = [raw for raw, _ in kinds(small).values()]
    reasons = 0
    for _ in range(1500):
        raw = bytearray(draw.choice(raws))
        body = raw.index(b"\xff\xda") + 12
        how = draw.random()
        if how < 0.25:
            raw = raw[: draw.randrange(len(raw))]
        elif how < 0.35:
            raw = raw[: len(raw) - draw.randrange(12)]
        elif how < 0.9:
            for _ in range(draw.randint(1, 3)):
                raw[draw.randrange(body) if how < 0.65 else draw.randrange(body, len(raw))] = draw.randrange(256)
        else:
            at = draw.randrange(len(raw))
            raw[at:at] = draw.randbytes(draw.randint(1, 20))
        damaged = bytes(raw)
        fast, slow = outcome(damaged, fast=True), outcome(damaged, fast=False)
        if isinstance(slow, str):
            reasons += 1
            assert fast == slow
        else:
            assert np.array_equal(fast, slow)
    assert reasons > 300
    assert sum(by_simplejpeg) > 100


def photos() -> list[bytes]:
    found = sorted((DATA / "image_text" / "coco_cc" / "images").glob("*.jpg"))[:24]
    found += sorted((DATA / "camera_lidar").rglob("CAM_FRONT/*.jpg"))[:6]
    if not found:
        pytest.skip(f"needs the photos under {DATA}")
    return [p.read_bytes() for p in found]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixel_error_on_real_photos(interpolation: str) -> None:
    """docs/loading.md states these: at most 2 of 255 inside, more only where Pillow looks beyond the crop."""
    means = []
    for seed, raw in enumerate(photos()):
        rows = []
        for decode in ("reference", "fast"):
            part = make(decode=decode, interpolation=interpolation, augment={"flip": True})
            rows.append(part.train(part.decode(raw), rng(seed)).int())
        error = (rows[0] - rows[1]).abs()
        assert rows[1].shape == (3, 224, 224)
        assert int(error[:, 14:-14, 14:-14].max()) <= 2
        assert int(error.max()) < 80
        means.append(float(error.float().mean()))
    assert float(np.mean(means)) < 0.05


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
def test_evaluation_is_pillow_s_unless_told_otherwise(small: Image.Image, resize: str) -> None:
    for raw in (jpeg(small.resize((301, 217))), jpeg(small.resize((50, 90)))):
        want = make(resize=resize).eval(make(resize=resize).decode(raw))
        fast = make(resize=resize, decode="fast")
        assert torch.equal(fast.eval(fast.decode(raw)), want)
        told = make(resize=resize, eval_decode="fast")
        assert int((told.eval(told.decode(raw)).int() - want.int()).abs().max()) <= 2


@pytest.mark.parametrize(
    "more",
    [
        {"augment": {"flip": True, "colour": {"brightness": 0.4, "hue": 0.1, "grayscale_p": 0.5}}},
        {"resize": "naflex", "max_patches": 64},
        {"interpolation": "lanczos"},
    ],
)
def test_other_settings_make_the_same_draws(small: Image.Image, more: dict[str, Any]) -> None:
    raw = jpeg(small.resize((640, 500)))
    for seed in range(4):
        parts = [make(size=96, decode=d, **more) for d in ("reference", "fast")]
        draws = [rng(seed), rng(seed)]
        a, b = (p.train(p.decode(raw), r) for p, r in zip(parts, draws, strict=True))
        assert draws[0].random() == draws[1].random()
        a, b = (x[0] if isinstance(x, tuple) else x for x in (a, b))
        assert a.shape == b.shape
        assert float((a.float() - b.float()).abs().mean()) < 1.5


def test_other_formats_and_no_simplejpeg(
    small: Image.Image, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = make(size=48, decode="fast")
    raw = jpeg(small)
    with_it = part.train(part.decode(raw), rng(1))
    assert part.train(part.decode(pictures[1]), rng(1)).shape == (3, 48, 48)
    monkeypatch.setattr(plain_jpeg, "_decoder", lambda: None)
    assert torch.equal(part.train(part.decode(raw), rng(1)), with_it)


def test_a_picture_that_is_a_line(tmp_path: Path) -> None:
    for shape in ((9000, 3), (3, 9000), (1, 1)):
        raw = jpeg(Image.new("RGB", shape, (9, 90, 200)))
        for part in (make(decode="fast"), make(eval_decode="fast")):
            assert part.train(part.decode(raw), rng()).shape == part.eval(part.decode(raw)).shape == (3, 224, 224)


def test_a_checkpoint_says_which_was_used() -> None:
    assert "decode" not in make().describe()["config"]  # as before there was a choice: old digests stay
    assert make(decode="fast").describe()["config"]["decode"] == "fast"
    assert make(eval_decode="fast").describe()["config"]["eval_decode"] == "fast"
    # features of evaluation do not depend on how training decoded
    assert input_facts(make(decode="fast")) == input_facts(make())
    assert input_facts(make(eval_decode="fast")) != input_facts(make())
