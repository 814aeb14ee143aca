"""What is attacked: for each target some whole inputs, and a function that takes bytes as the program would.

The function may return or raise a DualencError; anything else is an escape.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Use = Callable[[bytes], Any]
Target = Callable[[], tuple[list[bytes], Use]]
TARGETS: dict[str, Target] = {}


def target(make: Target) -> Target:
    TARGETS[make.__name__] = make
    return make


def _item(kind: str, settings: dict[str, Any] | None = None) -> Use:
    """Decoded, made a training and an evaluation row, collated: an item's way through a worker."""
    from dualenc.data.modalities.modality import modalities, of_one_item

    part = modalities[kind](modalities[kind].Config.model_validate(settings or {}))

    def use(raw: Any) -> None:
        with of_one_item():
            x = part.decode(raw)
            part.collate([part.eval(x), part.train(x, np.random.default_rng(0))])

    return use


def _pictures(formats: tuple[str, ...]) -> list[bytes]:
    from PIL import Image

    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    out = []
    for form in formats:
        for image in (Image.fromarray(smooth), Image.fromarray(smooth[..., 0])):
            stream = io.BytesIO()
            exif = image.getexif()
            exif[0x0112] = 6
            more = {"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
            image.save(stream, form, **more)
            out.append(stream.getvalue())
    return out


@target
def image_common() -> tuple[list[bytes], Use]:
    return _pictures(("JPEG", "PNG", "WEBP")), _item("image", {"size": 32})


@target
def image_others() -> tuple[list[bytes], Use]:
    return _pictures(("GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")), _item("image", {"size": 32})


@target
def image_naflex() -> tuple[list[bytes], Use]:
    return _pictures(("JPEG", "PNG")), _item("image", {"resize": "naflex", "patch": 8, "max_patches": 16})


@target
def sound() -> tuple[list[bytes], Use]:
    import soundfile

    wave = np.random.default_rng(0).normal(0, 0.1, 4000).astype(np.float32)
    out = []
    for form, sub in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")):
        stream = io.BytesIO()
        soundfile.write(stream, wave, 16_000, format=form, subtype=sub)
        out.append(stream.getvalue())
    return out, _item("audio", {"max_s": 0.2})


@target
def sound_others() -> tuple[list[bytes], Use]:
    import soundfile

    wave = np.random.default_rng(0).normal(0, 0.1, (2000, 2)).astype(np.float32)
    out = []
    for form in ("AIFF", "AU", "W64", "RF64", "CAF", "WAVEX"):
        stream = io.BytesIO()
        soundfile.write(stream, wave, 16_000, format=form, subtype="PCM_16")
        out.append(stream.getvalue())
    return out, _item("audio", {"max_s": 0.2, "long": "crop"})


def _npy(x: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()


@target
def sweep() -> tuple[list[bytes], Use]:
    points = np.random.default_rng(0).normal(0, 5, (200, 4)).astype(np.float32)
    packed = io.BytesIO()
    np.savez_compressed(packed, points=points)
    head = "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z intensity\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\n"
    head += f"WIDTH {len(points)}\nHEIGHT 1\n"
    head += f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(points)}\n"
    rows = "\n".join(" ".join(f"{v:.3f}" for v in p) for p in points)
    pcd = [f"{head}DATA ascii\n{rows}\n".encode(), f"{head}DATA binary\n".encode() + points.tobytes()]
    ints = (points * 100).astype(np.int16)
    return [_npy(points), _npy(ints), packed.getvalue(), *pcd, points.tobytes()], _item("lidar", {"bin_columns": 4})


@target
def sweep_sidecar() -> tuple[list[bytes], Use]:
    points = _npy(np.random.default_rng(0).normal(0, 5, (50, 5)).astype(np.float32))
    doc = {"columns": ["x", "y", "z", "intensity", "ring"], "to_ego": np.eye(4).tolist(), "drive": "a"}
    use = _item("lidar")

    def both(raw: bytes) -> None:
        use({"json:lidar": _json(raw), "lidar.npy": points})

    return [json.dumps(doc).encode()], both


@target
def rig() -> tuple[list[bytes], Use]:
    picture = _pictures(("JPEG",))[0]
    K = [[40.0, 0, 24], [0, 40.0, 32], [0, 0, 1]]
    view = {"name": "front", "member": "cam0.jpg", "size": [48, 64], "intrinsics": K, "to_ego": np.eye(4).tolist()}
    doc = {"drive": "a", "views": [view, {**view, "name": "left"}]}
    use = _item("camera", {"size": [32, 32], "missing": "mask"})

    def both(raw: bytes) -> None:
        use({"json:cameras": _json(raw), "cam0.jpg": picture})

    return [json.dumps(doc).encode()], both


def _json(raw: bytes) -> Any:
    from dualenc.errors import DecodeError

    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise DecodeError("no JSON") from e


@target
def caption() -> tuple[list[bytes], Use]:
    texts = ["a photo of a dog", "Ein Café am Fluß 猫 🐕\u200d🦺", "x" * 5000, "word " * 400, "&amp;&lt;&gt; it's"]
    return [t.encode() for t in texts], _item("text")


# --- shards ------------------------------------------------------------------------------------------------------


def _tar() -> bytes:
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(6):
            name = f"s{i:03d}" if i else "größer/" + "x" * 120
            for ending, raw in (("txt", b"a dog"), ("json", b'{"a": 1}'), ("jpg", bytes(700))):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return out.getvalue()


@target
def shard() -> tuple[list[bytes], Use]:
    from dualenc.data.shards.tar import index_tar

    def use(raw: bytes) -> None:
        index = index_tar(lambda at, n: raw[at : at + n], len(raw), "x.tar")
        for i in range(len(index)):
            index.sample(i)

    return [_tar()], use


@target
def sidecar() -> tuple[list[bytes], Use]:
    from dualenc.data.shards.tar import TarIndex, index_tar

    raw = _tar()
    whole = index_tar(lambda at, n: raw[at : at + n], len(raw), "x.tar").to_bytes()

    def use(raw: bytes) -> None:
        index = TarIndex.from_bytes(raw, "x.idx.npz")
        for i in range(len(index)):
            index.sample(i)

    return [whole], use


@target
def shard_read() -> tuple[list[bytes], Use]:
    """A damaged shard through the reader that training and evaluation use, from a file."""
    from dualenc.data.shards.reader import iter_samples

    folder = Path(tempfile.mkdtemp())

    def use(raw: bytes) -> None:
        (folder / "x.tar").write_bytes(raw)
        for _ in iter_samples(str(folder / "x.tar"), {"image": ["jpg"], "text": ["txt", "json:a"]}):
            pass

    return [_tar()], use


@target
def shard_index() -> tuple[list[bytes], Use]:
    from dualenc.data.shards.index import load_index

    folder = Path(tempfile.mkdtemp())
    rows = [{"url": f"x-{i}.tar", "samples": 10 + i, "bytes": 10240, "digest": "ab" * 32} for i in range(3)]

    def use(raw: bytes) -> None:
        (folder / "index.json").write_bytes(raw)
        load_index(str(folder / "index.json"))

    return [json.dumps({"version": 1, "shards": rows}).encode()], use


# --- recipes, tasks, checkpoints ---------------------------------------------------------------------------------


@target
def recipe() -> tuple[list[bytes], Use]:
    from dualenc.config import load_recipe
    from dualenc.shipped import recipes_folder

    folder = Path(tempfile.mkdtemp())
    files = [p for p in sorted(recipes_folder().rglob("*.yaml")) if "launch" not in p.parts]
    samples = [raw for p in files if b"base:" not in (raw := p.read_bytes())]

    def use(raw: bytes) -> None:
        (folder / "r.yaml").write_bytes(raw)
        load_recipe(folder / "r.yaml")

    return samples, use


@target
def task() -> tuple[list[bytes], Use]:
    from dualenc_evals.catalog import load_task, task_files

    folder = Path(tempfile.mkdtemp())
    samples = [raw for p in task_files().values() if b"include:" not in (raw := p.read_bytes())]

    def use(raw: bytes) -> None:
        (folder / "t.yaml").write_bytes(raw)
        load_task(str(folder / "t.yaml"))

    return samples, use


def _bundle(folder: Path) -> Path:
    from dualenc.config import Recipe
    from dualenc.model import build_bundle

    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "modalities": {
                "image": {"input": {"size": 8}, "encoder": {"name": "own/convnet", "widths": [4], "depths": [1]}},
                "text": {
                    "input": {"tokenizer": "clip-bpe:600", "context_length": 8},
                    "encoder": {"name": "own/transformer", "width": 8, "layers": 1, "heads": 1},
                },
            },
            "pairs": [["image", "text"]],
            "embed_dim": 4,
            "loss": {"name": "info_nce"},
            "data": {"sources": [{"name": "a", "shards": "x.tar"}]},
            "batch": {"size": 2},
            "budget": {"steps": 1},
        }
    )
    return build_bundle(recipe).save(folder)


