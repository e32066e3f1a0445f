"""Published networks as functions of their state dicts, written from their papers.

Weights, and not activations, are modulated and normalized; filters are convolutions of zero-stuffed
images. ``random_state`` gives tensors with the names and shapes of the authors' modules.
"""

import math

import torch
from torch.nn.functional import (
    avg_pool2d,
    conv2d,
    conv_transpose2d,
    interpolate,
    leaky_relu,
    linear,
    max_pool2d,
    normalize,
    pad,
    relu,
)


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        / math.sqrt(max(1, math.prod(shape[1:])))
        for name, shape in shapes.items()
    }


def activate(x, bias, gain=1.0):
    return leaky_relu(x + bias.view(1, -1, *[1] * (x.dim() - 2)), 0.2) * gain


def fir(x, kernel_gain=1.0):
    """Convolve each channel with [1, 3, 3, 1] along both axes, without padding."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    kernel = taps.outer(taps) / 64 * kernel_gain
    flat = x.reshape(-1, 1, *x.shape[2:])
    return conv2d(flat, kernel[None, None]).unflatten(0, x.shape[:2])[:, :, 0]


def up(x):
    """Zeros between pixels, padding 2 and 1, and the filter with gain 4."""
    n, c, h, w = x.shape
    stuffed = x.new_zeros(n, c, 2 * h, 2 * w)
    stuffed[:, :, ::2, ::2] = x
    return fir(pad(stuffed, [2, 1, 2, 1]), 4.0)


def down(x):
    return fir(pad(x, [1, 1, 1, 1]))[:, :, ::2, ::2]


# R3GAN


def r3gan_shapes(widths, latent_size, group_width, blocks, classes=0):
    """Shapes for ``widths`` from coarse to fine: of the generator, and of the discriminator."""

    def block(prefix, width):
        return {
            f"{prefix}.LinearLayer1.Layer.weight": (2 * width, width, 1, 1),
            f"{prefix}.NonLinearity1.Bias": (2 * width,),
            f"{prefix}.LinearLayer2.Layer.weight": (2 * width, group_width, 3, 3),
            f"{prefix}.NonLinearity2.Bias": (2 * width,),
            f"{prefix}.LinearLayer3.Layer.weight": (width, 2 * width, 1, 1),
        }

    coarsest, last = widths[0], len(widths) - 1
    generator = {"MainLayers.0.Layers.0.Basis": (coarsest, 4, 4)}
    inputs = latent_size * (2 if classes else 1)
    generator["MainLayers.0.Layers.0.LinearLayer.weight"] = (coarsest, inputs)
    generator["AggregationLayer.Layer.weight"] = (3, widths[-1], 1, 1)
    outputs = coarsest if classes else 1
    discriminator = {"ExtractionLayer.Layer.weight": (widths[-1], 3, 1, 1)}
    discriminator[f"MainLayers.{last}.Layers.{blocks}.Basis.weight"] = (coarsest, 1, 4, 4)
    discriminator[f"MainLayers.{last}.Layers.{blocks}.LinearLayer.weight"] = (outputs, coarsest)
    for stage, width in enumerate(widths):
        for i in range(blocks):
            generator |= block(f"MainLayers.{stage}.Layers.{i + 1}", width)
            discriminator |= block(f"MainLayers.{last - stage}.Layers.{i}", width)
        if stage and widths[stage - 1] != width:
            name = f"MainLayers.{stage}.Layers.0.LinearLayer.Layer.weight"
            generator[name] = (width, widths[stage - 1], 1, 1)
            name = f"MainLayers.{last - stage}.Layers.{blocks}.LinearLayer.Layer.weight"
            discriminator[name] = (widths[stage - 1], width, 1, 1)
    if classes:
        generator["EmbeddingLayer.weight"] = (latent_size, classes)
        discriminator["EmbeddingLayer.weight"] = (outputs, classes)
    return generator, discriminator


def _r3gan_blocks(s, x, prefix, numbers):
    for i in numbers:
        at = f"{prefix}.Layers.{i}"
        grouped = s[f"{at}.LinearLayer2.Layer.weight"]
        y = activate(conv2d(x, s[f"{at}.LinearLayer1.Layer.weight"]), s[f"{at}.NonLinearity1.Bias"])
        y = conv2d(y, grouped, padding=1, groups=len(grouped) // grouped.shape[1])
        y = activate(y, s[f"{at}.NonLinearity2.Bias"])
        x = x + conv2d(y, s[f"{at}.LinearLayer3.Layer.weight"])
    return x


def _resized(s, x, name):
    return conv2d(x, s[name]) if name in s else x


def r3gan_generator(s, z, labels, stages, blocks):
    if labels is not None:
        z = torch.cat([z, s["EmbeddingLayer.weight"][:, labels].T], 1)
    x = linear(z, s["MainLayers.0.Layers.0.LinearLayer.weight"])
    x = x[:, :, None, None] * s["MainLayers.0.Layers.0.Basis"]
    for stage in range(stages):
        at = f"MainLayers.{stage}"
        if stage:
            x = up(_resized(s, x, f"{at}.Layers.0.LinearLayer.Layer.weight"))
        x = _r3gan_blocks(s, x, at, range(1, blocks + 1))
    return conv2d(x, s["AggregationLayer.Layer.weight"])


def r3gan_discriminator(s, x, labels, stages, blocks):
    x = conv2d(x, s["ExtractionLayer.Layer.weight"])
    for stage in range(stages):
        at = f"MainLayers.{stage}"
        x = _r3gan_blocks(s, x, at, range(blocks))
        if stage < stages - 1:
            x = _resized(s, down(x), f"{at}.Layers.{blocks}.LinearLayer.Layer.weight")
    x = conv2d(x, s[f"{at}.Layers.{blocks}.Basis.weight"], groups=x.shape[1])[:, :, 0, 0]
    x = linear(x, s[f"{at}.Layers.{blocks}.LinearLayer.weight"])
    return x[:, 0] if labels is None else (x * s["EmbeddingLayer.weight"][:, labels].T).sum(1)


# StyleGAN2


def stylegan2_shapes(widths, latent_size, style_size, mapping_layers, classes=0):
    """Shapes for ``widths`` from coarse (4) to fine, of both networks."""
    sides = [4 << i for i in range(len(widths))]
    coarsest, side = widths[0], sides[-1]

    def mapping(inputs, size, layers):
        found = {}
        if classes:
            found |= {"mapping.embed.weight": (size, classes), "mapping.embed.bias": (size,)}
        for i in range(layers):
            found[f"mapping.fc{i}.weight"] = (size, (inputs if i == 0 else size))
            found[f"mapping.fc{i}.bias"] = (size,)
        return found

    def styled(prefix, outputs, inputs, kernel):
        return {
            f"{prefix}.weight": (outputs, inputs, kernel, kernel),
            f"{prefix}.bias": (outputs,),
            f"{prefix}.affine.weight": (inputs, style_size),
            f"{prefix}.affine.bias": (inputs,),
        }

    inputs = latent_size + (style_size if classes else 0)
    generator = {"synthesis.b4.const": (coarsest, 4, 4)} | mapping(
        inputs, style_size, mapping_layers
    )
    discriminator = {
        f"b{side}.fromrgb.weight": (widths[-1], 3, 1, 1),
        f"b{side}.fromrgb.bias": (widths[-1],),
        "b4.conv.weight": (coarsest, coarsest + 1, 3, 3),
        "b4.conv.bias": (coarsest,),
        "b4.fc.weight": (coarsest, 16 * coarsest),
        "b4.fc.bias": (coarsest,),
        "b4.out.weight": (coarsest if classes else 1, coarsest),
        "b4.out.bias": (coarsest if classes else 1,),
    }
    if classes:
        discriminator |= mapping(coarsest, coarsest, 8)
    for level, (s, width) in enumerate(zip(sides, widths, strict=True)):
        before = widths[level - 1]
        if level:
            generator |= styled(f"synthesis.b{s}.conv0", width, before, 3)
            discriminator |= {
                f"b{s}.conv0.weight": (width, width, 3, 3),
                f"b{s}.conv0.bias": (width,),
                f"b{s}.conv1.weight": (before, width, 3, 3),
                f"b{s}.conv1.bias": (before,),
                f"b{s}.skip.weight": (before, width, 1, 1),
            }
        generator |= styled(f"synthesis.b{s}.conv1", width, width, 3)
        generator |= styled(f"synthesis.b{s}.torgb", 3, width, 1)
    for name in [name for name in generator if ".conv" in name and name.endswith("affine.bias")]:
        generator[name.replace("affine.bias", "noise_strength")] = ()
    return generator, discriminator


def _second_moment(x):
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def _dense(s, x, name, rate=1.0, act=True):
    weight = s[f"{name}.weight"]
    y = linear(x, weight * rate / math.sqrt(weight.shape[1]), s[f"{name}.bias"] * rate)
    return leaky_relu(y, 0.2) * math.sqrt(2) if act else y


def _mapping(s, z, labels):
    x = [] if z is None else [_second_moment(z)]
    if labels is not None:
        weight = s["mapping.embed.weight"]
        embedded = weight[:, labels].T / math.sqrt(weight.shape[1]) + s["mapping.embed.bias"]
        x.append(_second_moment(embedded))
    x = torch.cat(x, 1)
    i = 0
    while f"mapping.fc{i}.weight" in s:
        x = _dense(s, x, f"mapping.fc{i}", 0.01)
        i += 1
    return x


def _modulated(s, x, w, name, *, doubles=False, demodulates=True):
    """Convolve each sample with weights of its own."""
    weight, style = s[f"{name}.weight"], _dense(s, w, f"{name}.affine", act=False)
    if not demodulates:
        style = style / math.sqrt(weight.shape[1] * weight.shape[2] ** 2)
    outputs = []
    for image, scale in zip(x, style, strict=True):
        each = weight * scale[None, :, None, None]
        if demodulates:
            each = each / (each.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if doubles:
            wide = conv_transpose2d(image[None], each.transpose(0, 1), stride=2)
            outputs.append(fir(pad(wide, [1, 1, 1, 1]), 4.0))
        else:
            outputs.append(conv2d(image[None], each, padding=weight.shape[2] // 2))
    return torch.cat(outputs)


def stylegan2_generator(s, z, labels, sides):
    w, image = _mapping(s, z, labels), None
    x = s["synthesis.b4.const"].expand(len(z), -1, -1, -1)
    for side in sides:
        at = f"synthesis.b{side}"
        for conv in ("conv1",) if side == 4 else ("conv0", "conv1"):
            y = _modulated(s, x, w, f"{at}.{conv}", doubles=conv == "conv0")
            x = activate(y, s[f"{at}.{conv}.bias"], math.sqrt(2))
        y = _modulated(s, x, w, f"{at}.torgb", demodulates=False)
        y = y + s[f"{at}.torgb.bias"].view(1, -1, 1, 1)
        image = y if image is None else up(image) + y
    return image


def _equalized(s, x, name, *, halves=False, act=True, gain=1.0):
    weight = s[f"{name}.weight"]
    scaled = weight / math.sqrt(weight[0].numel())
    if halves:
        margin = weight.shape[2] // 2 + 1
        y = conv2d(fir(pad(x, [margin] * 4)), scaled, stride=2)
    else:
        y = conv2d(x, scaled, padding=weight.shape[2] // 2)
    return (activate(y, s[f"{name}.bias"], math.sqrt(2)) if act else y) * gain


def stylegan2_discriminator(s, x, labels, sides, group):
    x = _equalized(s, x, f"b{sides[-1]}.fromrgb")
    for side in sides[:0:-1]:
        skip = _equalized(s, x, f"b{side}.skip", halves=True, act=False, gain=math.sqrt(0.5))
        x = _equalized(s, x, f"b{side}.conv0")
        x = skip + _equalized(s, x, f"b{side}.conv1", halves=True, gain=math.sqrt(0.5))
    n, count = len(x), len(x) // group
    deviations = []
    for i in range(n):
        members = torch.stack([x[j] for j in range(i % count, n, count)])
        deviations.append((members.var(0, correction=0) + 1e-8).sqrt().mean())
    x = torch.cat([x, torch.stack(deviations).view(n, 1, 1, 1).expand(n, 1, 4, 4)], 1)
    x = _equalized(s, x, "b4.conv")
    x = _dense(s, x.flatten(1), "b4.fc")
    x = _dense(s, x, "b4.out", act=False)
    if labels is None:
        return x[:, 0]
    return (x * _mapping(s, None, labels)).sum(1) / math.sqrt(x.shape[1])


# BigGAN


def biggan_shapes(width, blocks, latent_part, label_size, classes, attended):
    """Shapes of both networks, for 64 × 64 (``blocks`` 4) and 128 × 128 (5)."""
    up_widths = {4: [16, 16, 8, 4, 2], 5: [16, 16, 8, 4, 2, 1]}[blocks]
    down_widths = {4: [1, 2, 4, 8, 16], 5: [1, 2, 4, 8, 16, 16]}[blocks]
    condition = latent_part + label_size
    normalized = {}

    def layer(found, name, shape, bias=True):
        found[f"{name}.weight"] = shape
        found[f"{name}.u0"] = (1, shape[0])
        found[f"{name}.sv0"] = (1,)
        if bias:
            found[f"{name}.bias"] = (shape[0],)

    def attention(found, name, c):
        found[f"{name}.gamma"] = ()
        for part, shape in {
            "theta": (c // 8, c, 1, 1),
            "phi": (c // 8, c, 1, 1),
            "g": (c // 2, c, 1, 1),
            "o": (c, c // 2, 1, 1),
        }.items():
            layer(found, f"{name}.{part}", shape, bias=False)

    generator, discriminator = normalized, {}
    generator["shared.weight"] = (classes, label_size)
    layer(generator, "linear", (up_widths[0] * width * 16, latent_part))
    for i in range(blocks):
        inputs, outputs = up_widths[i] * width, up_widths[i + 1] * width
        for norm, c in (("bn1", inputs), ("bn2", outputs)):
            for part in ("gain", "bias"):
                layer(generator, f"blocks.{i}.0.{norm}.{part}", (c, condition), bias=False)
            generator |= {f"blocks.{i}.0.{norm}.stored_{kind}": (c,) for kind in ("mean", "var")}
        layer(generator, f"blocks.{i}.0.conv1", (outputs, inputs, 3, 3))
        layer(generator, f"blocks.{i}.0.conv2", (outputs, outputs, 3, 3))
        layer(generator, f"blocks.{i}.0.conv_sc", (outputs, inputs, 1, 1))
        if 8 << i == attended:
            attention(generator, f"blocks.{i}.1", outputs)
    finest = up_widths[-1] * width
    for part in ("gain", "bias", "stored_mean", "stored_var"):
        generator[f"output_layer.0.{part}"] = (finest,)
    layer(generator, "output_layer.2", (3, finest, 3, 3))
    channels = [3, *(multiple * width for multiple in down_widths)]
    for i in range(blocks + 1):
        layer(discriminator, f"blocks.{i}.0.conv1", (channels[i + 1], channels[i], 3, 3))
        layer(discriminator, f"blocks.{i}.0.conv2", (channels[i + 1], channels[i + 1], 3, 3))
        if i < blocks or channels[i] != channels[i + 1]:
            layer(discriminator, f"blocks.{i}.0.conv_sc", (channels[i + 1], channels[i], 1, 1))
        if i < blocks and (2 << blocks) >> i == attended:
            attention(discriminator, f"blocks.{i}.1", channels[i + 1])
    layer(discriminator, "linear", (1, channels[-1]))
    layer(discriminator, "embed", (classes, channels[-1]), bias=False)
    return generator, discriminator


def _spectral(s, name):
    """Weight divided by the singular value that one power iteration from u finds."""
    weight = s[f"{name}.weight"]
    matrix = weight.flatten(1)
    v = normalize(s[f"{name}.u0"] @ matrix)
    u = normalize(v @ matrix.T)
    return weight / (v @ matrix.T @ u.T)[0, 0]


def _conv(s, x, name):
    weight = _spectral(s, name)
    return conv2d(x, weight, s.get(f"{name}.bias"), padding=weight.shape[2] // 2)


def _batch_norm(x, mean, var, gain, bias):
    def shape(t):
        return t.reshape(-1 if t.dim() > 1 else 1, x.shape[1], 1, 1)

    return (x - shape(mean)) / (shape(var) + 1e-5).sqrt() * shape(gain) + shape(bias)


def _attend(s, x, name):
    n, c, h, w = x.shape
    theta, phi = _conv(s, x, f"{name}.theta"), max_pool2d(_conv(s, x, f"{name}.phi"), 2)
    g = max_pool2d(_conv(s, x, f"{name}.g"), 2)
    found = torch.empty(n, c // 2, h * w, dtype=x.dtype)
    for i in range(n):
        scores = theta[i].flatten(1).T @ phi[i].flatten(1)
        found[i] = g[i].flatten(1) @ scores.softmax(1).T
    return s[f"{name}.gamma"] * _conv(s, found.view(n, c // 2, h, w), f"{name}.o") + x


def biggan_generator(s, z, labels, blocks):
    first, *parts = z.split(z.shape[1] // (blocks + 1), 1)
    embedded = s["shared.weight"][labels]
    x = linear(first, _spectral(s, "linear"), s["linear.bias"])
    x = x.view(len(z), -1, 4, 4)
    for i, part in enumerate(parts):
        at, y = f"blocks.{i}.0", torch.cat([embedded, part], 1)

        def norm(x, name, at=at, y=y):
            gain = 1 + linear(y, _spectral(s, f"{at}.{name}.gain"))
            bias = linear(y, _spectral(s, f"{at}.{name}.bias"))
            mean, var = (s[f"{at}.{name}.stored_{kind}"] for kind in ("mean", "var"))
            return _batch_norm(x, mean, var, gain, bias)

        h = interpolate(relu(norm(x, "bn1")), scale_factor=2)
        h = relu(norm(_conv(s, h, f"{at}.conv1"), "bn2"))
        shortcut = _conv(s, interpolate(x, scale_factor=2), f"{at}.conv_sc")
        x = _conv(s, h, f"{at}.conv2") + shortcut
        if f"blocks.{i}.1.gamma" in s:
            x = _attend(s, x, f"blocks.{i}.1")
    parts = (s[f"output_layer.0.{part}"] for part in ("stored_mean", "stored_var", "gain", "bias"))
    return _conv(s, relu(_batch_norm(x, *parts)), "output_layer.2").tanh()


def biggan_discriminator(s, x, labels, blocks):
    for i in range(blocks + 1):
        at = f"blocks.{i}.0"
        h = _conv(s, relu(_conv(s, relu(x) if i else x, f"{at}.conv1")), f"{at}.conv2")
        shortcut = x
        if i == 0:  # without an activation before, the average comes first
            shortcut = avg_pool2d(x, 2)
        if f"{at}.conv_sc.weight" in s:
            shortcut = _conv(s, shortcut, f"{at}.conv_sc")
        if i < blocks:
            h = avg_pool2d(h, 2)
            shortcut = shortcut if i == 0 else avg_pool2d(shortcut, 2)
        x = h + shortcut
        if f"blocks.{i}.1.gamma" in s:
            x = _attend(s, x, f"blocks.{i}.1")
    h = relu(x).sum((2, 3))
    logits = linear(h, _spectral(s, "linear"), s["linear.bias"])[:, 0]
    return logits + (_spectral(s, "embed")[labels] * h).sum(1)
