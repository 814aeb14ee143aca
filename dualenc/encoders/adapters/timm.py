"""Image towers of timm, with or without released weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dualenc.config import Component, Section
from dualenc.encoders.families import families
from dualenc.encoders.image_regions import REGIONS, Grids, RegionTower, boxes, check_grids
from dualenc.encoders.released.weights import (
    PACKAGE,
    load_by_order,
    load_exactly,
    no_scalars,
    read_weights,
    weight_file,
)
from dualenc.encoders.tower import HeadKind, Tower, build_head
from dualenc.errors import ConfigError, did_you_mean

# Weights in Python packages, by package and what must be said for timm to compute what they were trained with. Lite0
# comes from TensorFlow: with timm's own defaults (symmetric padding, eps 1e-5) every shape fits and its accuracy drops.
_RELEASED: dict[str, dict[str, Any]] = {
    "efficientnet_lite0": {
        "models": ("efficientnet_lite0", "tf_efficientnet_lite0"),
        "args": {"bn_eps": 1e-3, "pad_type": "same"},
        "mean": (127 / 255,) * 3,
        "std": (128 / 255,) * 3,
    }
}


class TimmConfig(Section):
    """Settings of timm/NAME."""

    pretrained: bool | str = Field(default=False, description="true: timm's own; package:NAME; or a weights file")
    freeze_bn: bool = Field(default=True, description="batch norms use their running statistics in training too")
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="stochastic depth; default: the architecture's"
    )
    head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")
    args: dict[str, Any] = Field(default_factory=dict, description="further arguments of timm.create_model")
    regions: Grids = REGIONS


@families.register("timm")
class Timm:
    """``timm/NAME``: NAME as in ``timm.list_models()``, a weight tag may follow after a dot."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)
    Config: ClassVar[type[BaseModel]] = TimmConfig

    def names(self) -> list[str]:
        import timm

        return list(timm.list_models())

    def input_defaults(self, kind: str, name: str, config: TimmConfig) -> dict[str, Any]:
        """Size and normalisation of timm's data config for this model (its crop share is left at 1)."""
        import timm

        _known(name)
        cfg = timm.models.get_pretrained_cfg(name)
        pre: dict[str, Any] = dict(vars(cfg)) if cfg is not None else {}
        defaults = {
            "size": int(pre.get("input_size", (3, 224, 224))[-1]),
            "mean": tuple(pre.get("mean", (0.485, 0.456, 0.406))),
            "std": tuple(pre.get("std", (0.229, 0.224, 0.225))),
            "interpolation": pre.get("interpolation") or "bicubic",
            "resize": "squash" if pre.get("crop_mode") == "squash" else "shortest",
        }
        released = _released(name, config)
        return defaults | {k: released[k] for k in ("mean", "std") if k in released}

    def demands(self, kind: str, name: str, config: TimmConfig) -> dict[str, Any]:
        if not config.pretrained:
            return {}
        defaults = self.input_defaults(kind, name, config)
        return {k: defaults[k] for k in ("mean", "std")}

    def build(
        self, kind: str, name: str, config: TimmConfig, describe: Mapping[str, Any], embed_dim: int, where: str
    ) -> Tower:
        _known(name)
        released = _released(name, config)
        args = {**released.get("args", {}), **config.args}
        if config.drop_path_rate is not None:
            args["drop_path_rate"] = config.drop_path_rate
        trunk = _create(name, config.pretrained is True, args, int(describe["config"]["size"]), where)
        if isinstance(config.pretrained, str):
            spec = f"{where}.pretrained"
            tensors = read_weights(weight_file(config.pretrained, spec))
            if released:
                load_by_order(trunk, tensors, f"{spec}: {config.pretrained}")
            else:
                load_exactly(trunk, tensors, f"{spec}: {config.pretrained}", optional=_is_classifier(name))
        width = int(trunk.num_features)  # type: ignore[arg-type]
        # timm's models say so where their head has a hidden layer; older ones have no such attribute
        head_width = int(getattr(trunk, "head_hidden_size", None) or width)
        if config.head == "none" and head_width != embed_dim:
            raise ConfigError(f"{where}.head: none needs embed_dim: {head_width}, got {embed_dim}.")
        tower = TimmTower(trunk, build_head(config.head, head_width, embed_dim), describe, True, config.regions)
        tower.freeze_bn, tower.embed_dim = config.freeze_bn, embed_dim
        if config.regions is not None:
            tower.check(f"{where}: timm/{name}", int(describe["config"]["size"]))
        kept = {"args": args, "freeze_bn": config.freeze_bn, "head": config.head}
        kept |= {} if config.regions is None else {"regions": config.regions}
        tower.component = Component.model_validate({"name": f"timm/{name}", **kept})
        return tower


