"""State dicts of published PyTorch implementations, mapped to the networks of this package.

Families: ``r3gan`` (Huang et al. 2024), ``stylegan2-ada`` (StyleGAN2-ADA-PyTorch, Karras et al.
2020) and ``biggan`` (BigGAN-PyTorch, Brock et al. 2019), with the names that their authors' code
gives to tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from gatdist.common.registry import Registry

Tensors = Mapping[str, Tensor]
# Our name of a tensor → the published one.
Rename = Callable[[str], str]


@dataclass(frozen=True)
class Published:
    """A published implementation, as far as the shapes of its generator's tensors say.

    Attributes:
        model: the section ``model`` of a configuration.
        sample_shape: (C, H, W).
        num_classes: 0 if unconditional.
        generator: published names of the generator's tensors.
        discriminator: published names of the discriminator's tensors.
        ignored: regular expression of published tensors that have no counterpart.
    """

    model: dict[str, Any]
    sample_shape: tuple[int, int, int]
    num_classes: int
    generator: Rename
    discriminator: Rename
    ignored: str


# Tensors of the generator → the implementation. KeyError if they are of another one.
families: Registry[Callable[[Tensors], Published]] = Registry("FAMILY")


@families.register("r3gan")
def r3gan(tensors: Tensors) -> Published:
    """R3GAN's ``R3GAN/Networks.py``."""
    levels = _count(tensors, r"MainLayers\.(\d+)\..+")
    blocks = _count(tensors, r"MainLayers\.0\.Layers\.(\d+)\..+") - 1
    finish = tensors["AggregationLayer.Layer.weight"]
    embedding = tensors.get("EmbeddingLayer.weight")
    latent_size, num_classes = _width(tensors["MainLayers.0.Layers.0.LinearLayer.weight"]), 0
    if embedding is not None:
        num_classes = _width(embedding)
        latent_size -= len(embedding)
    options = {
        "name": "r3gan",
        "width": _width(finish),
        "max_width": len(tensors["MainLayers.0.Layers.0.Basis"]),
        "group_width": _width(tensors["MainLayers.0.Layers.1.LinearLayer2.Layer.weight"]),
        "blocks": blocks,
    }
    parts = {
        "widen.weight": "LinearLayer1.Layer.weight",
        "widen.bias": "NonLinearity1.Bias",
        "grouped.weight": "LinearLayer2.Layer.weight",
        "grouped.bias": "NonLinearity2.Bias",
        "narrow.weight": "LinearLayer3.Layer.weight",
    }
    last = f"MainLayers.{levels - 1}.Layers.{blocks}"  # of the discriminator
    return Published(
        model={
            "generator": options,
            "discriminator": options,
            "latent_size": latent_size,
            "conditional": num_classes > 0,
        },
        sample_shape=(len(finish), 4 << (levels - 1), 4 << (levels - 1)),
        num_classes=num_classes,
        generator=_names(
            {
                r"embedding\.weight": "EmbeddingLayer.weight",
                r"basis": "MainLayers.0.Layers.0.Basis",
                r"start\.weight": "MainLayers.0.Layers.0.LinearLayer.weight",
                r"stages\.(\d+)\.(\d+)\.(.+)": lambda level, block, part: (
                    f"MainLayers.{level}.Layers.{int(block) + 1}.{parts[part]}"
                ),
                r"transitions\.(\d+)\.weight": lambda level: (
                    f"MainLayers.{int(level) + 1}.Layers.0.LinearLayer.Layer.weight"
                ),
                r"finish\.weight": "AggregationLayer.Layer.weight",
            }
        ),
        discriminator=_names(
            {
                r"embedding\.weight": "EmbeddingLayer.weight",
                r"start\.weight": "ExtractionLayer.Layer.weight",
                r"stages\.(\d+)\.(\d+)\.(.+)": lambda level, block, part: (
                    f"MainLayers.{levels - 1 - int(level)}.Layers.{block}.{parts[part]}"
                ),
                r"transitions\.(\d+)\.weight": lambda level: (
                    f"MainLayers.{levels - 2 - int(level)}.Layers.{blocks}.LinearLayer.Layer.weight"
                ),
                r"basis": f"{last}.Basis.weight",
                r"finish\.weight": f"{last}.LinearLayer.weight",
            }
        ),
        ignored=r".+\.Resampler\.Kernel",
    )


