"""A bundle: a DualEncoder, how its inputs are made, and where it came from; saved as a self-describing folder.

FOLDER/model.safetensors      the weights (or model-00001-of-00008.safetensors …, as the ranks of a run wrote them)
FOLDER/dualenc.json           inputs, architectures, activations, tokenizer hashes, versions, hash of the weights
FOLDER/inputs/MODALITY/       files an input needs (a tokenizer's)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dualenc.checkpoint.ranges import write_tensors
from dualenc.config import Component, LogitScale, Modality, Prompts, Recipe, Unlocked, settings_as
from dualenc.config.modality import streams_of
from dualenc.config.stream import Stream
from dualenc.data.modalities import ModalityInput, modalities, rows_of
from dualenc.data.modalities.modality import SavesFiles
from dualenc.data.modalities.text import TextInput
from dualenc.distributed.devices import resolve_device
from dualenc.encoders import DualEncoder, Tower, activations, build_tower, check_input, encoder_origin, input_defaults
from dualenc.encoders.released.weights import load_exactly
from dualenc.encoders.trainable.prompts import try_prompts
from dualenc.errors import CheckpointError, ConfigError
from dualenc.model.mixing import check_trained_towers, two_rows
from dualenc.model.record import record
from dualenc.plugins import about, import_plugins
from dualenc.seeds import derive_seed
from dualenc.versions import versions

if TYPE_CHECKING:
    from dualenc.model.embedder import Embedder

logger = logging.getLogger(__name__)

FORMAT = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "dualenc.json"
LIBRARIES = (
    *("dualenc", "torch", "numpy", "pillow", "soundfile", "soxr", "safetensors"),
    *("open_clip_torch", "timm", "transformers", "tokenizers"),
)
"""Whose versions a model's numbers depend on."""


