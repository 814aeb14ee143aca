"""Raw items → features: what evaluation, distillation and a user's own script see of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dualenc.data.batch import map_tensors
from dualenc.data.modalities import DecodeError
from dualenc.encoders import activations
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.model.bundle import Bundle, state_digest

Forward = Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Tensor]]]
"""As DualEncoder.forward: collated inputs → features, scale, bias."""

_AHEAD = 2
"""Batches decoded while another is on the device."""


class Embedder:
    """Embeds raw items with a bundle's model.

    Attributes:
        modalities: names that ``embed`` takes.
        embed_dim: D.
    """

    def __init__(self, bundle: Bundle, forward: Forward | None, device: torch.device) -> None:
        self.bundle, self.device = bundle, device
        self.training_run = forward is not None
        self._forward: Forward = bundle.model if forward is None else forward
        self.modalities, self.embed_dim = bundle.modalities, bundle.embed_dim

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, forward: Forward | None = None, device: torch.device | str | None = None
    ) -> Embedder:
        """Wrap a bundle.

        Args:
            forward: the forward of the engine that wraps the model, in a run; every rank then has to call ``embed``
                equally often. The caller puts the engine in eval mode. None: the bundle's model itself, put in eval
                mode here.
            device: where ``forward`` wants its inputs; default: the bundle's device.
        """
        if forward is None:
            bundle.model.eval()
        return cls(bundle, forward, torch.device(device) if device is not None else bundle.device)

    def embed(
        self, modality: str, items: Sequence[Any], batch_size: int = 64, bad: dict[int, str] | None = None
    ) -> Tensor:
        """Embed raw items in order.

        Args:
            modality: one of ``modalities``.
            items: bytes of pictures, strings, … as the modality's ``decode`` takes them.
            batch_size: items on the device at once.
            bad: filled with position → reason of items that cannot be used; they get no row. None: such an item is
                an error.

        Returns:
            [n, D], L2-normalised, fp32, on the CPU.

        Raises:
            ConfigError: for an unknown modality or a batch size below 1.
            DataError: naming the position of the first item that cannot be used, without ``bad``.
        """
        if modality not in self.bundle.inputs:
            raise ConfigError(f"There is no modality {modality!r}. {did_you_mean(modality, self.bundle.inputs)}")
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} must be at least 1")
        out = []
        with torch.no_grad():
            for x in self._batches(modality, items, batch_size, bad):
                moved = map_tensors(x, lambda t: t.to(self.device))
                out.append(self._forward({modality: moved})["features"][modality].float().cpu())
        return torch.cat(out) if out else torch.zeros(0, self.embed_dim)

    def at(
        self, modality: str, items: Sequence[Any], places: Sequence[Any], projected: bool = False, batch_size: int = 8
    ) -> list[Tensor]:
        """What a bird's-eye-view tower's map says at places of the world.

        Args:
            items: raw items, as in :meth:`embed`.
            places: for each item, x, y (and more, which is not looked at) in the ego frame, in metres: [k, ≥ 2].
            projected: through the tower's projector (``local_dim``), L2-normalised; else the map itself.

        Returns:
            For each item [k, W], fp32, on the CPU; zero outside the map.

        Raises:
            ConfigError: a modality without such a tower or projector; in a training run.
            DataError: an item that cannot be used.
        """
        tower: Any = self.bundle.model.tower(modality) if modality in self.modalities else None
        if not hasattr(tower, "bev") or self.training_run:
            raise ConfigError(
                f"{modality!r} has no bird's-eye-view map to look into (own/pillars, own/lift_splat have)"
            )
        if projected and tower.local is None:
            raise ConfigError(f"modalities.{modality}.encoder.local_dim: the tower was trained without a projector")
        if len(places) != len(items):
            raise ConfigError(f"places: there are {len(places)} for {len(items)} items")
        out: list[Tensor] = []
        with torch.no_grad():
            for x in self._batches(modality, items, batch_size, None):
                moved = map_tensors(x, lambda t: t.to(self.device))
                maps = tower.bev(moved)
                for row, to_ego in enumerate(moved["to_ego"]):
                    given = torch.as_tensor(places[len(out)], dtype=torch.float32, device=self.device)
                    xyz = torch.nn.functional.pad(given[:, :3], (0, 3 - min(given.shape[1], 3)))
                    back = torch.linalg.inv(to_ego)
                    xy = (xyz @ back[:3, :3].T + back[:3, 3])[None, :, :2]
                    values = tower.grid.sample(maps[row : row + 1], xy)
                    out.append((tower.projected(values) if projected else values)[0].float().cpu())
        return out

    def _batches(
        self, modality: str, items: Sequence[Any], batch_size: int, bad: dict[int, str] | None
    ) -> Iterator[Any]:
        """Collated batches in order; the pool decodes the next ones meanwhile (PIL and tokenizers free the GIL)."""
        source = self.bundle.inputs[modality]
        # Fast tokenizers keep their truncation as state: set here once, not by several threads at a time.
        source.dummy()

        def read(i: int) -> Any:
            try:
                return source.eval(source.decode(items[i]))
            except DecodeError as e:
                if bad is not None:
                    bad[i] = str(e)
                    return None
                raise DataError(f"{modality} item {i} of {len(items)} cannot be embedded: {e}") from e

        starts = iter(range(0, len(items), batch_size))
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:

            def ask(start: int) -> list[Any]:
                return [pool.submit(read, i) for i in range(start, min(start + batch_size, len(items)))]

            waiting = [ask(s) for s in islice(starts, _AHEAD)]
            while waiting:
                rows = [row for future in waiting.pop(0) if (row := future.result()) is not None]
                waiting += [ask(s) for s in islice(starts, 1)]
                if rows:
                    yield source.collate(rows)

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
            "modalities": modalities,
            "logit_scale": {p: self.logit_scale(p) for p in pairs},
            "logit_bias": {p: b for p in pairs if (b := self.logit_bias(p)) is not None},
            "versions": full["versions"],
            **({"plugins": full["plugins"]} if "plugins" in full else {}),
            "provenance": full["provenance"],
        }
