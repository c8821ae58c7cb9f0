"""Layers that more than one module needs: activations, padded convolutions, transformer, ConvNeXt, STFT framing."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from codec.config import ConvBodyConfig, LappedConfig, SpectralConfig, TransformerConfig


class _SnakeFunction(torch.autograd.Function):
    """Snake that keeps input and output for backward, and the next convolution keeps that output anyway.

    Plain autograd keeps three more tensors of that size, and walks memory about twice as often.
    """

    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor) -> Tensor:
        a = alpha.float() + 1e-9
        increment = (x * a).sin_().square_()
        y = torch.addcmul(x.float(), increment, 1 / a, out=increment).to(x.dtype)  # fresh memory costs more than the sum
        ctx.save_for_backward(x, alpha, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, alpha, y = ctx.saved_tensors
        a = alpha.float() + 1e-9
        grad, x32 = grad.float(), x.float()
        sin_2ax = (x32 * (2 * a)).sin_()
        grad_x = torch.addcmul(grad, grad, sin_2ax)  # d/dx = 1 + sin(2ax)
        # d/da = (x sin(2ax) - sin²(ax) / a) / a, where sin²(ax) / a = y - x; in half precision that difference is too coarse
        increment = y - x if x.dtype == torch.float32 else (x32 * a).sin_().square_() / a
        grad_alpha = torch.einsum("bct,bct->c", grad, sin_2ax.mul_(x32).sub_(increment))[None, :, None] / a
        return grad_x.to(x.dtype), grad_alpha.to(alpha.dtype)


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """x + sin²(alpha x) / alpha, computed in fp32 and returned in x's dtype.

    Args:
        x: [B, C, T].
        alpha: [1, C, 1], the frequency; receives gradient.
    Source: Ziyin et al. 2020, "Neural networks fail to learn periodic functions", eq. 3.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the plain form, forward and backward
        a = alpha.float() + 1e-9
        return (x.float() + (x.float() * a).sin().square() / a).to(x.dtype)
    return _SnakeFunction.apply(x, alpha)


class Snake(nn.Module):
    """Snake activation with one learnable frequency a channel, [B, C, T] -> [B, C, T]."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.alpha)


class ScaledTanh(nn.Module):
    """tanh(output_scale * x) with a learnable scalar that starts at 1.

    Started at 3, with the scale after tanh, a real run left [-1, 1], grew a DC of -1.4 and died at once.
    """

    def __init__(self):
        super().__init__()
        self.output_scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.output_scale * x)


class Gain(nn.Module):
    """output_scale * x, a learnable scalar that starts at 1: for outputs that a tanh would squeeze."""

    def __init__(self):
        super().__init__()
        self.output_scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.output_scale * x


WIDE = 2**19  # inputs x outputs from which a convolution counts as wide


def conv1d_product(x: Tensor, conv: nn.Conv1d, padding: int) -> Tensor:
    """`conv`, with that padding, as one matrix product."""
    span = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
    frames = F.pad(x, (padding, padding)).unfold(-1, span, conv.stride[0])[..., :: conv.dilation[0]]
    columns = frames.transpose(1, 2).flatten(2)  # [B, T', C * k]
    return F.linear(columns, conv.weight.flatten(1), conv.bias).transpose(1, 2)


def conv_transpose1d_product(x: Tensor, conv: nn.ConvTranspose1d) -> Tensor:
    """`conv` as one matrix product and overlap-add."""
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    n_samples = (x.shape[-1] - 1) * stride + kernel - 2 * padding + conv.output_padding[0]
    columns = F.linear(x.transpose(1, 2), conv.weight.flatten(1).t()).transpose(1, 2)  # [B, C * k, T']
    y = F.fold(columns, (1, n_samples), (1, kernel), padding=(0, padding), stride=(1, stride))
    return y.squeeze(2) + conv.bias[:, None]


def channels_last(x: Tensor) -> Tensor:
    """[B, C, T] of the same values with channels beside each other in memory; no copy where they are already."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def conv1d_inference(x: Tensor, conv: nn.Conv1d, padding: int) -> Tensor:
    """`conv`, with that padding, on the CPU: 1.5 x as fast where channels are last in memory, in x and in the result.

    Where there are more weights than activations, laying them out so would cost more than the product does.
    """
    if conv.in_channels == 1 or x.shape[-1] < conv.stride[0] * conv.out_channels:
        return conv1d_product(x, conv, padding)
    x, weight = channels_last(x)[:, :, None], channels_last(conv.weight)[:, :, None]  # the library asks for images
    return F.conv2d(x, weight, conv.bias, (1, *conv.stride), (0, padding), (1, *conv.dilation)).squeeze(2)


