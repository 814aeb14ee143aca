"""What pages say besides their blocks: sentences that the code prints, and the templates they name."""

from __future__ import annotations

import re

import yaml
from _shared import ROOT


def test_the_sentences_of_the_troubleshooting_page_are_in_the_code() -> None:
    """Word for word, in pieces between what is filled in: a sentence that was reworded is found here."""
    rooms = ("dualenc", "evals/dualenc_evals", "data_tools/dualenc_data_tools")
    code = "\n".join(p.read_text(encoding="utf-8") for room in rooms for p in sorted((ROOT / room).rglob("*.py")))
    code = re.sub(r"\"\s*\n\s*f?\"", "", code)  # strings that go on in the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## It trains, but badly")[0]
    cells = [row.split(" | ")[0] for row in page.splitlines() if row.startswith("| `")]
    assert len(cells) > 20
    for sentence in [s for cell in cells for s in re.findall(r"`([^`]+)`", cell)]:
        if sentence.startswith("torch."):
            continue
        for piece in [p.strip(" :") for p in sentence.split("…")]:
            assert piece in code, (sentence, piece)


def test_the_manifest_for_kubernetes() -> None:
    raw = yaml.safe_load((ROOT / "recipes" / "launch" / "pytorchjob.yaml").read_text(encoding="utf-8"))
    replicas = raw["spec"]["pytorchReplicaSpecs"]
    assert [replicas[k]["replicas"] for k in ("Master", "Worker")] == [1, 3]
    for part in replicas.values():
        (container,) = part["template"]["spec"]["containers"]
        assert container["command"][:4] == ["torchrun", "-m", "dualenc", "train"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(raw["spec"]["nprocPerNode"])