@dataclass
class Bundle:
    """A model and everything needed to use it.

    Attributes:
        name: of the recipe or the released model.
        model: the DualEncoder.
        inputs: modality → how its raw items become tensors.
        parts: modality → its recipe part with every setting resolved (kind, input, encoder, lock).
        scale: how temperature and bias are set up.
        provenance: step, samples, git hash, source: whatever is known of its origin.
        weights_hash: sha256 of the weights file it was loaded from; None for a model being built or trained.
        device: where ``model`` lies.
    """

    name: str
    model: DualEncoder
    inputs: dict[str, ModalityInput]
    parts: dict[str, Modality]
    scale: LogitScale
    embed_dim: int
    provenance: dict[str, Any] = field(default_factory=dict)
    weights_hash: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities."""
        return list(self.parts)

    def to(self, device: torch.device | str) -> Bundle:
        """Move the model; ``auto`` is CUDA if there is a device."""
        self.device = resolve_device(device)
        self.model.to(self.device)
        return self

    def embedder(self, dim: int | None = None, precision: str = "fp32") -> Embedder:
        """A way to embed raw items with this model; ``dim``, ``precision``: see :meth:`Embedder.from_bundle`."""
        from dualenc.model.embedder import Embedder

        return Embedder.from_bundle(self, dim=dim, precision=precision)

    def describe(self) -> dict[str, Any]:
        """What dualenc.json holds, weights aside."""
        return {
            "format": FORMAT,
            "name": self.name,
            "embed_dim": self.embed_dim,
            "pairs": [list(p) for p in self.model.pairs],
            "logit_scale": self.scale.model_dump(mode="json"),
            "modalities": {m: self._describe_part(m, self.inputs[m].describe()) for m in self.parts},
            "versions": versions(LIBRARIES, "absent"),
            **({"plugins": about(needed)} if (needed := self.plugins()) else {}),
            "provenance": self.provenance,
        }

    def plugins(self) -> list[str]:
        """The plugin modules that this model is built with."""
        names = {modalities.origin(kind_of(m, part)) for m, part in self.parts.items()}
        names |= {encoder_origin(part.encoder) for part in self.parts.values()}
        return sorted(n for n in names if n is not None)

    def _describe_part(self, m: str, described: Mapping[str, Any]) -> dict[str, Any]:
        tower, part = self.model.tower(m), self.parts[m]
        assert isinstance(tower, Tower)
        return {
            "kind": part.kind,
            "input": dict(described),
            "encoder": tower.component.model_dump(mode="json"),
            "activation": activations(tower),
            **{k: x for k, x in part.model_dump(mode="json").items() if k in ("lock", "shares", "stream", "prompts")},
        }

    def save(
        self,
        folder: str | Path,
        state: Mapping[str, Tensor] | None = None,
        provenance: Mapping[str, Any] | None = None,
        pieces: Mapping[str, str] | None = None,
        ready: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the bundle into ``folder`` (created; an earlier bundle in it is overwritten) and return the folder.

        The description, which holds the hash of the weights, is written last: a folder without it is not a bundle.

        Args:
            state: the weights, by the names of ``model.state_dict()``; default: the model's own. A run whose engine
                holds the weights in pieces, or that keeps a moving average, passes them here. Heads that only a loss
                uses are left out.
            provenance: added to the bundle's own.
            pieces: file → sha256 of weights that the ranks of a run have written into ``folder``, see
                :mod:`dualenc.checkpoint.ranges`; no weights are written then.
            ready: what :meth:`for_use` gave. The model is not touched then, so another thread may train it.

        Raises:
            CheckpointError: if ``state`` does not have exactly the model's tensors.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).unlink(missing_ok=True)
        weights: dict[str, Any]
        if pieces is not None:
            weights = {"files": dict(sorted(pieces.items())), "sha256": pieces_digest(pieces)}
        else:
            tensors = self.for_use(state) if ready is None else ready
            # clone: safetensors refuses tensors that share memory, such as views into a flat buffer
            flat = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
            write_tensors(folder / WEIGHTS, flat, record(self))
            weights = {"file": WEIGHTS, "sha256": file_digest(folder / WEIGHTS)}
        description = self.describe()
        for m, x in self.inputs.items():
            if isinstance(x, SavesFiles):
                written = x.save(folder / "inputs" / m)
                if "tokenizer" in written:  # its name would be the folder it came from, on this machine
                    written["tokenizer"]["name"] = written["config"]["tokenizer"]
                description["modalities"][m]["input"] = written
        description["provenance"] = {**self.provenance, **(provenance or {})}
        description["weights"] = weights
        text = json.dumps(description, indent=1, ensure_ascii=False)
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        return folder

    def for_use(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights that :meth:`save` writes, of ``state`` or of the model: adapters merged, without heads of a loss.

        Raises:
            CheckpointError: if ``state`` does not have exactly the model's tensors.
        """
        own = self.model.state_dict()
        tensors = self.model.plain(state if state is not None else own)
        wrong = set(tensors) ^ set(self.model.plain(own))
        if wrong:
            raise CheckpointError(
                f"save: tensor {sorted(wrong)[0]!r} must be both in the model and in the weights to save"
            )
        return tensors


# --- building ----------------------------------------------------------------------------------------------------


def group_lengths(recipe: Recipe, model: DualEncoder) -> None:
    """Let text towers leave padding out in training, as ``length_groups`` says.

    Packed captions are one call of every block. Groups by length are within a tower's forward, so DDP sees one call,
    but how many calls of a block that makes depends on a rank's captions: engines that gather weights at each would
    wait for each other for ever.

    Raises:
        ConfigError: another modality than text, or groups under an engine that shards weights.
    """
    engine = recipe.engine
    for m, part in recipe.modalities.items():
        if part.length_groups == "auto":
            if part.shares is None:
                # With dropout the draws would be others than those of the padded batch.
                tower = model.tower(m)
                dropout = any(isinstance(x, nn.Dropout) and x.p > 0 for x in tower.modules())
                tower.length_groups = tower.packs and not dropout
            continue
        if not part.length_groups:
            continue
        where = f"modalities.{m}.length_groups"
        if rows_of(kind_of(m, part)) != "text":
            raise ConfigError(f"{where}: only captions have a length to be grouped by; leave it out")
        tower = model.tower(m)
        if tower.packs:
            tower.length_groups = tower.packs_on_device = True
            continue
        if engine.kind != "accelerate" or engine.parallel == "fsdp2":
            name = f"kind={engine.kind}" if engine.kind != "accelerate" else f"parallel={engine.parallel}"
            raise ConfigError(
                f"{where}: engine.{name} gathers weights at each call, and ranks differ in how many calls "
                "their captions take; use engine.kind=accelerate engine.parallel=ddp, or leave it out"
            )
        tower.length_groups = True


