"""Pictures: equal to open_clip's evaluation, every mode a file may have, nothing decoded that is too large."""

from __future__ import annotations

import copy
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from dualenc.config import settings_as
from dualenc.data.modalities import DecodeError, modalities
from dualenc.data.modalities.image import ImageConfig, ImageInput
from dualenc.errors import ConfigError


def make(**settings: object) -> ImageInput:
    return ImageInput(settings_as(ImageConfig, settings, "input"))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def encode(image: Image.Image, format: str = "PNG", **more: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **more)
    return out.getvalue()


@pytest.fixture(scope="session")
def photo(pictures: list[bytes]) -> Image.Image:
    """A real picture, made large and not square."""
    return Image.open(io.BytesIO(pictures[0])).convert("RGB").resize((301, 217), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_eval_is_open_clip_s_pixel_for_pixel(photo: Image.Image, resize: str, interpolation: str) -> None:
    transform = pytest.importorskip("open_clip.transform")
    for size, shape in [
        (64, (301, 217)),
        (64, (97, 300)),
        (224, (301, 217)),
        (65, (64, 64)),
        (33, (500, 34)),
        (90, (50, 40)),
    ]:
        picture = photo.resize(shape)
        ours = make(size=size, resize=resize, interpolation=interpolation)
        zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        theirs = transform.image_transform(
            size, is_train=False, mean=zero, std=one, resize_mode=resize, interpolation=interpolation
        )
        expected = (theirs(picture) * 255).round().to(torch.uint8)
        for format in ("PNG", "JPEG"):
            raw = encode(picture, format)
            expected = (theirs(Image.open(io.BytesIO(raw))) * 255).round().to(torch.uint8)
            assert torch.equal(ours.eval(ours.decode(raw)), expected), (size, shape, format)


def test_every_mode(photo: Image.Image) -> None:
    part = make(size=32, resize="squash")
    size = (32, 32)
    small = photo.resize(size)
    alpha = Image.new("L", size, 0)
    alpha.paste(255, (0, 0, 16, 32))
    rgba = small.copy()
    rgba.putalpha(alpha)
    flat = Image.composite(small, Image.new("RGB", size, "white"), alpha)
    grey = small.convert("L")
    grey_flat = Image.composite(grey, Image.new("L", size, 255), alpha).convert("RGB")
    la = grey.copy().convert("LA")
    la.putalpha(alpha)
    palette = small.quantize(64)
    keyed = small.quantize(64)
    sixteen = Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) | 7)
    cases: dict[str, tuple[bytes, Image.Image]] = {
        "RGBA": (encode(rgba), flat),
        "RGBA webp": (encode(rgba, "WEBP", lossless=True, exact=True), flat),
        "LA": (encode(la), grey_flat),
        "L": (encode(grey), grey.convert("RGB")),
        "1": (encode(small.convert("1")), small.convert("1").convert("RGB")),
        "P": (encode(palette), palette.convert("RGB")),
        "I;16": (encode(sixteen), grey.convert("RGB")),
        "GIF": (encode(palette, "GIF"), palette.convert("RGB")),
        "BMP": (encode(small, "BMP"), small),
    }
    for name, (raw, expected) in cases.items():
        got = part.eval(part.decode(raw))
        assert torch.equal(got, torch.from_numpy(np.array(expected)).permute(2, 0, 1)), name
    # A palette with a transparent entry: its pixels stand on the background.
    entry = int(np.asarray(keyed)[0, 0])
    got = part.eval(part.decode(encode(keyed, transparency=entry)))
    mask = torch.from_numpy(np.asarray(keyed) == entry)
    assert mask.any()
    assert (got[:, mask] == 255).all()
    dark = make(size=32, resize="squash", background=[1, 2, 3])
    got = dark.eval(dark.decode(encode(keyed, transparency=entry)))
    assert got[:, mask].unique(dim=1).flatten().tolist() == [1, 2, 3]
    # RGB with one colour declared transparent.
    got = part.eval(part.decode(encode(Image.new("RGB", size, (9, 9, 9)), transparency=(9, 9, 9))))
    assert (got == 255).all()


