"""The model object: every form an item comes in gives the features that its file gives."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _fixtures import *  # noqa: F403
from _fixtures import NAMES
from PIL import Image

import dualenc
from dualenc.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model(clip: Path) -> dualenc.Model:
    return dualenc.load_model(clip, device="cpu")


@pytest.fixture(scope="module")
def paths(photos: Path) -> list[str]:
    return [str(photos / n) for n in NAMES]


@pytest.fixture(scope="module")
def features(model: dualenc.Model, paths: list[str]) -> torch.Tensor:
    """Of the bytes of the files, as ``dualenc eval`` embeds them."""
    return model.embedder.embed("image", [Path(p).read_bytes() for p in paths])


def pixels(path: str) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


FORMS: dict[str, Any] = {
    "paths": lambda ps: ps,
    "pathlib": lambda ps: [Path(p) for p in ps],
    "bytes": lambda ps: [Path(p).read_bytes() for p in ps],
    "generator": lambda ps: (p for p in ps),
    "URLs": lambda ps: [f"file://{p}" for p in ps],
    "open files": lambda ps: [io.BytesIO(Path(p).read_bytes()) for p in ps],
    "PIL": lambda ps: [Image.open(p) for p in ps],
    "numpy": lambda ps: [pixels(p) for p in ps],
    "torch": lambda ps: [torch.from_numpy(pixels(p).copy()) for p in ps],
    "a batch": lambda ps: list(np.stack([pixels(p) for p in ps])),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_gives_the_same_features(
    form: str, model: dualenc.Model, paths: list[str], features: torch.Tensor
) -> None:
    assert torch.equal(model.encode(image=FORMS[form](paths)), features)


def test_urls_over_http(model: dualenc.Model, paths: list[str], features: torch.Tensor, http_root: str) -> None:
    assert torch.equal(model.encode(image=[f"{http_root}/{Path(p).name}" for p in paths]), features)
    with pytest.raises(DataError, match=r"image item 0 .*there is nothing at http"):
        model.encode(image=f"{http_root}/absent.jpg")


@pytest.fixture
def http_root(photos: Path) -> Any:
    import functools
    import http.server
    import threading

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(photos))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_one_item_is_one_row_and_a_string_is_one_text(model: dualenc.Model, paths: list[str]) -> None:
    whole = model.encode(text=["a cat", "a red bike"])
    assert torch.equal(model.encode(text="a cat"), model.encode(text=["a cat"]))
    assert model.encode(text="a cat").shape == (1, model.embed_dim)
    torch.testing.assert_close(model.encode(text="a cat"), whole[:1], rtol=0, atol=1e-6)
    assert model.encode(image=paths[0]).shape == model.encode(image=pixels(paths[0])).shape == (1, model.embed_dim)
    assert model.encode(image=[]).shape == (0, model.embed_dim)


def test_a_turned_pil_image_is_turned_as_its_file_is(model: dualenc.Model, paths: list[str], tmp_path: Path) -> None:
    image = Image.open(paths[0])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    of_file, of_object = (model.encode(image=x) for x in (tmp_path / "turned.jpg", Image.open(tmp_path / "turned.jpg")))
    assert torch.equal(of_file, of_object)
    assert not torch.equal(of_file, model.encode(image=paths[0]))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "HSV", "1"])
def test_other_modes(model: dualenc.Model, paths: list[str], mode: str) -> None:
    image = Image.open(paths[1])
    assert model.encode(image=image.convert(mode) if mode != "LA" else image.convert("L").convert("LA")).shape[0] == 1


def test_dtype_normalisation_and_batch_size(model: dualenc.Model, paths: list[str], features: torch.Tensor) -> None:
    raw = model.encode(image=paths, normalize=False)
    assert (raw.norm(dim=1) - 1).abs().min() > 1e-3
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=1), features, rtol=0, atol=1e-6)
    assert torch.equal(model.encode(image=paths, dtype=torch.float16), features.half())
    torch.testing.assert_close(model.encode(image=paths, batch_size=3, progress=True), features, rtol=0, atol=1e-6)
    reduced = dualenc.Model(model.bundle, dtype="bf16").encode(image=paths)
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - features).abs().max() < 0.05


def test_a_long_generator_is_read_as_it_is_encoded(model: dualenc.Model, paths: list[str]) -> None:
    """What was taken from it but not yet encoded is never more than one stretch."""
    taken, given = 0, 200
    embed = model.embedder.embed
    ahead = []

    def items() -> Any:
        nonlocal taken
        for i in range(given):
            taken += 1
            yield paths[i % 4]

    encoded = 0

    def watched(modality: str, chunk: Any, *args: Any) -> torch.Tensor:
        nonlocal encoded
        ahead.append(taken - encoded)
        out = embed(modality, chunk, *args)
        encoded += len(chunk)
        return out

    model.embedder.embed = watched  # type: ignore[method-assign]
    try:
        assert len(model.encode(image=items(), batch_size=2)) == given
    finally:
        del model.embedder.embed
    assert max(ahead) <= 32


# --- what is refused ---------------------------------------------------------------------------------------------


def bomb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"no picture", "not a JPEG"),
        (bomb(), "pixels"),
        ("nowhere.jpg", "there is no file nowhere.jpg"),
        (np.zeros((4, 4, 3), np.float32), r"uint8 \[H, W, 3\].*got float32 \[4, 4, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"give a batch as list\(batch\)"),
        (3, "cannot read an object of type int"),
        ("pipe:echo x", "pipe: commands work for shards only"),
    ],
    ids=["bytes", "bomb", "no file", "float", "batch", "int", "pipe"],
)
def test_a_bad_item_is_named_or_left_out(model: dualenc.Model, paths: list[str], bad: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"image item 1 .* cannot be encoded: .*{words}"):
        model.encode(image=[paths[0], bad])
    skipped: dict[int, str] = {}
    assert len(model.encode(image=[bad, paths[0], bad], skipped=skipped)) == 1
    assert sorted(skipped) == [0, 2]


def test_wrong_arguments_say_what_to_write(model: dualenc.Model, clip: Path, paths: list[str]) -> None:
    for call, words in (
        (lambda: model.encode(), "one modality at a time"),
        (lambda: model.encode(image=paths, text="a"), "image= and text="),
        (lambda: model.encode(imag=paths), r"Did you mean 'image'\?"),
        (lambda: model.encode(image=paths, batch_size=0), "batch_size: 0 must be at least 1"),
        (lambda: model.encode(image=paths, dtype="float8"), "unknown dtype 'float8'; use fp32, bf16 or fp16"),
        (lambda: dualenc.load_model(clip, dtype="int8"), "unknown dtype 'int8'"),
        (lambda: model.classify(paths, ["cat"]), "two or more different classes"),
        (lambda: model.classify(paths, "cat,dog"), "two or more different classes"),
        (lambda: model.classify(paths, ["cat", "dog"], "a photo"), r"needs exactly one \{\}"),
        (lambda: model.classify(paths, ["a", "b"], modality="audio"), "no modality 'audio' here"),
        (lambda: model.search(model.index(paths), ["a", "b"]), "takes one query, got 2"),
        (lambda: model.similarity(torch.ones(2, 3), torch.ones(2, 4)), r"got \[2, 3\] and \[2, 4\]"),
        (lambda: model.similarity(torch.ones(2, 3), torch.ones(2, 3), scaled=True, pair="a-b"), "has no pair 'a-b'"),
        (lambda: model.batch(image=[]), "image has no items"),
        (lambda: dualenc.Model(model.bundle).recipe("x.tar", steps=1), "save this one and load it"),
        (lambda: model.recipe("x.tar", steps=1, overrides=["optim.lrr=1"]), "Did you mean 'lr'"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


# --- comparing ---------------------------------------------------------------------------------------------------


def test_classify_is_the_softmax_of_scaled_cosines_of_averaged_prompts(
    model: dualenc.Model, paths: list[str], features: torch.Tensor
) -> None:
    names, templates = ["cat", "bike", "house"], ["a photo of a {}.", "a drawing of a {}."]
    weights = []
    for name in names:
        prompts = model.encode(text=[t.replace("{}", name) for t in templates])
        weights.append(torch.nn.functional.normalize(prompts.mean(0), dim=0))
    want = (model.embedder.logit_scale("image-text") * features @ torch.stack(weights).T).softmax(1)
    found = model.classify(paths, names, templates)
    torch.testing.assert_close(found.probabilities, want, rtol=0, atol=1e-5)
    assert found.best == [names[i] for i in want.argmax(1).tolist()]
    assert found.items == paths
    assert [row[0][0] for row in found.top(1)] == found.best
    words = {"cat": ["cat", "kitten"], "bike": "bike"}
    assert model.classify(paths, words).names == ["cat", "bike"]
    assert not torch.equal(
        model.classify(paths, words).probabilities, model.classify(paths, ["cat", "bike"]).probabilities
    )


def test_a_model_with_a_bias_gives_sigmoids(siglip: Path, paths: list[str]) -> None:
    model = dualenc.load_model(siglip, device="cpu")
    found = model.classify(paths, ["cat", "dog"], "{}")
    logits = model.similarity(model.encode(image=paths), model.encode(text=["cat", "dog"]), scaled=True)
    bias = model.embedder.logit_bias("image-text")
    assert bias is not None
    assert bias < -1
    torch.testing.assert_close(found.probabilities, logits.sigmoid(), rtol=1e-4, atol=1e-9)


def test_search_finds_the_nearest_of_a_folder(model: dualenc.Model, photos: Path, paths: list[str]) -> None:
    index = model.index(photos)
    assert index.modality == "image"
    assert sorted(map(str, index.items)) == sorted(paths)
    hits = model.search(index, "a red bike", k=3)
    cosines = dict(zip(index.items, (index.features @ model.encode(text="a red bike").T)[:, 0].tolist(), strict=True))
    assert [h.item for h in hits] == sorted(cosines, key=lambda p: -cosines[p])[:3]
    assert [h.score for h in hits] == pytest.approx(sorted(cosines.values(), reverse=True)[:3])
    (same,) = model.search(index, paths[2], k=1, modality="image")
    assert same.item == paths[2]
    assert same.score == pytest.approx(1, abs=1e-5)
    assert len(model.search(index, "x", k=100)) == len(paths)


def test_a_folder_is_read_by_endings_and_the_rest_of_it_left_alone(
    model: dualenc.Model, paths: list[str], tmp_path: Path
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "A.JPG").write_bytes(Path(paths[0]).read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("words beside the images")
    (tmp_path / ".hidden.jpg").write_bytes(Path(paths[0]).read_bytes())
    index = model.index(tmp_path)
    assert list(index.items) == [str(tmp_path / "deep" / "er" / "A.JPG")]
    assert list(index.skipped) == [str(tmp_path / "broken.png")]
    with pytest.raises(DataError, match=r"broken.png.*cannot be encoded"):
        model.classify(tmp_path, ["a", "b"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no files of image \(jpg"):
        model.index(tmp_path / "empty")


def test_batch_and_module_give_the_features_of_encode(
    model: dualenc.Model, paths: list[str], features: torch.Tensor
) -> None:
    out = model.module(model.batch(image=paths, text=["a", "b"]))
    torch.testing.assert_close(out["features"]["image"], features, rtol=0, atol=1e-5)
    assert out["features"]["text"].requires_grad


def test_saved_and_loaded_again(model: dualenc.Model, paths: list[str], features: torch.Tensor, tmp_path: Path) -> None:
    again = dualenc.load_model(model.save(tmp_path / "ours"), device="cpu")
    assert torch.equal(again.encode(image=paths), features)
    assert repr(again).startswith("<dualenc.Model")