def build_bundle(recipe: Recipe) -> Bundle:
    """The model and inputs of a recipe.

    What an encoder demands of its input (size, normalisation, tokenizer …) fills what the recipe leaves out. Random
    weights depend on ``recipe.seed`` and the modality's name only: not on the order of modalities, nor on what else
    drew from torch's generators before.

    Raises:
        ConfigError: naming the key: unknown names and settings, or an input that pretrained weights do not fit.
        CheckpointError: if pretrained weights do not fit the architecture.
    """
    import_plugins(recipe.plugins, "plugins")
    parts, inputs, towers = {}, {}, {}
    for m, part in recipe.modalities.items():
        where = f"modalities.{m}"
        parts[m], inputs[m] = resolve_input(m, part)
        if part.shares is not None:
            continue
        with seeded(recipe.seed, m):
            towers[m] = build_tower(
                rows_of(kind_of(m, part)), part.encoder, inputs[m].describe(), recipe.embed_dim, f"{where}.encoder"
            )
    model = DualEncoder(towers, recipe.pairs, recipe.logit_scale, *locks(parts), shared_of(parts))
    add_streams(model, parts, inputs, recipe.seed)
    add_prompts(model, parts, inputs, recipe.seed)
    group_lengths(recipe, model)
    begins_elsewhere = recipe.checkpoint.init_from is not None
    check_trained_towers(model, inputs, {m for m, p in parts.items() if begins_elsewhere or p.init_from})
    return Bundle(recipe.name, model, inputs, parts, recipe.logit_scale, recipe.embed_dim)


def resolve_input(m: str, part: Modality) -> tuple[Modality, ModalityInput]:
    """The part with its input filled from the encoder's defaults, and that input.

    A key set to null counts as left out: so a recipe drops a value of its base.
    """
    kind, where = kind_of(m, part), f"modalities.{m}.input"
    defaults = input_defaults(rows_of(kind), part.encoder, f"modalities.{m}.encoder")
    said = {k: v for k, v in part.input.items() if v is not None}
    merged = {**defaults, **said}
    built = build_input(kind, merged, where)
    described = built.describe()
    reference = None
    if "tokenizer" in defaults and merged["tokenizer"] != defaults["tokenizer"]:
        reference = build_input(kind, defaults, where).describe()
    check_input(rows_of(kind), part.encoder, described, reference, where)
    return part.model_copy(update={"kind": kind, "input": described["config"]}), built


def build_input(kind: str, settings: Mapping[str, Any], where: str, base_dir: Path | None = None) -> ModalityInput:
    """One modality's input from its settings, checked by that modality's Config."""
    cls = modalities[kind]
    return cls(settings_as(cls.Config, settings, where), base_dir)


def kind_of(m: str, part: Modality) -> str:
    """The registered modality that handles it."""
    return part.kind or m


class seeded:  # noqa: N801 – reads as a context
    """Draw from torch's generator at a seed made of ``parts``; the generator's state is restored after."""

    def __init__(self, *parts: Any) -> None:
        self.seed = derive_seed(*parts)

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.state)


# --- a bundle from parts that are known --------------------------------------------------------------------------


def assemble(
    name: str,
    parts: Mapping[str, Modality],
    inputs: Mapping[str, ModalityInput],
    pairs: Iterable[tuple[str, str]],
    scale: LogitScale,
    embed_dim: int,
    tensors: dict[str, Tensor] | None,
    where: str,
) -> Bundle:
    """Build the architectures of ``parts`` and load ``tensors`` into them (None: random, from seed 0)."""
    towers = {}
    for m, part in parts.items():
        if part.shares is not None:
            continue
        with seeded(0, m):
            towers[m] = build_tower(
                rows_of(kind_of(m, part)), part.encoder, inputs[m].describe(), embed_dim, f"{where}: {m}.encoder"
            )
    model = DualEncoder(towers, pairs, scale, *locks(parts), shared_of(parts))
    add_streams(model, parts, inputs, 0)
    add_prompts(model, parts, inputs, 0)
    if tensors is not None:
        load_exactly(model, tensors, where)
    model.eval()
    return Bundle(name, model, dict(inputs), dict(parts), scale, embed_dim)