@families.register("stylegan2-ada")
def stylegan2_ada(tensors: Tensors) -> Published:
    """StyleGAN2-ADA-PyTorch's ``training/networks.py``, with its default architectures."""
    levels = _count(tensors, r"synthesis\.b(\d+)\.conv1\.weight")
    side = 4 << (levels - 1)
    widths = [len(tensors[f"synthesis.b{4 << i}.conv1.weight"]) for i in range(levels)]
    first = tensors["mapping.fc0.weight"]
    style_size, latent_size, num_classes = len(first), _width(first), 0
    if "mapping.embed.weight" in tensors:
        num_classes = _width(tensors["mapping.embed.weight"])
        latent_size -= style_size
    narrower = [c * (4 << level) for level, c in enumerate(widths) if c < max(widths)]
    capacity = narrower[-1] if narrower else widths[-1] * side
    common = {"name": "stylegan2", "capacity": capacity, "max_width": max(widths)}
    mapping = {"style_size": style_size, "mapping_layers": _count(tensors, r"mapping\.fc(\d+)\..+")}

    def layer(number: str, rest: str) -> str:
        level = (int(number) + 1) // 2
        conv = "conv0" if int(number) % 2 else "conv1"
        return f"synthesis.b{4 << level}.{conv}.{_styled(rest)}"

    block = {"first": "conv0", "second": "conv1", "skip": "skip"}
    labels = {
        r"embedding\.embedding\.(.+)": "mapping.embed.{}".format,
        r"embedding\.layers\.(\d+)\.(.+)": "mapping.fc{}.{}".format,
    }
    return Published(
        model={
            "generator": {**common, **mapping, "style_mixing": 0.9},
            "discriminator": {**common, "minibatch_deviation": 4},
            "latent_size": latent_size,
            "conditional": num_classes > 0,
        },
        sample_shape=(len(tensors[f"synthesis.b{side}.torgb.weight"]), side, side),
        num_classes=num_classes,
        generator=_names(
            {
                r"mapping\.embedding\.(.+)": "mapping.embed.{}".format,
                r"mapping\.layers\.(\d+)\.(.+)": "mapping.fc{}.{}".format,
                r"constant": "synthesis.b4.const",
                r"layers\.(\d+)\.(.+)": layer,
                r"to_image\.(\d+)\.(.+)": lambda level, rest: (
                    f"synthesis.b{4 << int(level)}.torgb.{_styled(rest)}"
                ),
            }
        ),
        discriminator=_names(
            {
                r"start\.(.+)": f"b{side}.fromrgb.{{}}".format,
                r"blocks\.(\d+)\.(first|second|skip)\.(.+)": lambda level, conv, rest: (
                    f"b{8 << int(level)}.{block[conv]}.{rest}"
                ),
                r"mix\.(.+)": "b4.conv.{}".format,
                r"gather\.(.+)": "b4.fc.{}".format,
                r"finish\.(.+)": "b4.out.{}".format,
                **labels,
            }
        ),
        ignored=r".*(resample_filter|noise_const|mapping\.w_avg)",
    )


def _styled(rest: str) -> str:
    return rest.replace("style.", "affine.")


