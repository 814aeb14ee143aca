"""An item's bytes can only cost that item, within stated bounds of memory and time."""

from __future__ import annotations

import ast
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _shared import DATA as SHARED_DATA
from PIL import Image, features

from dualenc.data.arrays import read_npy
from dualenc.data.modalities.image import ImageInput
from dualenc.data.modalities.lidar import LidarInput
from dualenc.data.modalities.modality import DecodeError, modalities, of_one_item, reason_of
from dualenc.data.modalities.picture import Picture
from dualenc.data.modalities.sound_file import Sound
from dualenc.data.modalities.text import TextInput
from dualenc.data.shards.reader import SampleError, iter_samples
from dualenc.errors import ConfigError

FAULTS = SHARED_DATA.parent / "faults"
needs_faults = pytest.mark.skipif(not FAULTS.is_dir(), reason=f"the faulty inputs are not below {SHARED_DATA.parent}")


def image(**settings: Any) -> ImageInput:
    return ImageInput(ImageInput.Config.model_validate(settings))


def lidar(**settings: Any) -> LidarInput:
    return LidarInput(LidarInput.Config.model_validate(settings))


def text(**settings: Any) -> TextInput:
    return TextInput(TextInput.Config.model_validate(settings))


def encoded(pixels: Any, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(out, form, **options)
    return out.getvalue()


NOISE = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)


# --- any exception ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [MemoryError("no"), RecursionError("deep"), OverflowError("x"), TypeError(), KeyError(1)]
)
def test_whatever_an_item_raises_is_a_reason(error: Exception) -> None:
    with pytest.raises(DecodeError, match=type(error).__name__), of_one_item():
        raise error


def test_what_is_meant_for_the_user_already_passes_through() -> None:
    with pytest.raises(ConfigError, match="key"), of_one_item():
        raise ConfigError("key: wrong")
    with pytest.raises(KeyboardInterrupt), of_one_item():
        raise KeyboardInterrupt


def test_reasons_are_the_same_in_every_run() -> None:
    reasons = {reason_of(OSError(f"cannot identify <_io.BytesIO object at {hex(id(object()) + i)}>")) for i in range(3)}
    assert reasons == {"OSError: cannot identify <_io.BytesIO object at 0x…>"}


# --- pictures ----------------------------------------------------------------------------------------------------


