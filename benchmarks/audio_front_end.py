"""Log-mel features of dualenc against ClapFeatureExtractor, in one run on one core.

``python -m benchmarks.audio_front_end FOLDER``: FOLDER holds audio files. Both start from the same decoded 48 kHz
waveforms and end with features of 10 s (repeatpad).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dualenc.data.modalities.audio import AudioConfig, AudioInput
from dualenc.encoders.adapters.hf_audio import audio_defaults
from dualenc.encoders.audio_front import FrontEnd
from dualenc.errors import ConfigError, DualencError

CLIPS = 32
ROUNDS = 5
_UNFUSED = SimpleNamespace(model_type="clap_audio_model", num_mel_bins=64, enable_fusion=False)


def compare(folder: Path) -> None:
    """Print clips a second of both, the ratio of the best rounds, and the largest difference of their features."""
    from transformers import ClapFeatureExtractor

    files = sorted(p for p in folder.rglob("*") if p.suffix in (".wav", ".flac", ".ogg", ".mp3"))[:CLIPS]
    if not files:
        raise ConfigError(f"{folder} holds no audio files (wav, flac, ogg, mp3).")
    torch.set_num_threads(1)
    source = AudioInput(AudioConfig(**audio_defaults(_UNFUSED, {})))
    rows = [source.eval(source.decode(p.read_bytes())) for p in files]
    waves = [r["wave"].numpy() for r in rows]
    front = FrontEnd(source.describe())
    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad")

    def clap() -> Any:
        return extractor(waves, sampling_rate=source.config.rate, return_tensors="np")["input_features"]

    runs: dict[str, Callable[[], Any]] = {
        "ClapFeatureExtractor": clap,
        "dualenc, evaluation (fp64)": lambda: front.eval()(source.collate(rows)).values,
        "dualenc, training (fp32)": lambda: front.train()(source.collate(rows)).values,
    }
    reference = clap()[:, 0]
    best = dict.fromkeys(runs, float("inf"))
    # CPU seconds of this process, round by round: other load on the machine then slows all of them alike.
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    seconds = sum(map(len, waves)) / source.config.rate / len(waves)
    print(f"{len(files)} clips of {seconds:.1f} s on average, one thread, CPU seconds, best of {ROUNDS} rounds")
    slow = best["ClapFeatureExtractor"]
    for name, run in runs.items():
        far = np.abs(np.asarray(run()).reshape(reference.shape) - reference)
        print(
            f"{name:>26}  {len(files) / best[name]:7.1f} clips/s  {slow / best[name]:5.2f} ×  "
            f"difference at most {far.max():.1g} dB, on average {far.mean():.1g} dB"
        )


def main(arguments: list[str]) -> None:
    """Run the comparison on a folder."""
    if len(arguments) != 1:
        raise ConfigError("usage: python -m benchmarks.audio_front_end FOLDER_OF_AUDIO_FILES")
    compare(Path(arguments[0]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DualencError as e:
        raise SystemExit(f"error: {e}") from None