def conv_transpose1d_inference(x: Tensor, conv: nn.ConvTranspose1d) -> Tensor:
    """`conv`, kernel 2 x stride, likewise: a convolution over pairs of frames that gives `stride` x O channels a frame.

    With channels last, those are the frame's `stride` samples one after the other.
    """
    stride, padding = conv.stride[0], conv.padding[0]
    if x.shape[-1] < conv.out_channels:
        return conv_transpose1d_product(x, conv)
    halves = conv.weight.unflatten(2, (2, stride)).flip(2)  # [C, O, 2, s]; the second half is for the frame before
    weight, bias = channels_last(halves.permute(3, 1, 0, 2).flatten(0, 1)), conv.bias.repeat(stride)
    y = F.conv2d(channels_last(x)[:, :, None], weight[:, :, None], bias, padding=(0, 1)).squeeze(2)
    y = y.transpose(1, 2).unflatten(2, (stride, -1)).flatten(1, 2).transpose(1, 2)  # [B, O, (T + 1) * s]
    return y[..., padding : y.shape[-1] - padding + conv.output_padding[0]]


class WideConv1d(nn.Conv1d):
    """Conv1d that is one matrix product in training on the CPU.

    Deep layers have millions of weights and few frames. The CPU library lays the weights out anew at every call,
    which costs more than the copies made here.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or self.groups > 1:
            return super().forward(x)
        return conv1d_product(x, self, self.padding[0])


class WideConvTranspose1d(nn.ConvTranspose1d):
    """The same for a transposed convolution: one matrix product, then overlap-add."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training:
            return super().forward(x)
        return conv_transpose1d_product(x, self)


def conv1d_kind(inputs_times_outputs: int) -> type[nn.Conv1d]:
    """The faster class for a convolution of that many channel pairs; both compute the same."""
    return WideConv1d if inputs_times_outputs >= WIDE else nn.Conv1d


def _pad(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    """Zeros, reflection or replication; what is too short to reflect is first made longer by zeros, as in EnCodec."""
    if left == right == 0:
        return x
    if mode == "zeros":
        return F.pad(x, (left, right))
    if mode == "replicate":
        return F.pad(x, (left, right), "replicate")
    missing = max(left + 1 - x.shape[-1], right + 1 - x.shape[-1], 0)
    padded = F.pad(F.pad(x, (0, missing)), (left, right), "reflect")
    return padded[..., : padded.shape[-1] - missing]


class PaddedConv1d(nn.Module):
    """Convolution from T to exactly ceil(T / stride) frames, weight-normalised unless told otherwise.

    Not causal: symmetric zeros, and T must be a multiple of stride. Causal: everything on the left, and on the right
    only what completes the last frame.
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, dilation: int = 1, causal: bool = False,
                 pad_mode: str = "zeros", normalize: bool = True, bias: bool = True):  # fmt: skip
        super().__init__()
        span = (kernel_size - 1) * dilation + 1 - stride
        self.causal, self.left, self.stride, self.pad_mode = causal, span, stride, pad_mode
        padding = 0 if causal else math.ceil(span / 2)
        conv = conv1d_kind(c_in * c_out)(c_in, c_out, kernel_size, stride, padding, dilation, bias=bias)
        self.conv = weight_norm(conv) if normalize else conv

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and x.device.type == "cpu":
            return self._inference(x) if self.causal else conv1d_inference(x, self.conv, self.conv.padding[0])
        return self.conv(_pad(x, self.left, -x.shape[-1] % self.stride, self.pad_mode) if self.causal else x)

    def _inference(self, x: Tensor) -> Tensor:
        """The same; only the few frames that see padding are computed from a padded copy."""
        right = -x.shape[-1] % self.stride
        if right or x.shape[-1] <= 4 * self.left:
            return conv1d_inference(_pad(x, self.left, right, self.pad_mode), self.conv, 0)
        y = conv1d_inference(x, self.conv, self.left)[..., : x.shape[-1] // self.stride]  # zeros on both sides
        if self.left and self.pad_mode != "zeros":
            n_frames = math.ceil(self.left / self.stride)
            start = _pad(x[..., : n_frames * self.stride + self.left], self.left, 0, self.pad_mode)
            y[..., :n_frames] = conv1d_inference(start, self.conv, 0)[..., :n_frames]
        return y


class PaddedConvTranspose1d(nn.Module):
    """Transposed convolution, kernel 2 x stride: T frames to exactly T x stride.

    Without `output_padding` an odd stride that is not causal gives one sample less, as released DAC decoders do.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, causal: bool = False, normalize: bool = True,
                 output_padding: bool = True, groups: int = 1, bias: bool = True):  # fmt: skip
        super().__init__()
        self.trim = stride if causal else 0  # samples that would need future frames
        padding, extra = (0, 0) if causal else (math.ceil(stride / 2), stride % 2 if output_padding else 0)
        kind = WideConvTranspose1d if c_in * c_out // groups >= WIDE else nn.ConvTranspose1d
        conv = kind(c_in, c_out, 2 * stride, stride, padding, extra, groups=groups, bias=bias)
        self.conv = weight_norm(conv) if normalize else conv

    def forward(self, x: Tensor) -> Tensor:
        inference = not self.training and x.device.type == "cpu" and self.conv.bias is not None  # else a resampling
        x = conv_transpose1d_inference(x, self.conv) if inference else self.conv(x)
        return x[..., : -self.trim] if self.trim else x


