"""Learned prompts in a tower of plain transformer blocks: nothing else of it is trained (PromptSRC, Khattak et al.
2023, arXiv 2307.06948; visual prompts of VPT, Jia et al. 2022, arXiv 2203.12119).

With P tokens and J layers, and s_k [n, L, W] what block k is given,

    images:  s_0 ← [s_0; p_0],  s_k ← [s_k less its last P places; p_k] for 0 < k < J; none after the last block
    texts:   s_0 at places b … b+P−1 ← s_0 + p_0,  s_k there ← p_k for 0 < k < J

b is the place of the first word, and the places there are those of ``input.prefix``, words that stand before every
text: so p_0 starts as zero, where a tower with J = 1 is the released one with these words before its texts. All others
start from a normal distribution of deviation 0.02, as in the paper.

Both are hooks on the tower's blocks, so any tower whose blocks pass on [n, L, W] can have them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualenc.config import Prompts
from dualenc.encoders.tower import Tower
from dualenc.encoders.trainable.lora import is_part
from dualenc.errors import ConfigError

_FROM_PAPER = 9
"""Layers with prompts where the recipe does not say: 9 of CLIP's 12."""
PART = "prompts"
"""The part of a tower that holds them."""


class PromptTokens(nn.Module):
    """The tokens [J, P, W] of a tower, and what they do to the states of its blocks.

    Args:
        at: the place of the first one in a text; None: they come after all places of an image.
    """

    def __init__(self, layers: int, tokens: int, width: int, at: int | None) -> None:
        super().__init__()
        self.at, self.tokens = at, tokens
        self.prompt_tokens = nn.Parameter(torch.empty(layers, tokens, width))
        nn.init.normal_(self.prompt_tokens, std=0.02)
        if at is not None:
            nn.init.zeros_(self.prompt_tokens[0])

    def forward(self, layer: int) -> Tensor:
        """[P, W], no view of the parameter: engines that gather weights at each call take them away after it."""
        return self.prompt_tokens[layer].clone()

    def into(self, layer: int, states: Tensor) -> Tensor:
        """What block ``layer`` is given [n, L, W], with its tokens."""
        own = self(layer).to(states.dtype).expand(states.shape[0], -1, -1)  # len would fix the batch of an export
        if self.at is None:
            return torch.cat([states if layer == 0 else states[:, : -self.tokens], own], 1)
        end = self.at + self.tokens
        if layer == 0:
            own = own + states[:, self.at : end]
        return torch.cat([states[:, : self.at], own, states[:, end:]], 1)


class _Before:
    """A hook that gives a block its tokens. It belongs to its tower: a copy of that has a copy of this."""

    def __init__(self, prompts: PromptTokens, layer: int) -> None:
        self.prompts, self.layer = prompts, layer

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self.prompts.into(self.layer, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.prompts.into(self.layer, kwargs["hidden_states"])}


class _AfterLast:
    """A hook that takes the tokens away again."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, _: nn.Module, __: Any, out: Any) -> Any:
        return (out[0][:, : -self.tokens], *out[1:]) if isinstance(out, tuple) else out[:, : -self.tokens]


def add_prompts(tower: Tower, config: Prompts, at: int | None, where: str) -> None:
    """Put learned prompts into a tower; only they (and the head, if asked) are trained after.

    Args:
        at: see :class:`PromptTokens`.
        where: dotted key of the settings, for messages.

    Raises:
        ConfigError: the tower has no blocks, or fewer than ``layers``.
    """
    blocks = tower.blocks()
    width = next((p.shape[0] for b in blocks[:1] for n, p in b.named_parameters() if p.ndim == 1 and _of_norm(n)), None)
    if width is None:
        raise ConfigError(f"{where}: {tower.component.name} is not a transformer, and prompts are tokens of its blocks")
    if config.layers is not None and config.layers > len(blocks):
        raise ConfigError(f"{where}.layers: {config.layers} is more than the tower's {len(blocks)} blocks")
    layers = min(_FROM_PAPER, len(blocks)) if config.layers is None else config.layers
    prompts = PromptTokens(layers, config.tokens, width, at)
    tower.add_module(PART, prompts)
    for k, block in enumerate(blocks[:layers]):
        block.register_forward_pre_hook(_Before(prompts, k), with_kwargs=True)
    if at is None:
        blocks[-1].register_forward_hook(_AfterLast(config.tokens))
    tower.packs = tower.length_groups = False  # packed texts have no places
    tower.fresh = (*tower.fresh, PART)
    for name, p in tower.named_parameters():
        p.requires_grad_(is_part(name, tower.fresh) or (config.head and name.startswith("head.")))


def is_prompt(name: str) -> bool:
    """Whether a tensor of a tower or model holds learned prompts."""
    return name.endswith(f"{PART}.prompt_tokens")


def _of_norm(name: str) -> bool:
    """Whether a parameter of a block is that of a norm, by the names that libraries give these."""
    return "norm" in name.lower() or name.startswith("ln_")


def try_prompts(tower: Tower, rows: Any, where: str) -> None:
    """Run the tower once on two collated rows.

    Raises:
        ConfigError: its blocks do not pass on one sequence [n, L, W], so tokens cannot be added to it.
    """
    shapes: list[tuple[int, ...]] = []

    def look(_: nn.Module, __: Any, out: Any) -> None:
        shapes.append(tuple((out[0] if isinstance(out, tuple) else out).shape))

    handles = [b.register_forward_hook(look) for b in tower.blocks()[:-1]]
    was = tower.training
    tower.eval()
    try:
        with torch.no_grad():
            tower(rows)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as e:
        raise ConfigError(_no_sequence(tower, where)) from e
    finally:
        for handle in handles:
            handle.remove()
        tower.train(was)
    if any(len(s) != 3 or s[0] != 2 or s != shapes[0] for s in shapes):
        raise ConfigError(_no_sequence(tower, where))


def _no_sequence(tower: Tower, where: str) -> str:
    return (
        f"{where}: the blocks of {tower.component.name} do not hand on one sequence of tokens, so prompts cannot be "
        "added to it; use a plain ViT or text transformer, or lora"
    )