def locks(parts: Mapping[str, Modality]) -> tuple[list[str], list[str], dict[str, int]]:
    """Modalities whose tower is locked, those of them whose head is trained all the same, and those of which the last
    blocks are trained, with their number."""
    some = {m: p.lock.unlocked_groups for m, p in parts.items() if isinstance(p.lock, Unlocked)}
    locked = [m for m, p in parts.items() if p.lock and m not in some]
    return locked, [m for m in locked if parts[m].lock == "trunk"], some


def shared_of(parts: Mapping[str, Modality]) -> dict[str, str]:
    """Modality → the one whose tower it shares."""
    return {m: p.shares for m, p in parts.items() if p.shares is not None}


def add_streams(
    model: DualEncoder, parts: Mapping[str, Modality], inputs: Mapping[str, ModalityInput], seed: int
) -> None:
    """Give the modalities with a ``stream`` their projectors, whose weights depend on seed and name only."""
    if streams := streams_of(parts):
        with seeded(seed, "streams"):
            model.add_streams(streams, {m: two_rows(inputs[m]) for m in streams})


def add_prompts(
    model: DualEncoder,
    parts: Mapping[str, Modality],
    inputs: Mapping[str, ModalityInput],
    seed: int,
    tried: bool = True,
) -> None:
    """Give the towers with ``prompts`` theirs, which depend on seed and name only.

    Args:
        tried: run each of these towers once, to see whether it can have them.

    Raises:
        ConfigError: the tower cannot have them, or a text's ``input.prefix`` has another number of tokens.
    """
    for m, part in parts.items():
        if part.prompts is None or part.shares is not None:
            continue
        where, at = f"modalities.{m}.prompts", None
        x = inputs[m]
        if isinstance(x, TextInput):
            at, tokens = x.prefix_places()
            if tokens != part.prompts.tokens:
                found = "which is not set" if x.config.prefix is None else f"but {x.config.prefix!r} has {tokens}"
                raise ConfigError(
                    f"{where}.tokens: {part.prompts.tokens} learned tokens replace those of "
                    f"modalities.{m}.input.prefix, {found}; write a prefix of {part.prompts.tokens} tokens, such as "
                    "'a photo of a' (4 for CLIP)"
                )
        with seeded(seed, m, "prompts"):
            model.add_prompts(m, part.prompts, at)
        if tried:
            try_prompts(model.tower(m), two_rows(x), where)


def without_streams(bundle: Bundle) -> Bundle:
    """The model without the views that have a stream of their own, which only training uses; itself if it has none.

    Raises:
        ConfigError: no pair is left.
    """
    model = bundle.model
    if not model.streams:
        return bundle
    parts = {m: part for m, part in bundle.parts.items() if m not in model.streams}
    pairs = [pair for pair in model.pairs if set(pair) <= parts.keys()]
    if not pairs:
        raise ConfigError(
            f"{bundle.name}: every pair has a modality with a stream of its own ({', '.join(model.streams)}), which "
            "other layouts cannot express; use --format safetensors"
        )
    towers = {m: model.tower(m) for m, part in parts.items() if part.shares is None}
    plain = DualEncoder(towers, pairs, bundle.scale, shared=shared_of(parts))
    left = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(left)
    inputs = {m: bundle.inputs[m] for m in parts}
    return replace(bundle, model=plain.train(model.training), inputs=inputs, parts=parts)


def part_of(
    kind: str,
    settings: Mapping[str, Any],
    encoder: Component,
    lock: bool | Literal["trunk"] | Unlocked = False,
    shares: str | None = None,
    stream: Stream | str | None = None,
    prompts: Prompts | None = None,
) -> Modality:
    """A resolved recipe part."""
    return Modality(
        kind=kind, input=dict(settings), encoder=encoder, lock=lock, shares=shares, stream=stream, prompts=prompts
    )


# --- small things ------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def pieces_digest(files: Mapping[str, str]) -> str:
    """One sha256 for weights in several files: over their names and hashes. Another number of ranks gives another."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values of tensors."""
    digest = hashlib.sha256()
    for k in sorted(state):
        v = state[k].detach().cpu().contiguous()
        digest.update(f"{k} {v.dtype} {list(v.shape)}\n".encode())
        digest.update(v.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
