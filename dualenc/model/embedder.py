"""Raw items → features: the interface to a model for evaluation, distillation and scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dualenc.data.batch import map_tensors
from dualenc.data.modalities import DecodeError
from dualenc.distributed.devices import autocast, check_precision
from dualenc.encoders import activations
from dualenc.encoders.dual_encoder import prefix
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.model.bundle import Bundle, state_digest
from dualenc.model.decoding import collate_usable, read_ahead

Forward = Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Tensor]]]
"""As DualEncoder.forward: collated inputs → features, scale, bias."""


class Embedder:
    """Embeds raw items with a bundle's model.

    Attributes:
        modalities: names that ``embed`` takes.
        embed_dim: D, or ``dim`` where features are cut to their first dimensions (Matryoshka).
        precision: what the towers compute in: fp32, or bf16 or fp16 under autocast. Features are fp32 in any case.
    """

    def __init__(
        self,
        bundle: Bundle,
        forward: Forward | None,
        device: torch.device,
        dim: int | None = None,
        precision: str = "fp32",
    ) -> None:
        check_precision(precision, device)
        self.bundle, self.device, self.precision = bundle, device, precision
        self.training_run = forward is not None
        self._forward: Forward = bundle.model if forward is None else forward
        if dim is not None:
            prefix(torch.ones(1, bundle.embed_dim), dim)
        self.modalities, self.embed_dim, self.dim = bundle.modalities, dim or bundle.embed_dim, dim

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        forward: Forward | None = None,
        device: torch.device | str | None = None,
        dim: int | None = None,
        precision: str = "fp32",
    ) -> Embedder:
        """Wrap a bundle.

        Args:
            forward: the forward of the engine that wraps the model, in a run; every rank then has to call ``embed``
                equally often. The caller puts the engine in eval mode. None: the bundle's model itself, put in eval
                mode here.
            device: where ``forward`` wants its inputs; default: the bundle's device.
            dim: cut features to their first ``dim`` dimensions, of length 1 again.
            precision: fp32, bf16 or fp16 (GPUs only). Not for ``forward``, whose engine has a precision of its own.

        Raises:
            ConfigError: the features are narrower than ``dim``, or the device does not compute in ``precision``.
        """
        if forward is None:
            bundle.model.eval()
            bundle.model.group_lengths()
        return cls(bundle, forward, torch.device(device) if device is not None else bundle.device, dim, precision)

    def embed(
        self, modality: str, items: Sequence[Any], batch_size: int = 64, bad: dict[int, str] | None = None
    ) -> Tensor:
        """Embed raw items in order.

        Args:
            modality: one of ``modalities``.
            items: bytes of pictures, strings, … as the modality's ``decode`` takes them; one string, or the bytes of
                one item, are one item.
            batch_size: items on the device at once.
            bad: filled with position → reason of items that cannot be used, whatever went wrong with their bytes; they
                get no row. None: such an item is an error.

        Returns:
            [n, D], L2-normalised, fp32, on the CPU.

        Raises:
            ConfigError: for an unknown modality or a batch size below 1.
            DataError: naming the position of the first item that cannot be used, without ``bad``.
        """
        out = []
        with torch.no_grad():
            for x in self.batches(modality, items, batch_size, bad):
                with autocast(self.device, self.precision):
                    features = self._forward({modality: x})["features"][modality]
                out.append(prefix(features.float(), self.dim).cpu())
        return torch.cat(out) if out else torch.zeros(0, self.embed_dim)

    def batches(
        self, modality: str, items: Sequence[Any], batch_size: int = 64, bad: dict[int, str] | None = None
    ) -> Iterator[Any]:
        """The items as the tower takes them: collated, on the device, in order, ``batch_size`` at a time.

        Args and errors: as of :meth:`embed`.
        """
        if modality not in self.bundle.inputs:
            raise ConfigError(f"There is no modality {modality!r}. {did_you_mean(modality, self.bundle.inputs)}")
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} must be at least 1")
        if isinstance(items, str | bytes):  # one item, not its letters
            items = [items]
        source = self.bundle.inputs[modality]
        # Fast tokenizers keep their truncation as state: set here once, not by several threads at a time.
        source.dummy()
        start = 0
        for got in read_ahead(lambda i: source.eval(source.decode(items[i])), len(items), batch_size):
            unusable = {start + k: x for k, x in enumerate(got) if isinstance(x, DecodeError)}
            rows = {start + k: [x] for k, x in enumerate(got) if not isinstance(x, DecodeError)}
            collated = collate_usable(source, rows, batch_size, unusable)
            for i, why in sorted(unusable.items()):
                if bad is None:
                    raise DataError(f"{modality} item {i} of {len(items)} cannot be embedded: {why}") from why
                bad[i] = str(why)
            start += len(got)
            for x in collated:
                yield map_tensors(x, lambda t: t.to(self.device))

    def logit_scale(self, pair: str) -> float:
        """The bounded factor of the cosines of a pair, such as ``image-text``."""
        return self._of_pair("logit_scale", pair)

    def logit_bias(self, pair: str) -> float | None:
        """The bias of a pair's logits; None where the model has none."""
        return self._of_pair("logit_bias", pair) if len(self.bundle.model.logit_bias) else None

    def _of_pair(self, what: str, pair: str) -> float:
        with torch.no_grad():
            values = self._forward({})[what]
        if pair not in values:
            raise ConfigError(f"There is no pair {pair!r}. {did_you_mean(pair, values)}")
        return float(values[pair].detach())

    def describe(self) -> dict[str, Any]:
        """Provenance of features: hash of the weights, inputs, architectures, versions, temperature.

        In a training run the weights have no hash yet and the temperature is not read: engines that shard parameters
        would need every rank for it. So features of a run in progress must not be cached under this description.
        """
        full = self.bundle.describe()
        if not self.training_run and self.bundle.weights_hash is None:
            self.bundle.weights_hash = state_digest(self.bundle.model.state_dict())
        modalities = {}
        for m in self.bundle.modalities:
            tower = self.bundle.model.tower(m)
            modalities[m] = {
                "kind": full["modalities"][m]["kind"],
                "input": full["modalities"][m]["input"],
                "encoder": tower.component.name,
                "activation": activations(tower),
            }
        pairs = [] if self.training_run else list(self.bundle.model.logit_scale)
        return {
            "name": full["name"],
            "weights": "in training" if self.training_run else self.bundle.weights_hash,
            "embed_dim": self.embed_dim,
            **({} if self.dim is None else {"prefix_of": self.bundle.embed_dim}),
            # Of fp32 it is not said: descriptions from before there was a choice are still those of the same features.
            **({} if self.precision == "fp32" else {"precision": self.precision}),
            "modalities": modalities,
            "logit_scale": {p: self.logit_scale(p) for p in pairs},
            "logit_bias": {p: b for p in pairs if (b := self.logit_bias(p)) is not None},
            "versions": full["versions"],
            **({"plugins": full["plugins"]} if "plugins" in full else {}),
            "provenance": full["provenance"],
        }