@needs_faults
def test_a_sideways_picture_with_odd_exif_is_shown_upright() -> None:
    part, sizes = image(), []
    for _, found in iter_samples(str(FAULTS / "exif_text_resolution.tar"), {"image": part.default_members}):
        assert not isinstance(found, SampleError)
        picture = part.decode(found.values["image"])
        part.eval(picture)
        sizes.append((picture.size, picture.rgb().size))
    assert len(sizes) == 40
    assert all(said == got for said, got in sizes)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_turned_as_viewers_do(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(NOISE, exif=exif)
    with Image.open(io.BytesIO(raw)) as opened:
        want = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert np.array_equal(np.asarray(Picture(raw, (255, 255, 255)).rgb()), want)


@pytest.mark.parametrize("chunk", [b"IHDR", b"IDAT", b"IEND"])
def test_a_png_whose_checksum_is_wrong_is_refused(chunk: bytes) -> None:
    raw = bytearray(encoded(NOISE))
    at = raw.index(chunk) - 4
    end = at + 8 + int.from_bytes(raw[at : at + 4], "big")
    raw[end] ^= 1
    with pytest.raises(DecodeError, match="not a JPEG" if chunk == b"IHDR" else "checksum"):
        Picture(bytes(raw), (255, 255, 255)).rgb()


@pytest.mark.parametrize("shape", [(60_000, 1), (1, 60_000), (9000, 3)])
def test_a_picture_that_is_a_line_costs_no_more_than_others(shape: tuple[int, int]) -> None:
    import resource

    raw = encoded(np.random.default_rng(1).integers(0, 255, (*shape, 3)))
    part = image()
    part.eval(part.decode(encoded(NOISE)))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert part.eval(part.decode(raw)).shape == (3, 224, 224)
    assert time.monotonic() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("size", [(2000, 100), (100, 2000), (333, 9001), (9001, 333), (40, 4000), (7000, 377)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_cropping_first_gives_the_pixels_of_resizing_first(size: tuple[int, int], interpolation: str) -> None:
    """Within one level of 255 in a hundredth of the pixels: Pillow takes the box as float32."""
    from dualenc.data.modalities.image import _centre

    pixels = np.random.default_rng(2).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    part = image(size=100, interpolation=interpolation)
    got = part.eval(part.decode(encoded(pixels))).numpy().astype(int)
    w, h = size
    wh = (100, int(100 * h / w)) if w <= h else (int(100 * w / h), 100)
    how = Image.Resampling[interpolation.upper()]
    want = (
        np.asarray(_centre(Image.fromarray(pixels).resize(wh, how), 100, (0, 0, 0), "round"))
        .transpose(2, 0, 1)
        .astype(int)
    )
    assert np.abs(got - want).max() <= 1
    assert (got != want).mean() < 0.01


@pytest.mark.parametrize("form", ["TIFF", "AVIF", "JPEG2000"])
def test_more_formats_are_read_where_pillow_can(form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    smooth = np.kron(NOISE[:6, :4], np.ones((8, 8, 1), np.uint8))
    pixels = np.asarray(Picture(encoded(smooth, form), (255, 255, 255)).rgb()).astype(int)
    assert np.abs(pixels - smooth).mean() < 12


def test_heic_is_read_or_its_package_is_named() -> None:
    raw = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)
    with pytest.raises(DecodeError, match=r"dualenc\[heic\]|damaged|not a JPEG"):
        Picture(raw, (255, 255, 255))


def test_heic_is_read_with_its_package() -> None:
    heif = pytest.importorskip("pillow_heif", reason="pip install 'dualenc[heic]'")
    heif.register_heif_opener()
    smooth = np.kron(NOISE[:6, :4], np.ones((8, 8, 1), np.uint8))
    pixels = np.asarray(Picture(encoded(smooth, "HEIF"), (255, 255, 255)).rgb()).astype(int)
    assert np.abs(pixels - smooth).mean() < 12


# --- sounds ------------------------------------------------------------------------------------------------------

FORMATS = [
    *(("WAV", "PCM_16"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "FLOAT"), ("AIFF", "PCM_16")),
    *(("AU", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16")),
]


@pytest.mark.parametrize(("form", "subtype"), FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_a_sound_cut_short_is_noticed(form: str, subtype: str, share: float) -> None:
    import soundfile

    out = io.BytesIO()
    wave = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    soundfile.write(out, wave, 48_000, format=form, subtype=subtype)
    raw = out.getvalue()
    assert len(Sound(raw).read(0, 48_000, 48_000)) > 47_000
    cut = raw[: len(raw) - int(share * len(raw))]
    with pytest.raises(DecodeError):
        # asked for the beginning only: what is missing is at the end
        Sound(cut).read(0, 100, 48_000) if form != "FLAC" else Sound(cut).read(0, 48_000, 48_000)


def test_a_streamed_wav_whose_header_does_not_know_its_length_is_whole() -> None:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, np.zeros(4000, np.float32), 16_000, format="WAV", subtype="PCM_16")
    raw = bytearray(out.getvalue())
    raw[4:8] = raw[40:44] = b"\xff\xff\xff\xff"  # as ffmpeg writes into a pipe
    assert len(Sound(bytes(raw)).read(0, 4000, 16_000)) == 4000


def test_m4a_and_webm_are_read_or_their_package_is_named() -> None:
    for raw in (b"\x00\x00\x00\x20ftypM4A " + bytes(200), b"\x1aE\xdf\xa3" + bytes(200)):
        with pytest.raises(DecodeError, match=r"dualenc\[av\]|damaged"):
            Sound(raw)


@pytest.mark.parametrize(("container", "codec"), [("ipod", "aac"), ("webm", "libopus")])
def test_m4a_and_webm_are_read_with_their_package(container: str, codec: str) -> None:
    av = pytest.importorskip("av", reason="pip install 'dualenc[av]'")
    tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(96_000) / 48_000)).astype(np.float32)
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=48_000)
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.sample_rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    sound = Sound(out.getvalue())
    wave = sound.read(0, 96_000, 48_000)
    assert abs(len(wave) - 96_000) <= 2048
    loudest = np.abs(np.fft.rfft(wave[24_000:72_000])).argmax()
    assert loudest == 440  # a second of it: bins are Hz


# --- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [b"\x00\x00", "\u200b\u200d\ufeff", b" \t\n", ["\x01", "\x7f"], "\u200e"])
def test_a_caption_that_shows_nothing_is_empty(raw: Any) -> None:
    with pytest.raises(DecodeError, match="empty"):
        text(tokenizer="clip-bpe:8192").decode(raw)


@pytest.mark.parametrize("length", [300, 5_000, 64_000])
def test_a_word_without_end_takes_no_time_and_has_the_same_ids(length: int) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    part, theirs = text(), SimpleTokenizer()
    word = "".join(np.random.default_rng(length).choice(list("abcdeést日"), length))
    begin = time.monotonic()
    ours = part.tokenizer.encode(word)
    assert time.monotonic() - begin < 5
    if length <= 5_000:
        assert ours == [theirs.sot_token_id, *theirs.encode(word)[:75], theirs.eot_token_id]


@needs_faults
def test_half_an_emoji_is_replaced() -> None:
    part = text()
    for _, found in iter_samples(str(FAULTS / "half_emoji.tar"), {"text": part.default_members}):
        assert not isinstance(found, SampleError)
        for caption in part.decode(found.values["text"]):
            caption.encode("utf-8")
        part.eval(part.decode(found.values["text"]))
    assert part.decode("dog \ud83d") == ["dog \ufffd"]
    assert part.decode("dog \ud83d\udc15") == ["dog 🐕"]


def test_a_caption_of_a_megabyte_is_refused_and_a_long_one_is_not() -> None:
    part = text()
    with pytest.raises(DecodeError, match="at most 1,048,576 are allowed"):
        part.decode(b"a " * (1 << 20))
    part.eval(part.decode("word " * 100_000))


# --- sweeps ------------------------------------------------------------------------------------------------------

POINTS = np.random.default_rng(0).normal(0, 5, (50, 4)).astype(np.float32)


def npy(x: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()


def test_a_shape_is_checked_before_anything_is_allocated() -> None:
    raw = npy(POINTS)
    huge = raw.replace(b"(50, 4), }" + b" " * 12, b"(50000000000, 4), }" + b" " * 3)
    assert len(huge) == len(raw)
    with pytest.raises(DecodeError, match="needs 800,000,000,000 bytes"):
        read_npy(huge)


@needs_faults
def test_damaged_headers_and_wrong_types_are_reasons() -> None:
    part = lidar()
    with pytest.raises(DecodeError):
        part.decode((FAULTS / "broken_header.npy").read_bytes())
    about = ast.literal_eval((FAULTS / "wrong_types.json").read_text(encoding="utf-8"))
    with pytest.raises(DecodeError):
        part.decode({"json:lidar": about, "lidar.npy": npy(POINTS)})


def pcd(form: str) -> bytes:
    head = "VERSION 0.7\nFIELDS x y z intensity\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\n"
    head += "WIDTH 50\nHEIGHT 1\nPOINTS 50\n"
    body = POINTS.tobytes() if form == "binary" else "\n".join(" ".join(map(repr, p.tolist())) for p in POINTS).encode()
    return f"{head}DATA {form}\n".encode() + body


def test_sweeps_of_every_form_are_the_same_points() -> None:
    out = io.BytesIO()
    np.savez(out, points=POINTS)
    want = lidar().decode(npy(POINTS)).points
    for raw in (out.getvalue(), pcd("binary"), pcd("ascii")):
        assert np.array_equal(lidar().decode(raw).points, want)
    assert np.array_equal(lidar(bin_columns=4).decode(POINTS.tobytes()).points, want)
    whole = (POINTS * 100).astype(np.int16)
    assert np.array_equal(lidar().decode(npy(whole)).points, whole.astype(np.float32))
    with pytest.raises(DecodeError, match="bin_columns"):
        lidar().decode(POINTS.tobytes())


def test_every_modality_refuses_what_is_of_another(tmp_path: Path) -> None:
    for kind in modalities:
        part = modalities[kind](
            modalities[kind].Config(**{"series": {"channels": 2}, "vector": {"dim": 2}}.get(kind, {}))
        )
        for raw in (b"", b"\x00" * 100, b"<html>404</html>", 7, None, {"a": 1}, [1, 2]):
            if kind == "text" and raw == b"<html>404</html>":
                continue  # that is text
            with pytest.raises(DecodeError), of_one_item():
                part.eval(part.decode(raw))


# --- a batch -----------------------------------------------------------------------------------------------------


class Ragged(TextInput):
    """Rows of texts that begin with an x have a shape that no batch takes."""

    def train(self, x: list[str], rng: np.random.Generator) -> Any:
        row = super().train(x, rng)
        return row[None, None] if x[0].startswith("x") else row


def test_a_row_that_does_not_go_into_a_batch_costs_that_sample_only(tmp_path: Path) -> None:
    import tarfile

    from dualenc.config import Data
    from dualenc.data.dataset import StepDataset
    from dualenc.data.shards.index import build_plan, open_source

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(8):
            for ending, raw in (("txt", b"x bad" if i == 3 else b"a dog"), ("png", encoded(NOISE))):
                info = tarfile.TarInfo(f"s{i}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    data = Data.model_validate({"sources": [{"name": "a", "shards": str(tmp_path / "a.tar")}]})
    sets = [open_source(data.sources[0])]
    ragged = Ragged(TextInput.Config.model_validate({"tokenizer": "clip-bpe:8192"}))
    inputs: dict[str, Any] = {"image": image(size=16), "text": ragged}
    wanted = [{"image": ["png"], "text": ["txt"]}]
    pairs = [("image", "text")]
    dataset = StepDataset(build_plan(data, sets, 0), sets, inputs, pairs, wanted, 0, 8, 0, 1, None, data)
    batch: Any = dataset[0]
    assert [b.key for b in batch.bad] == ["s3"]
    assert "batch" in batch.bad[0].reason
    assert (batch.ids >= 0).sum() == 7
    assert len(batch.rows["text"]) == len(batch.rows["image"]) == 7
