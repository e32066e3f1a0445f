"""Triton kernels of :mod:`gatdist.nn.fused`, the only module that imports Triton.

A sample is a matrix of pixels and channels in memory: channels last, [pixels, channels], or
contiguous, [channels, pixels]. Signs are packed along the rows of that matrix, 8 to a byte, the
first in the lowest bit. No kernel adds with atomics, and none is tuned by measurements, so results
depend on shapes only. Sums of an activation's gradient are per block of pixels; torch adds them.
Grids have one axis, because CUDA limits the others to 65,535 programs. Pixels and channels are
int32, offsets in memory int64.
"""

# Triton reads annotations as it compiles, and has no types for a checker.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

import triton
import triton.language as tl


@triton.jit
def _place(pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the blocks of pixels and of channels, and the sample, of this program."""
    blocks = tl.cdiv(pixels, PIXELS)
    rest = tl.program_id(0) // blocks
    of_channels = tl.cdiv(channels, CHANNELS)
    sample = (rest // of_channels).to(tl.int64)
    return tl.program_id(0) % blocks, rest % of_channels, sample


@triton.jit
def _tile(
    block, of_channels, pixels, channels,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Return the pixels, channels, rows and columns of a tile, and what of it exists."""
    p = block * PIXELS + tl.arange(0, PIXELS)
    c = of_channels * CHANNELS + tl.arange(0, CHANNELS)
    p = p[:, None] if LAST else p[None, :]
    c = c[None, :] if LAST else c[:, None]
    inside = (p < pixels) & (c < channels)
    if LAST:
        row, column = p, c
    else:
        row, column = c, p
    return p, c, row.to(tl.int64), column, inside


@triton.jit
def _store_signs(signs, positive, row, column, rows, columns):
    """Pack a tile of truth values along its rows."""
    HEIGHT: tl.constexpr = positive.shape[0]
    WIDTH: tl.constexpr = positive.shape[1] // 8
    eights = tl.reshape(positive.to(tl.int32), HEIGHT, WIDTH, 8)
    packed = tl.sum(eights << tl.arange(0, 8)[None, None, :], 2)
    byte = tl.min(column, 1)[:, None] // 8 + tl.arange(0, WIDTH)[None, :]
    width = (columns + 7) // 8
    tl.store(signs + row * width + byte, packed.to(tl.uint8), (row < rows) & (byte < width))


@triton.jit
def _factor(signs, row, column, columns, inside, slope, gain):
    """Return the activation's derivative in a tile."""
    byte = tl.load(signs + row * ((columns + 7) // 8) + column // 8, inside, other=0)
    return tl.where((byte >> (column % 8).to(tl.uint8)) & 1 != 0, gain, slope * gain)


@triton.jit
def activate(
    x, scale, bias, noise, strength, y, signs, pixels, channels, noise_stride, slope, gain,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Compute y = gain · leaky ReLU(x · scale[n, c] + bias[c] + strength · noise[n, p])."""
    block, of_channels, sample = _place(pixels, channels, PIXELS, CHANNELS)
    p, c, row, column, inside = _tile(block, of_channels, pixels, channels, PIXELS, CHANNELS, LAST)
    rows, columns = (pixels, channels) if LAST else (channels, pixels)
    at = sample * pixels * channels + row * columns + column
    z = tl.load(x + at, inside, other=0).to(tl.float32)
    if scale is not None:
        z *= tl.load(scale + sample * channels + c, c < channels, other=0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + c, c < channels, other=0).to(tl.float32)
    if noise is not None:
        drawn = tl.load(noise + sample * noise_stride + p, p < pixels, other=0).to(tl.float32)
        z += tl.load(strength).to(tl.float32) * drawn
    positive = (z > 0) & inside
    tl.store(y + at, (tl.where(positive, z, slope * z) * gain).to(y.dtype.element_ty), inside)
    if signs is not None:
        signs += sample * rows * ((columns + 7) // 8)
        _store_signs(signs, positive, row, column, rows, columns)


@triton.jit
def activate_gradient(
    grad, signs, x, scale, noise, out, sums, pixels, channels, noise_stride, slope, gain,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Compute out = g · scale, with g = grad · derivative.

    ``sums``, if any, are of g, g · x and g · noise over pixels: [n, blocks, 3, channels].
    """
    part, of_channels, sample = _place(pixels, channels, PIXELS * STEPS, CHANNELS)
    AXIS: tl.constexpr = 0 if LAST else 1
    of_bias = tl.zeros((CHANNELS,), tl.float32)
    of_scale = tl.zeros((CHANNELS,), tl.float32)
    of_noise = tl.zeros((CHANNELS,), tl.float32)
    for step in range(STEPS):
        p, c, row, column, inside = _tile(
            part * STEPS + step, of_channels, pixels, channels, PIXELS, CHANNELS, LAST
        )
        rows, columns = (pixels, channels) if LAST else (channels, pixels)
        at = sample * pixels * channels + row * columns + column
        of_sample = signs + sample * rows * ((columns + 7) // 8)
        g = tl.load(grad + at, inside, other=0).to(tl.float32)
        g *= _factor(of_sample, row, column, columns, inside, slope, gain)
        if sums is not None:
            of_bias += tl.sum(g, AXIS)
            if x is not None:
                of_scale += tl.sum(g * tl.load(x + at, inside, other=0).to(tl.float32), AXIS)
            if noise is not None:
                drawn = tl.load(noise + sample * noise_stride + p, p < pixels, other=0)
                of_noise += tl.sum(g * drawn.to(tl.float32), AXIS)
        if scale is not None:
            g *= tl.load(scale + sample * channels + c, c < channels, other=0).to(tl.float32)
        tl.store(out + at, g.to(out.dtype.element_ty), inside)
    if sums is not None:
        c = of_channels * CHANNELS + tl.arange(0, CHANNELS)
        first = (sample * tl.cdiv(pixels, PIXELS * STEPS) + part) * 3
        tl.store(sums + first * channels + c, of_bias, c < channels)
        tl.store(sums + (first + 1) * channels + c, of_scale, c < channels)
        tl.store(sums + (first + 2) * channels + c, of_noise, c < channels)


@triton.jit
def pointwise(
    x, weight, bias, residual, mask, y, signs, sums, rows, inputs, outputs,
    stride_out, stride_in, slope, gain,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Compute y [rows, outputs] = x [rows, inputs] · weightᵀ, and one of what follows it.

    With ``signs``: the bias and the activation. With ``mask``: the activation's derivative; its
    ``sums`` are [blocks, outputs]. With ``residual``: its addition.
    """
    blocks = tl.cdiv(outputs, OUTPUTS)
    block = tl.program_id(0) // blocks
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    found = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        k = start + tl.arange(0, INPUTS)
        a = tl.load(x + row * inputs + k[None, :], (row < rows) & (k[None, :] < inputs), other=0)
        b_at = k[:, None] * stride_in + column * stride_out
        b = tl.load(weight + b_at, (k[:, None] < inputs) & (column < outputs), other=0)
        found = tl.dot(a, b, found)
    inside = (row < rows) & (column < outputs)
    at = row * outputs + column
    if bias is not None:
        found += tl.load(bias + column, column < outputs, other=0).to(tl.float32)
    if signs is not None:
        positive = (found > 0) & inside
        found = tl.where(positive, found, slope * found) * gain
        _store_signs(signs, positive, row, column, rows, outputs)
    if mask is not None:
        found *= _factor(mask, row, column, outputs, inside, slope, gain)
    if sums is not None:
        total = tl.sum(tl.where(inside, found, 0), 0)[None, :]
        tl.store(sums + block.to(tl.int64) * outputs + column, total, column < outputs)
    if residual is not None:
        found += tl.load(residual + at, inside, other=0).to(tl.float32)
    tl.store(y + at, found.to(y.dtype.element_ty), inside)


@triton.jit
def fir(
    x, y, height, width, out_height, out_width, channels, padding, gain,
    UP: tl.constexpr, DOWN: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Resample with [1, 3, 3, 1] · ``gain`` / 8 in both axes.

    UP − 1 zeros follow each pixel, ``padding`` zeros come before the first. Of the filter's results
    every DOWN-th remains. Taps that meet only inserted zeros are skipped.
    """
    out_pixels = out_height * out_width
    block, of_channels, sample = _place(out_pixels, channels, PIXELS, CHANNELS)
    p, c, row, column, inside = _tile(
        block, of_channels, out_pixels, channels, PIXELS, CHANNELS, LAST
    )
    first_y, first_x = (p // out_width) * DOWN - padding, (p % out_width) * DOWN - padding
    from_sample = x + sample * height * width * channels
    found = tl.zeros(inside.shape, tl.float32)
    for i in tl.static_range(4 // UP):
        tap_y = i * UP + (first_y & (UP - 1))  # so that it meets a pixel
        from_y = (first_y + tap_y) // UP
        for j in tl.static_range(4 // UP):
            tap_x = j * UP + (first_x & (UP - 1))
            from_x = (first_x + tap_x) // UP
            weight = tl.where(tap_y % 3 == 0, 1.0, 3.0) * tl.where(tap_x % 3 == 0, 1.0, 3.0)
            exists = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
            pixel = from_y * width + from_x
            if LAST:
                at = from_sample + pixel.to(tl.int64) * channels + c
            else:
                at = from_sample + row * (height * width) + pixel
            found += weight * tl.load(at, inside & exists, other=0).to(tl.float32)
    columns = channels if LAST else out_pixels
    at = sample * out_pixels * channels + row * columns + column
    tl.store(y + at, (found * (gain / 64)).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["stream", "key_low", "key_high"])
def philox(positions, words, blocks, stream, key_low, key_high, samples, BLOCK: tl.constexpr):
    """Philox4x32-10 of (block, stream, position), [n, 4 · blocks] words of 64 bits."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < samples * blocks
    position = tl.load(positions + i // blocks, inside, other=0)
    stream_words = tl.zeros((BLOCK,), tl.uint32) + stream.to(tl.uint32)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    block = (i % blocks).to(tl.uint32)
    keys = key_low.to(tl.uint32), key_high.to(tl.uint32)
    a, b, c, d = tl.philox_impl(block, stream_words, low, high, keys[0], keys[1])
    words += 4 * i.to(tl.int64)
    tl.store(words, a.to(tl.int64), inside)
    tl.store(words + 1, b.to(tl.int64), inside)
    tl.store(words + 2, c.to(tl.int64), inside)
    tl.store(words + 3, d.to(tl.int64), inside)
