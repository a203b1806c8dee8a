"""LlamaGen's VQ tokenizer: images to a grid of codes and back (VQGAN with an l2-normalised codebook).

    tokenizer = VQTokenizer.from_pretrained("weights/")
    codes = tokenizer.encode(images)                         # (B, 3, H, W) in -1..1 to (B, N) int64
    images = tokenizer.decode(codes)                         # back, (B, 3, H, W)

Parameter names and shapes are LlamaGen's (``vq_model.py``), so its checkpoints load unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar.errors import ModelError
from dpar.pretrained import Pretrained

GROUPS = 32  # of every group norm


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """The tokenizer's sizes; the defaults are LlamaGen's VQ-16."""

    codebook_size: int = 16384  # V
    codebook_dim: int = 8
    channels: int = 128  # width at full resolution, a multiple of 32
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # one per resolution; VQ-8 is (1, 2, 2, 4)
    residual_blocks: int = 2  # per resolution of the encoder; the decoder has one more
    latent_channels: int = 256

    removed_fields: ClassVar[dict[str, object]] = {}
    layer_prefixes: ClassVar[dict[str, str]] = {
        "channel_multipliers": "encoder.conv_blocks.",
        "residual_blocks": "encoder.conv_blocks.0.res.",
    }

    def __post_init__(self) -> None:
        for name in ("codebook_size", "codebook_dim", "channels", "residual_blocks", "latent_channels"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.channels % GROUPS:
            raise ModelError(f"channels is {self.channels}; group norms need a multiple of {GROUPS}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ModelError(f"channel_multipliers is {self.channel_multipliers}; it needs numbers of 1 or more")

    @property
    def downsampling(self) -> int:
        """Pixels along a side per code: 16 for VQ-16."""
        return int(2 ** (len(self.channel_multipliers) - 1))


class Quantised(NamedTuple):
    """Output of the quantiser, for training."""

    latent: Tensor  # (B, codebook_dim, H, W), straight-through: the codes' vectors with the encoder's gradient
    codes: Tensor  # (B, N) int64
    codebook_loss: Tensor  # scalar: moves codebook vectors to the encoder's
    commitment_loss: Tensor  # scalar: moves the encoder's to their codebook vectors
    similarity: Tensor  # (B·N, V) cosines, for an entropy penalty


class Quantiser(nn.Module):
    """Nearest codebook vector by cosine."""

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        with torch.no_grad():
            self.embedding.weight.uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def vectors(self) -> Tensor:
        """Return the unit vectors of the codebook, (V, codebook_dim)."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def nearest(self, latent: Tensor) -> Tensor:
        """Return codes of (B, codebook_dim, H, W) latents: (B, H·W) int64, in raster order."""
        with torch.autocast(latent.device.type, enabled=False):  # bf16 cannot tell close vectors apart
            rows = F.normalize(latent.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)  # (B·H·W, codebook_dim)
            # On the unit sphere the nearest vector has the largest cosine. In chunks, because V is 16384.
            vectors = self.vectors()
            codes = [(chunk @ vectors.T).argmax(dim=-1) for chunk in rows.split(4096)]
        return torch.cat(codes).view(latent.shape[0], -1)

    def lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        """Return the vectors of (B, H·W) codes: (B, codebook_dim, H, W)."""
        return F.embedding(codes, self.vectors()).unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def forward(self, latent: Tensor) -> Quantised:
        """Quantise (B, codebook_dim, H, W) with a straight-through gradient, and compute the losses."""
        unit = F.normalize(latent.float(), dim=1)
        rows = unit.permute(0, 2, 3, 1).flatten(0, 2)
        with torch.autocast(latent.device.type, enabled=False):  # as in `nearest`
            similarity = rows @ self.vectors().T
        codes = similarity.argmax(dim=-1).view(latent.shape[0], -1)
        chosen = self.lookup(codes, latent.shape[2], latent.shape[3])
        return Quantised(
            latent=unit + (chosen - unit).detach(),
            codes=codes,
            codebook_loss=F.mse_loss(chosen, unit.detach()),
            commitment_loss=F.mse_loss(unit, chosen.detach()),
            similarity=similarity,
        )