class TimmTower(RegionTower):
    """A timm model: its ``forward_features`` is the map, its ``forward_head`` pools a map or a box of it."""

    def maps(self, pixels: Tensor) -> Tensor:
        """See the base class."""
        trunk: Any = self.trunk
        out: Tensor = trunk.forward_features(pixels)
        return out

    def pool(self, maps: Tensor) -> Tensor:
        """See the base class."""
        trunk: Any = self.trunk
        out: Tensor = trunk.forward_head(maps)
        return out

    def check(self, where: str, size: int) -> None:
        """Try an image of ``size`` pixels.

        Raises:
            ConfigError: the model has no map [n, C, h, w], the map is too small, or its pooling does not take boxes.
        """
        assert self.grids is not None
        was, width = self.training, self.trunk.num_features
        with torch.no_grad():
            maps = self.eval().maps(self.mean.expand(1, 3, size, size))
            if maps.ndim != 4 or maps.shape[1] != width:
                raise ConfigError(
                    f"{where}: regions needs a map [n, {width}, h, w] before pooling; the model's is "
                    f"{list(maps.shape)}: use a convolutional model, or own/vit."
                )
            check_grids(self.grids, (maps.shape[2], maps.shape[3]), where)
            try:
                self.pool(boxes(maps, max(self.grids))[0])
            except (RuntimeError, AssertionError) as e:
                raise ConfigError(f"{where}: regions: its pooling does not take boxes of a map ({e})") from e
        self.train(was)


def _create(name: str, pretrained: bool, args: dict[str, Any], size: int, where: str) -> nn.Module:
    import timm

    def create(**more: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **args, **more)
        return model

    try:
        model = create()
        patches = dict(model.named_children()).get("patch_embed")
        native = getattr(patches, "img_size", None)  # only those with a grid of one size have it
        if native is not None and tuple(native) != (size, size):
            model = create(img_size=size)
    except TypeError as e:
        raise ConfigError(f"{where}.args: timm's {name} does not take {args} ({e})") from e
    except (OSError, RuntimeError) as e:
        raise ConfigError(f"{where}: timm/{name} cannot be built ({str(e).splitlines()[0]})") from e
    return no_scalars(model)


def _known(name: str) -> None:
    import timm

    base, _, tag = name.partition(".")
    if base not in timm.list_models():
        raise ConfigError(f"There is no timm model {base!r}. {did_you_mean(base, timm.list_models())}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise ConfigError(f"timm's {base} has no weights {tag!r}. {did_you_mean(tag, tags)}")


def _released(name: str, config: TimmConfig) -> dict[str, Any]:
    """The settings that a weights package requires; empty for other weights."""
    if not isinstance(config.pretrained, str) or not config.pretrained.startswith(PACKAGE):
        return {}
    package = config.pretrained.removeprefix(PACKAGE)
    if package not in _RELEASED:
        raise ConfigError(f"pretrained: there is no weight package {package!r}. {did_you_mean(package, _RELEASED)}")
    released = _RELEASED[package]
    if name not in released["models"]:
        raise ConfigError(
            f"pretrained: {config.pretrained} belongs to timm/{' or timm/'.join(released['models'])}, not {name}"
        )
    return released


def _is_classifier(name: str) -> Any:
    import timm

    cfg = timm.models.get_pretrained_cfg(name)
    heads = cfg.classifier if cfg is not None and cfg.classifier else ("head", "fc", "classifier")
    prefixes = tuple(f"{h}." for h in ((heads,) if isinstance(heads, str) else heads))
    return lambda key: key.startswith(prefixes)