def activation(kind: str, channels: int, inplace: bool = True) -> nn.Module:
    """The activation before a convolution; `inplace` (ELU only) where nobody else reads its input."""
    return Snake(channels) if kind == "snake" else nn.ELU(inplace=inplace)


class ResidualUnit(nn.Module):
    """Activation, dilated convolution, activation, pointwise convolution, added to the input or a projection of it."""

    def __init__(self, channels: int, dilation: int, config: ConvBodyConfig):
        super().__init__()
        inner = channels // config.residual_compress
        same = {"causal": config.causal, "pad_mode": config.pad_mode, "normalize": config.weight_norm}
        self.block = nn.Sequential(
            activation(config.activation, channels, inplace=False),
            PaddedConv1d(channels, inner, config.residual_kernel_size, dilation=dilation, **same),
            activation(config.activation, inner),
            PaddedConv1d(inner, channels, 1, **same),
        )
        self.shortcut = PaddedConv1d(channels, channels, 1, **same) if config.residual_conv_shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        side, y = self.shortcut(x), self.block(x)
        return side + y if self.training else y.add_(side)


class ResidualLSTM(nn.Module):
    """LSTM over time, added to its input; [B, C, T'] in and out. Source: Défossez et al. 2022 (EnCodec)."""

    def __init__(self, channels: int, n_layers: int):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, n_layers)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.permute(2, 0, 1)
        return (self.lstm(frames)[0] + frames).permute(1, 2, 0)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding: pairs (i, i + d / 2) of a head turn by position / theta^(2i / d).

    Args:
        x: [B, H, T', d], d even; position 0 is the first frame.
    Source: Su et al. 2021 (RoFormer), with the pairing of GPT-NeoX and of Mimi's released weights.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` frames, in time and memory linear in T'.

    Args:
        q, k, v: [B, H, T', d]. Frame i sees frames i - window + 1 to i.
    """
    n_frames = q.shape[-2]
    if n_frames <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # blocks of `window` queries, in the batch; each sees its own block of keys and the one before
    n_blocks = math.ceil(n_frames / window)
    fill = n_blocks * window - n_frames
    q = F.pad(q, (0, 0, 0, fill)).unflatten(2, (n_blocks, window)).transpose(1, 2).flatten(0, 1)
    k, v = (F.pad(x, (0, 0, window, fill)).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))
    query, key = torch.arange(window, device=q.device)[:, None] + window, torch.arange(2 * window, device=q.device)
    seen = ((key <= query) & (key > query - window)).repeat(n_blocks, 1, 1)
    seen[0, :, :window] = False  # nothing lies before the first block
    seen = seen.repeat(len(q) // n_blocks, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).unflatten(0, (-1, n_blocks))
    return out.transpose(1, 2).flatten(2, 3)[:, :, :n_frames]


class TransformerLayer(nn.Module):
    """Pre-norm attention and GELU layers, each behind a learnt gain per channel (LayerScale)."""

    def __init__(self, dim: int, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.expand = nn.Linear(dim, config.ff_dim, bias=False)
        self.contract = nn.Linear(config.ff_dim, dim, bias=False)
        self.scale_attention = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.scale_mlp = nn.Parameter(torch.full((dim,), config.layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm_attention(x)).unflatten(2, (3, self.config.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T', d]
        q, k = rotate(q, self.config.rope_theta), rotate(k, self.config.rope_theta)
        attended = windowed_attention(q, k, v, self.config.window)
        x = x + self.scale_attention * self.to_out(attended.transpose(1, 2).flatten(2))
        return x + self.scale_mlp * self.contract(F.gelu(self.expand(self.norm_mlp(x))))


class Transformer(nn.Module):
    """Causal transformer with rotary positions and a sliding window, [B, C, T'] in and out.

    Source: Défossez et al. 2024 (Moshi), section 3.3: the bottleneck of Mimi.
    """

    def __init__(self, dim: int, config: TransformerConfig):
        super().__init__()
        self.layers = nn.Sequential(*[TransformerLayer(dim, config) for _ in range(config.n_layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm, two pointwise layers with GELU, LayerScale; [B, T', dim] in and out.

    Source: Liu et al. 2022, "A ConvNet for the 2020s"; in one dimension as in Vocos (Siuzdak 2023).
    """

    def __init__(self, dim: int, expansion: int, kernel_size: int, layer_scale: float, causal: bool = False):
        super().__init__()
        self.behind = kernel_size - 1 if causal else 0  # frames padded before; else the convolution pads both sides
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=0 if causal else kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.layer_scale = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        y = self.depthwise(F.pad(y, (self.behind, 0)) if self.behind else y).transpose(1, 2)
        y = self.contract(F.gelu(self.expand(self.norm(y))))
        return x + self.layer_scale * y


def convnext_blocks(config: SpectralConfig | LappedConfig) -> nn.Sequential:
    """The blocks of a body at frame rate."""
    return nn.Sequential(*[ConvNeXtBlock(config.dim, config.expansion, config.kernel_size, 1 / config.n_blocks)
                           for _ in range(config.n_blocks)])  # fmt: skip


def stft_frames(wav: Tensor, n_fft: int, hop_length: int, window: Tensor) -> Tensor:
    """Complex STFT with exactly T / hop_length frames, each centred on its hop; in fp32 under autocast too.

    Args:
        wav: [B, T], T a multiple of hop_length; zeros are assumed around it.
        window: [n_fft].
    Returns:
        [B, n_fft // 2 + 1, T / hop_length], complex64.
    """
    left = (n_fft - hop_length) // 2
    with torch.autocast(wav.device.type, enabled=False):
        padded = F.pad(wav.float(), (left, n_fft - hop_length - left))
        return torch.stft(padded, n_fft, hop_length, window=window, center=False, return_complex=True)


def istft_frames(spectrum: Tensor, n_fft: int, hop_length: int, window: Tensor) -> Tensor:
    """Inverse of `stft_frames`: windowed overlap-add, divided by the summed squared window.

    Args:
        spectrum: [B, n_fft // 2 + 1, T'], complex.
    Returns:
        [B, T' x hop_length], fp32.
    """
    n_frames = spectrum.shape[-1]
    total = (n_frames - 1) * hop_length + n_fft
    frames = torch.fft.irfft(spectrum, n_fft, dim=1) * window[:, None]
    envelope = window.square()[None, :, None].expand(1, n_fft, n_frames)

    def overlap_add(x: Tensor) -> Tensor:
        return F.fold(x, (1, total), (1, n_fft), stride=(1, hop_length))[:, 0, 0]

    left = (n_fft - hop_length) // 2
    inside = slice(left, left + n_frames * hop_length)
    return overlap_add(frames)[:, inside] / overlap_add(envelope)[:, inside]


def remove_weight_norm(module: nn.Module) -> None:
    """Fold every weight norm below `module` into plain weights, in place; outputs do not change."""
    for child in module.modules():
        if parametrize.is_parametrized(child, "weight"):
            parametrize.remove_parametrizations(child, "weight")


def reach_in_samples(*modules: nn.Module) -> float:
    """Samples between the first and the last input that one output can depend on: the receptive field minus 1.

    Walks the convolutions below `modules` in the order they run; for an encoder the unit is input samples,
    for a decoder input frames (a transposed convolution makes each later step 1 / stride as long).
    """
    reach, step = 0.0, 1.0
    for child in (child for module in modules for child in module.modules()):
        if isinstance(child, nn.ConvTranspose1d):
            reach += (child.kernel_size[0] / child.stride[0] - 1) * step
            step /= child.stride[0]
        elif isinstance(child, nn.Conv1d):
            reach += (child.kernel_size[0] - 1) * child.dilation[0] * step
            step *= child.stride[0]
    return reach
