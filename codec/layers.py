"""Layers that more than one module needs: Snake, convolutions with weight norm, ConvNeXt, STFT framing."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm


class _SnakeFunction(torch.autograd.Function):
    """Snake that keeps input and output for backward, and the next convolution keeps that output anyway.

    Plain autograd keeps three more tensors of that size, and walks memory about twice as often.
    """

    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor) -> Tensor:
        a = alpha.float() + 1e-9
        y = torch.addcmul(x.float(), (x * a).sin_().square_(), 1 / a).to(x.dtype)
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


WIDE = 2**19  # inputs x outputs from which a convolution counts as wide


class WideConv1d(nn.Conv1d):
    """Conv1d that is one matrix product in training on the CPU.

    Deep layers have millions of weights and few frames. The CPU library lays the weights out anew at every call,
    which costs more than the copies made here. At inference sequences are long and the plain convolution is as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or self.groups > 1:
            return super().forward(x)
        padding, dilation = self.padding[0], self.dilation[0]
        span = (self.kernel_size[0] - 1) * dilation + 1
        frames = F.pad(x, (padding, padding)).unfold(-1, span, self.stride[0])[..., ::dilation]
        columns = frames.transpose(1, 2).flatten(2)  # [B, T', C * k]
        return F.linear(columns, self.weight.flatten(1), self.bias).transpose(1, 2)


class WideConvTranspose1d(nn.ConvTranspose1d):
    """The same for a transposed convolution: one matrix product, then overlap-add."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training:
            return super().forward(x)
        kernel, stride, padding = self.kernel_size[0], self.stride[0], self.padding[0]
        n_samples = (x.shape[-1] - 1) * stride + kernel - 2 * padding + self.output_padding[0]
        columns = F.linear(x.transpose(1, 2), self.weight.flatten(1).t()).transpose(1, 2)  # [B, C * k, T']
        y = F.fold(columns, (1, n_samples), (1, kernel), padding=(0, padding), stride=(1, stride))
        return y.squeeze(2) + self.bias[:, None]


def conv1d_kind(inputs_times_outputs: int) -> type[nn.Conv1d]:
    """The faster class for a convolution of that many channel pairs; both compute the same."""
    return WideConv1d if inputs_times_outputs >= WIDE else nn.Conv1d


class PaddedConv1d(nn.Module):
    """Weight-normalised convolution that gives exactly T / stride frames for T a multiple of stride.

    Padding is zeros: symmetric, or all on the left when causal.
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, dilation: int = 1,
                 causal: bool = False):  # fmt: skip
        super().__init__()
        span = (kernel_size - 1) * dilation + 1 - stride
        self.left = span if causal else 0
        padding = 0 if causal else math.ceil(span / 2)
        self.conv = weight_norm(conv1d_kind(c_in * c_out)(c_in, c_out, kernel_size, stride, padding, dilation))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (self.left, 0)) if self.left else x)


class PaddedConvTranspose1d(nn.Module):
    """Weight-normalised transposed convolution, kernel 2 x stride: T frames to exactly T x stride, odd strides too."""

    def __init__(self, c_in: int, c_out: int, stride: int, causal: bool = False):
        super().__init__()
        self.trim = stride if causal else 0  # samples that would need future frames
        padding, extra = (0, 0) if causal else (math.ceil(stride / 2), stride % 2)
        kind = WideConvTranspose1d if c_in * c_out >= WIDE else nn.ConvTranspose1d
        self.conv = weight_norm(kind(c_in, c_out, 2 * stride, stride, padding, extra))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x[..., : -self.trim] if self.trim else x


class ResidualUnit(nn.Module):
    """Snake, dilated convolution of kernel 7, Snake, pointwise convolution, added to the input."""

    def __init__(self, channels: int, dilation: int, causal: bool = False):
        super().__init__()
        self.block = nn.Sequential(
            Snake(channels),
            PaddedConv1d(channels, channels, 7, dilation=dilation, causal=causal),
            Snake(channels),
            PaddedConv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm, two pointwise layers with GELU, LayerScale; [B, T', dim] in and out.

    Source: Liu et al. 2022, "A ConvNet for the 2020s"; in one dimension as in Vocos (Siuzdak 2023).
    """

    def __init__(self, dim: int, expansion: int, kernel_size: int, layer_scale: float):
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.layer_scale = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        y = self.contract(F.gelu(self.expand(self.norm(y))))
        return x + self.layer_scale * y


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


def reach_in_samples(module: nn.Module) -> float:
    """Samples between the first and the last input that one output can depend on: the receptive field minus 1.

    Walks the convolutions below `module` in the order they run; for an encoder the unit is input samples,
    for a decoder input frames (a transposed convolution makes each later step 1 / stride as long).
    """
    reach, step = 0.0, 1.0
    for child in module.modules():
        if isinstance(child, nn.ConvTranspose1d):
            reach += (child.kernel_size[0] / child.stride[0] - 1) * step
            step /= child.stride[0]
        elif isinstance(child, nn.Conv1d):
            reach += (child.kernel_size[0] - 1) * child.dilation[0] * step
            step *= child.stride[0]
    return reach