def test_cmyk(photo: Image.Image) -> None:
    part = make(size=32, resize="squash")
    raw = encode(photo.convert("CMYK"), "JPEG", quality=95)
    got = part.eval(part.decode(raw)).float()
    expected = torch.from_numpy(np.array(photo.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1).float()
    assert (got - expected).abs().mean() < 4  # inverted colours would differ by over 100


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_exif_orientation(photo: Image.Image, orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encode(photo, format, exif=exif)
    part = make(size=48, resize="squash", max_pixels=301 * 217)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB")
    assert part.decode(raw).size == upright.size
    expected = np.array(upright.resize((48, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(part.eval(part.decode(raw)).permute(1, 2, 0).numpy(), expected)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it is width × height."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("side", "message"), [(30_000, "rejected before decoding"), (6000, r"6000×6000 pixels are more")]
)
def test_too_many_pixels_are_refused_by_the_header(side: int, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        make().decode(bomb(side, side))


def test_what_is_no_picture(pictures: list[bytes], photo: Image.Image) -> None:
    part = make(size=32)
    jpeg = encode(photo, "JPEG")
    for raw in (
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\0" * 999,
    ):
        with pytest.raises(DecodeError, match="not a JPEG, PNG"):
            part.decode(raw)
    with pytest.raises(DecodeError, match="must be bytes, got str"):
        part.decode("text")
    views: list[Callable[[bytes], object]] = [
        lambda raw: part.eval(part.decode(raw)),
        lambda raw: part.train(part.decode(raw), rng()),
    ]
    for raw in (jpeg[: len(jpeg) // 2], pictures[0][: len(pictures[0]) // 2], encode(photo)[:2000], jpeg[:200]):
        for view in views:
            with pytest.raises(DecodeError, match=r"damaged|not a JPEG, PNG"):
                view(raw)


def test_train_view_is_seeded(photo: Image.Image) -> None:
    part = make(
        size=40,
        augment={
            "scale": [0.3, 1.0],
            "flip": True,
            "colour": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale_p": 0.2},
        },
    )
    raw = encode(photo, "JPEG")
    rows = [part.train(part.decode(raw), rng(s)) for s in range(12)]
    again = [part.train(part.decode(raw), rng(s)) for s in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    assert len({r.numpy().tobytes() for r in rows}) == 12
    assert rows[0].dtype == torch.uint8
    assert rows[0].shape == (3, 40, 40)
    batch = part.collate(rows)
    assert batch.shape == (12, 3, 40, 40)
    assert batch.is_contiguous()


def test_crop_is_as_large_and_as_wide_as_asked() -> None:
    # A picture whose pixels name their place: the crop's corners can be read off the row.
    side = 256
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    raw = encode(Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)))
    part = make(size=64, interpolation="bilinear", augment={"scale": [0.25, 0.5], "ratio": [0.5, 2.0]})
    areas, aspects = [], []
    for seed in range(300):
        row = part.train(part.decode(raw), rng(seed)).float()
        w, h = (row[0, 0, -1] - row[0, 0, 0] + 1) * 64 / 63, (row[1, -1, 0] - row[1, 0, 0] + 1) * 64 / 63
        areas.append(float(w * h) / side**2)
        aspects.append(float(w / h))
    assert 0.22 < min(areas) < 0.29
    assert 0.44 < max(areas) < 0.55
    assert 0.45 < min(aspects) < 0.7
    assert 1.5 < max(aspects) < 2.2


def test_no_augmentation_is_the_whole_picture(photo: Image.Image) -> None:
    square = photo.resize((128, 128))
    part = make(size=64, augment={"scale": [1, 1], "ratio": [1, 1]})
    raw = encode(square)
    assert torch.equal(part.train(part.decode(raw), rng()), part.eval(part.decode(raw)))


def test_small_jpeg_decode_is_near_and_evaluation_exact(photo: Image.Image) -> None:
    big = photo.resize((1204, 868), Image.Resampling.BICUBIC)
    raw = encode(big, "JPEG", quality=95)
    part = make(size=64, augment={"scale": [1, 1], "ratio": [0.5, 2]})
    picture = part.decode(raw)
    train = part.train(picture, rng(3)).float()
    picture_full = part.decode(raw)
    picture_full.rgb = lambda at_least=None, full=picture_full.rgb: full()  # type: ignore[method-assign]
    assert (train - part.train(picture_full, rng(3)).float()).abs().mean() < 2.5
    # An evaluation view after a training view of the same object is the exact one.
    assert torch.equal(part.eval(picture), part.eval(part.decode(raw)))


def test_blur_and_solarize_are_pillow_s_after_the_same_crop(photo: Image.Image) -> None:
    """Without either nothing is drawn and described as before they existed; draws of the crop are the same."""
    plain = make(size=64, augment={"scale": [0.5, 1.0]})
    assert "blur" not in plain.describe()["config"]["augment"]
    row = plain.train(plain.decode(encode(photo, "PNG")), rng(5))
    crop = Image.fromarray(row.permute(1, 2, 0).numpy())
    blurred = make(size=64, augment={"scale": [0.5, 1.0], "blur": {"p": 1.0, "sigma": [1.0, 1.0]}, "solarize_p": 1.0})
    got = blurred.train(blurred.decode(encode(photo, "PNG")), rng(5))
    want = np.array(ImageOps.solarize(crop.filter(ImageFilter.GaussianBlur(1.0)), 128))
    assert np.array_equal(got.permute(1, 2, 0).numpy(), want)
    assert (want.astype(int) <= 128).all()
    fast = make(size=64, decode="fast", augment={"blur": {"p": 0.5}, "solarize_p": 0.5})
    rows = [fast.train(fast.decode(encode(photo, "PNG")), rng(k)) for k in range(8)]
    assert 1 < sum(int(x.max()) <= 128 for x in rows) < 8


def test_settings_describe_and_registry() -> None:
    part = make(size=32, resize="squash", mean=[0.5, 0.5, 0.5])
    described = part.describe()
    assert described["kind"] == "image"
    again = modalities[described["kind"]](settings_as(ImageConfig, described["config"], "input"))
    assert again.describe() == described
    assert copy.deepcopy(part).describe() == described
    assert part.collate([part.dummy()]).shape == (1, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"input.sise: unknown key.*Did you mean 'size'"):
        make(sise=3)
    with pytest.raises(ConfigError, match=r"no modality 'imge'. Did you mean 'image'"):
        modalities["imge"]