@families.register("biggan")
def biggan(tensors: Tensors) -> Published:
    """BigGAN-PyTorch's ``BigGAN.py``, with a shared embedding and hierarchical latents."""
    blocks = _count(tensors, r"blocks\.(\d+)\..+")
    side = 4 << blocks
    output = "output_layer.1" if "output_layer.1.weight" in tensors else "output_layer.2"
    shared = tensors["shared.weight"]
    width = _width(tensors[f"{output}.weight"])
    finest = {3: 4, 4: 2}.get(blocks, 1)  # multiple of the width
    options: dict[str, Any] = {"name": "biggan", "width": width // finest}
    attended = [i for i in range(blocks) if f"blocks.{i}.1.gamma" in tensors]
    options["attention_side"] = 8 << attended[0] if attended else 0
    convolutions = {"first": "conv1", "second": "conv2", "skip": "conv_sc"}
    attention = {"query": "theta", "key": "phi", "value": "g", "finish": "o"}
    # The discriminator's block with attention, which has a place of its own in our list.
    before = (side // options["attention_side"]).bit_length() - 2 if attended else blocks + 1

    def of_discriminator(place: str, part: str) -> str:
        number = int(place)
        if number == before + 1:
            return f"blocks.{before}.1.{_attention(part, attention)}"
        layer, _, rest = part.partition(".")
        return f"blocks.{number - (number > before)}.0.{convolutions[layer]}.{rest}"

    return Published(
        model={
            "generator": {**options, "label_size": _width(shared)},
            "discriminator": options,
            "latent_size": _width(tensors["linear.weight"]) * (blocks + 1),
            "conditional": True,
            "spectral_norm": ["generator", "discriminator"],
        },
        sample_shape=(len(tensors[f"{output}.weight"]), side, side),
        num_classes=len(shared),
        generator=_names(
            {
                r"embedding\.weight": "shared.weight",
                r"start\.(.+)": "linear.{}".format,
                r"blocks\.(\d+)\.norms\.([01])\.(.+)": lambda block, norm, part: (
                    f"blocks.{block}.0.bn{int(norm) + 1}.{part.replace('norm.running', 'stored')}"
                ),
                r"blocks\.(\d+)\.(first|second|skip)\.(.+)": lambda block, layer, part: (
                    f"blocks.{block}.0.{convolutions[layer]}.{part}"
                ),
                r"attention\.(\d+)\.(.+)": lambda block, part: (
                    f"blocks.{block}.1.{_attention(part, attention)}"
                ),
                r"norm\.weight": "output_layer.0.gain",
                r"norm\.bias": "output_layer.0.bias",
                r"norm\.running_(mean|var)": "output_layer.0.stored_{}".format,
                r"finish\.(.+)": f"{output}.{{}}".format,
            }
        ),
        discriminator=_names(
            {
                r"blocks\.(\d+)\.(.+)": of_discriminator,
                r"finish\.(.+)": "linear.{}".format,
                r"embedding\.(.+)": "embed.{}".format,
            }
        ),
        ignored=r".+\.sv\d+",
    )


def _attention(part: str, layers: Mapping[str, str]) -> str:
    layer, _, rest = part.partition(".")
    return "gamma" if layer == "strength" else f"{layers[layer]}.{rest}"


def _count(tensors: Tensors, pattern: str) -> int:
    """Return the number of different first groups among the names that match."""
    matches = (re.fullmatch(pattern, name) for name in tensors)
    count = len({match[1] for match in matches if match})
    if not count:
        raise KeyError(pattern.replace(r"\.", ".").replace(r"(\d+)", "N").replace(".+", "…"))
    return count


def _width(weight: Tensor) -> int:
    if weight.dim() < 2:
        raise ValueError("a matrix where its weights are one")
    return weight.shape[1]


def _sides(tensor: Tensor) -> list[int]:
    """Return the shape without sides of 1, which implementations write differently."""
    return [side for side in tensor.shape if side != 1]


def _names(rules: Mapping[str, str | Callable[..., str]]) -> Rename:
    def rename(name: str) -> str:
        for pattern, published in rules.items():
            if match := re.fullmatch(pattern, name):
                return published if isinstance(published, str) else published(*match.groups())
        raise KeyError(name)

    return rename


def converted(ours: Tensors, published: Tensors, rename: Rename, ignored: str) -> dict[str, Tensor]:
    """Return the values of the tensors ``ours`` from published ones.

    Args:
        ours: the network's state.
        published: the published network's state.
        rename: one of :class:`Published`, as ``ignored``.
        ignored: regular expression of published tensors without a counterpart.

    Raises:
        ValueError: a published tensor is missing, is of another shape, or has no counterpart.
    """
    used: set[str] = set()

    def take(source: str, like: Tensor | None = None) -> Tensor:
        if source not in published:
            raise ValueError(f"lacks {source!r}")
        used.add(source)
        tensor = published[source]
        if like is not None and _sides(tensor) != _sides(like):
            theirs, mine = list(tensor.shape), list(like.shape)
            raise ValueError(f"{source!r} has the shape {theirs}, the network needs {mine}")
        return tensor

    found: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        layer, normalized, rest = name.partition(".parametrizations.weight.")
        if name.endswith("num_batches_tracked"):
            found[name] = tensor
        elif normalized and rest in ("0.u", "0.v"):
            # As in an evaluation by the published code: one power iteration from its u.
            source = rename(f"{layer}.weight")
            u = take(f"{source.removesuffix('weight')}u0").flatten()
            matrix = take(source).flatten(1)
            v = normalize(matrix.T @ u, dim=0)
            found[name] = v if rest == "0.v" else normalize(matrix @ v, dim=0)
        else:
            source = rename(f"{layer}.weight" if normalized else name)
            found[name] = take(source, tensor).reshape(tensor.shape)
    for name in sorted(published.keys() - used):
        if not re.fullmatch(ignored, name):
            raise ValueError(f"has {name!r}, which the network lacks")
    return found
