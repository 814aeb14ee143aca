"""Parts of a text, for pairs of two views of one text: crops (Contriever, Izacard et al. 2021, arXiv 2112.09118),
masked spans (Mirror-BERT, Liu et al. 2021, arXiv 2104.08027), neighbouring sentences (CCP)."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from dualenc.config import Positive, Section, Share

_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])[」』”’）]*\s*|\n\s*\n")


class TextView(Section):
    """A text is chosen, then cropped, then a run of its characters is masked."""

    choose: Literal["caption", "sentence", "neighbor"] | None = Field(
        default=None,
        description="which text of the sample is used, the same draw for all modalities that read the same member: "
        "caption: one of its captions; sentence: one sentence of it; neighbor: a sentence next to that one. null: each "
        "modality draws a caption of its own",
    )
    crop: tuple[Share, Share] | None = Field(
        default=None,
        description="smallest and largest share of the words that are kept, in one run, such as [0.1, 0.5]",
    )
    mask: Positive | None = Field(default=None, description="consecutive characters that are masked")
    mask_from: Positive = Field(default=30, description="texts with fewer characters are not masked")
    mask_text: str = Field(
        default=" ", description="replaces the masked characters; write [MASK] if the tokenizer has it"
    )

    @field_validator("crop")
    @classmethod
    def _in_order(cls, crop: tuple[float, float] | None) -> tuple[float, float] | None:
        if crop is not None and not 0 < crop[0] <= crop[1]:
            raise ValueError(f"view.crop: {list(crop)} must be [smallest, largest], with 0 < smallest ≤ largest ≤ 1")
        return crop


def chosen(texts: list[str], how: Literal["caption", "sentence", "neighbor"], rng: np.random.Generator) -> str:
    """One caption, one of its sentences, or one beside that, which the same ``rng`` draws for all of these.

    A caption of one sentence is its own neighbor.
    """
    text = texts[int(rng.integers(len(texts)))]
    if how == "caption":
        return text
    parts = sentences(text)
    at, side = int(rng.integers(len(parts))), int(rng.integers(2))
    if how == "neighbor" and len(parts) > 1:
        at += 1 if at == 0 or (side and at + 1 < len(parts)) else -1
    return parts[at]


def sentences(text: str) -> list[str]:
    """A text cut after full stops, question and exclamation marks that whitespace follows, and at empty lines."""
    return [s for s in (part.strip() for part in _END.split(text)) if s] or [text]


def changed(text: str, view: TextView, rng: np.random.Generator) -> str:
    """The text cropped and masked as ``view`` says; never empty."""
    if view.crop is not None:
        words = text.split()
        count = min(len(words), max(1, round(float(rng.uniform(*view.crop)) * len(words))))
        start = int(rng.integers(len(words) - count + 1))
        text = " ".join(words[start : start + count])
    if view.mask is not None and view.mask_from <= len(text) > view.mask:
        start = int(rng.integers(len(text) - view.mask + 1))
        text = text[:start] + view.mask_text + text[start + view.mask :]
    return text
