"""``modalities.NAME.stream``: what a second view of a modality has of its own beside the tower that it shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dualenc.config.section import Positive, Section

Below1 = Annotated[float, Field(ge=0, lt=1)]


class Stream(Section):
    """A stream of its own through a shared tower, as the strong stream of Fini et al. 2023 (arXiv 2305.08675).

    ``projector`` replaces the tower's head for this modality: ``mlp`` has ``layers`` linear layers, with layer norm and
    GELU between them. ``dropout`` and ``drop_path`` act in training on what each residual block adds to its input.
    """

    projector: Literal["linear", "mlp", "shared"] = Field(
        default="mlp", description="from the pooled feature to the shared space; shared: the tower's own head"
    )
    layers: Annotated[int, Field(ge=2)] = Field(default=3, description="mlp: linear layers")
    hidden: Positive = Field(default=1024, description="mlp: width between the layers")
    dropout: Below1 = Field(default=0.0, description="dropout on what each block adds to its input")
    drop_path: Below1 = Field(
        default=0.0,
        description="share of rows that skip the last block (stochastic depth); for earlier blocks in proportion to "
        "their depth",
    )