@target
def checkpoint_description() -> tuple[list[bytes], Use]:
    from dualenc.model import load_model

    folder = _bundle(Path(tempfile.mkdtemp()) / "model")

    def use(raw: bytes) -> None:
        (folder / "dualenc.json").write_bytes(raw)
        load_model(str(folder))

    return [(folder / "dualenc.json").read_bytes()], use


@target
def checkpoint_weights() -> tuple[list[bytes], Use]:
    """Weights damaged with a description that was written for them: only the reader of tensors stands in between."""
    import hashlib

    from dualenc.model import load_model

    folder = _bundle(Path(tempfile.mkdtemp()) / "model")
    whole = json.loads((folder / "dualenc.json").read_text(encoding="utf-8"))

    def use(raw: bytes) -> None:
        (folder / "model.safetensors").write_bytes(raw)
        whole["weights"]["sha256"] = hashlib.sha256(raw).hexdigest()
        (folder / "dualenc.json").write_text(json.dumps(whole), encoding="utf-8")
        load_model(str(folder))

    return [(folder / "model.safetensors").read_bytes()], use


@target
def torch_file() -> tuple[list[bytes], Use]:
    import torch

    from dualenc.encoders.released.weights import read_weights

    folder = Path(tempfile.mkdtemp())
    out = io.BytesIO()
    torch.save({"state_dict": {"a.weight": torch.zeros(2, 3), "a.bias": torch.ones(2)}, "epoch": 3}, out)

    def use(raw: bytes) -> None:
        (folder / "x.pt").write_bytes(raw)
        read_weights(folder / "x.pt")

    return [out.getvalue()], use


@target
def save_manifest() -> tuple[list[bytes], Use]:
    """A run folder whose newest save has a damaged manifest: it is passed over, the older one is found."""
    from dualenc.checkpoint.save import Saver, TrainState, newest_good
    from dualenc.errors import CheckpointError

    run = Path(tempfile.mkdtemp())
    for step in (1, 2):
        with Saver(run, step) as saver:
            saver.state(TrainState(step=step))
    file = run / "checkpoints" / "step-0000000002" / "manifest.json"
    whole = file.read_bytes()

    def use(raw: bytes) -> None:
        file.write_bytes(raw)
        found = newest_good(run)
        assert found is not None
        if found.name.endswith("1"):
            raise CheckpointError("passed over")
        assert raw == whole or json.loads(raw) == json.loads(whole)

    return [whole], use
