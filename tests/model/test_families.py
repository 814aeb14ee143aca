"""Released families: loaded whole and written back, or refused in one sentence that says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.families import architectures, measure, open_clip_rows, table
from benchmarks.matrix import COLUMNS, MODELS, cell
from dualenc.encoders.released.whole_models import FAMILIES, REFUSED
from dualenc.errors import ConfigError
from dualenc.model import load_model


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("family", [f for f in architectures() if f not in ("clip", "siglip")])
def test_a_family_loads_with_the_library_s_features(tmp_path: Path, family: str) -> None:
    row = measure(family, architectures()[family], tmp_path)
    assert row.loads == "whole", row
    # TIPS has no Pillow processor in transformers: its resize by torchvision gives other pixels
    assert row.difference <= (1e-3 if family == "tipsv2" else 1e-5), row
    graphs = set() if family == "siglip2" else {"onnx"}  # NaFlex
    assert set(row.exports) >= {"hf", "sentence-transformers", "safetensors"} | graphs


@pytest.mark.parametrize("family", ["blip", "owlvit", "pe_audio"])
def test_what_is_refused_says_why(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ConfigError, match=REFUSED[family].replace(".", r"\.")):
        load_model(str(tmp_path))
    assert not set(REFUSED) & set(FAMILIES)


def test_every_dual_encoder_of_transformers_is_in_one_list_or_the_other() -> None:
    """A new version of transformers with a new family shows here."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    two = set()
    for model_type, name in MODEL_MAPPING_NAMES.items():
        names = [name] if isinstance(name, str) else list(name)
        file = Path(transformers.__file__).parent / "models" / model_type.replace("-", "_")
        source = "".join(p.read_text(encoding="utf-8") for p in file.glob("modeling_*.py")) if file.is_dir() else ""
        if "def get_text_features" in source and any(f"class {n}(" in source for n in names):
            two.add(model_type)
    assert len(two) > 10
    assert not two - set(FAMILIES) - set(REFUSED), two - set(FAMILIES) - set(REFUSED)


def test_open_clip_s_configurations() -> None:
    rows = open_clip_rows(["ViT-B-32", "coca_ViT-B-32", "RN50", "ViT-B-16-SigLIP", "xlm-roberta-base-ViT-B-32"])
    assert len(rows) == 5
    assert "| whole |" in table(rows)


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("name", [n for n in MODELS if n != "timm + MiniLM"])
def test_a_row_of_the_matrix(tmp_path: Path, name: str) -> None:
    """The table of docs/howto/deploy.md: a small difference, or a sentence."""
    bundle = MODELS[name](tmp_path / "model")
    for column in COLUMNS:
        found = cell(bundle, column, tmp_path / column)
        print(name, column, found.says)
        assert found.difference is None or found.difference <= (1e-4 if column == "onnx" else 1e-5)
        assert found.difference is not None or len(found.says) > 20
