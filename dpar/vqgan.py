"""Losses for training a VQ tokenizer (VQGAN, as LlamaGen uses it), and restarts of unused codes.

    loss = VQLoss(LossWeights(perceptual=1.0))
    total, parts = loss(images, reconstruction, quantised)

The reconstruction and codebook losses are always on. The perceptual loss is LPIPS of the ``lpips`` package; the
adversarial one a PatchGAN discriminator with hinge loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar.errors import ModelError
from dpar.tokenizer import Quantised, Quantiser


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weight of each loss; 0 omits it."""

    reconstruction: float = 1.0  # mean squared error of pixels in -1..1
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0  # rewards even use of the codebook and sharp assignments
    perceptual: float = 0.0
    adversarial: float = 0.0


class VQLoss(nn.Module):
    """Weighted sum of the tokenizer's losses."""

    def __init__(self, weights: LossWeights) -> None:
        super().__init__()
        self.weights = weights
        self.perceptual = _lpips() if weights.perceptual > 0 else None
        self.discriminator = Discriminator() if weights.adversarial > 0 else None

    def forward(
        self, images: Tensor, reconstruction: Tensor, quantised: Quantised, adversarial: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and each part unweighted.

        Args:
            images: (B, 3, H, W) in -1..1.
            reconstruction: the same shape, with gradient.
            quantised: the quantiser's output.
            adversarial: False until the discriminator is trained.
        """
        parts = {
            "reconstruction": F.mse_loss(reconstruction.float(), images),
            "codebook": quantised.codebook_loss,
            "commitment": quantised.commitment_loss,
        }
        if self.weights.entropy > 0:
            parts["entropy"] = entropy_penalty(quantised.similarity)
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(images, reconstruction.float()).mean()
        if self.discriminator is not None and adversarial:
            parts["adversarial"] = -self.discriminator(reconstruction).float().mean()
        total = torch.stack([getattr(self.weights, name) * value for name, value in parts.items()]).sum()
        return total, parts

    def discriminator_loss(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the hinge loss of the discriminator on real and reconstructed images."""
        if self.discriminator is None:
            raise ModelError("there is no discriminator: its weight is 0")
        real = self.discriminator(images).float()
        fake = self.discriminator(reconstruction.detach()).float()
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def entropy_penalty(similarity: Tensor, temperature: float = 0.01) -> Tensor:
    """Return LlamaGen's entropy loss: the mean entropy of soft assignments minus the entropy of their mean.

    Args:
        similarity: (T, V) cosines.
        temperature: of the soft assignment.
    """
    # Most probabilities underflow to 0, where the gradient of -p·log p is infinite: hence log_softmax and the clamp.
    log_probs = (similarity / temperature).log_softmax(dim=-1)
    probs = log_probs.exp()
    each = -(probs * log_probs).sum(dim=-1).mean()
    mean = probs.mean(dim=0)
    together = -(mean * mean.clamp(min=1e-12).log()).sum()
    return each - together


class Discriminator(nn.Module):
    """PatchGAN: (B, 3, H, W) to a map of logits, one for each overlapping region."""

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        parts.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 1, H', W')."""
        out: Tensor = self.main(images)
        return out


@torch.no_grad()
def restart_unused(quantiser: Quantiser, used: Tensor, latent: Tensor, generator: torch.Generator) -> int:
    """Replace unused codebook vectors by randomly drawn encoder outputs; return how many.

    Args:
        quantiser: changed in place.
        used: (V,) counts since the last restart.
        latent: (B, codebook_dim, H, W), the encoder's outputs for a recent batch.
        generator: of the draw, on the CPU.
    """
    dead = (used == 0).nonzero().squeeze(1)
    if len(dead) == 0:
        return 0
    rows = F.normalize(latent.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    drawn = torch.randint(len(rows), (len(dead),), generator=generator).to(rows.device)
    quantiser.embedding.weight[dead] = rows[drawn].to(quantiser.embedding.weight.dtype)
    return len(dead)


def _lpips() -> nn.Module:
    try:
        import lpips
    except ImportError as error:
        raise ModelError("the perceptual loss needs the lpips package: pip install 'dpar[vqgan]'") from error
    try:
        model: nn.Module = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"the perceptual loss needs VGG's weights, which could not be loaded: {error}") from error
    return model