class VQTokenizer(nn.Module, Pretrained[VQConfig]):
    """Encoder, quantiser and decoder."""

    config_class = VQConfig
    model_type = "vq"

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantiser(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)

    def latent(self, images: Tensor) -> Tensor:
        """Return the quantiser's input: (B, 3, H, W) in -1..1 to (B, codebook_dim, H / f, W / f), f the downsampling.

        Raises:
            ModelError: the images are not (B, 3, H, W) with sides that divide by f.
        """
        f = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise ModelError(f"images are {tuple(images.shape)}; (B, 3, H, W) with sides that divide by {f} is needed")
        out: Tensor = self.quant_conv(self.encoder(images))
        return out

    def encode(self, images: Tensor) -> Tensor:
        """Return codes of float images (B, 3, H, W) in -1..1: (B, N) int64 in raster order."""
        return self.quantize.nearest(self.latent(images))

    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return images (B, 3, H, W), about -1..1 and not clamped, of codes (B, N).

        Args:
            codes: (B, N) int64.
            grid: rows and columns; None for a square.

        Raises:
            ModelError: N is not a square and no grid is given, or the grid does not fit N.
        """
        height, width = grid or (math.isqrt(codes.shape[1]),) * 2
        if height * width != codes.shape[1]:
            raise ModelError(f"{codes.shape[1]} codes do not fill a grid of {height}×{width}")
        return self.decode_latent(self.quantize.lookup(codes, height, width))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Return images (B, 3, H, W) of quantised latents (B, codebook_dim, H, W)."""
        out: Tensor = self.decoder(self.post_quant_conv(latent))
        return out

    def forward(self, images: Tensor) -> tuple[Tensor, Quantised]:
        """Return reconstructions of (B, 3, H, W) images and the quantiser's output, for training."""
        quantised = self.quantize(self.latent(images))
        return self.decode_latent(quantised.latent), quantised


def to_uint8(images: Tensor) -> Tensor:
    """Convert pixels as LlamaGen and ADM do: float (..., 3, H, W) in -1..1 to uint8 (..., H, W, 3)."""
    return torch.clamp(127.5 * images.float() + 128.0, 0, 255).to(torch.uint8).movedim(-3, -1)


def from_uint8(pixels: Tensor) -> Tensor:
    """Convert uint8 (..., H, W, 3) to float (..., 3, H, W) in -1..1, as ToTensor and Normalize(0.5, 0.5) do."""
    return pixels.movedim(-1, -3).float().div(255.0).sub(0.5).div(0.5)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of uint8 pixels (B, ...), in dB, per image: (B,) float32."""
    error = (images.float() - reference.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error.clamp(min=1e-8))


class Encoder(nn.Module):
    """Residual blocks at falling resolution; attention at the lowest."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = _conv3(3, config.channels)
        self.conv_blocks = nn.ModuleList()
        width = config.channels
        for level, out in enumerate(widths):
            lowest = level == len(widths) - 1
            stage = _stage(width, out, config.residual_blocks, attention=lowest)
            if not lowest:
                stage.add_module("downsample", Downsample(out))
            self.conv_blocks.append(stage)
            width = out
        self.mid = _middle(width)
        self.norm_out = _norm(width)
        self.conv_out = _conv3(width, config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, latent_channels, H / f, W / f)."""
        x = _run_stages(self.conv_in(x), self.conv_blocks)
        for layer in self.mid:
            x = layer(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Decoder(nn.Module):
    """The encoder's mirror image, with one more residual block per resolution."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.channel_multipliers)]
        self.conv_in = _conv3(config.latent_channels, widths[0])
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        width = widths[0]
        for level, out in enumerate(widths):
            stage = _stage(width, out, config.residual_blocks + 1, attention=level == 0)
            if level < len(widths) - 1:
                stage.add_module("upsample", Upsample(out))
            self.conv_blocks.append(stage)
            width = out
        self.norm_out = _norm(width)
        self.conv_out = _conv3(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, latent_channels, H / f, W / f) to (B, 3, H, W)."""
        x = self.conv_in(x)
        for layer in self.mid:
            x = layer(x)
        x = _run_stages(x, self.conv_blocks)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions on a residual branch."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1 = _norm(width)
        self.conv1 = _conv3(width, out)
        self.norm2 = _norm(out)
        self.conv2 = _conv3(out, out)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h
        return out


class AttnBlock(nn.Module):
    """Single-head attention over all positions, on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to the same shape."""
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, H·W, width)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, tuple(x.shape[2:]))
        out: Tensor = x + self.proj_out(attended)
        return out


class Downsample(nn.Module):
    """Halves the sides, padding right and bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles the sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _stage(width: int, out: int, blocks: int, attention: bool) -> nn.Module:
    """Return the layers of one resolution, by LlamaGen's names: ``res.I`` and ``attn.I``, run alternately."""
    stage = nn.Module()
    stage.add_module("res", nn.ModuleList(ResnetBlock(width if i == 0 else out, out) for i in range(blocks)))
    stage.add_module("attn", nn.ModuleList(AttnBlock(out) for _ in range(blocks if attention else 0)))
    return stage


def _run_stages(x: Tensor, stages: nn.ModuleList) -> Tensor:
    for stage in stages:
        children = dict(stage.named_children())
        attention = iter(children["attn"].children())
        for block in children["res"].children():
            x = block(x)
            attend = next(attention, None)
            if attend is not None:
                x = attend(x)
        for name in ("downsample", "upsample"):
            if name in children:
                x = children[name](x)
    return x


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResnetBlock(width, width), AttnBlock(width), ResnetBlock(width, width)])


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


def _conv3(width: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, padding=1)
