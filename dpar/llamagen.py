"""LlamaGen's GPT: the baseline, and the entropy model (paper section 3.1; LlamaGen's ``gpt.py``).

    model = LlamaGen(preset("llamagen-b"))
    logits = model(codes, labels)                            # (B, N, V); logits at i are for token i
    loss = model(codes, labels, loss=True)                   # mean nats per token, without the full logits

    entropy_model = LlamaGen(preset("llamagen-b", classes=0, start_token=False))
    logits = entropy_model(codes)                            # (B, N - 1, V); logits at i are for token i + 1
    entropy = entropy_model.entropy(codes)                   # (B, N) float16 nats, +inf for token 0

The generator has a start token in front of the image tokens, the class embedding; ``labels=None`` is the
guidance class. The DPAR authors' entropy model has no start token: token 0 is read and never predicted. Both kinds
compute entropies. Parameter names and shapes are LlamaGen's, so its checkpoints load unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar.attention import dense_causal
from dpar.errors import ModelError
from dpar.layers import NORM_EPS, Block, LabelEmbedder, compile_layers, init_weights, run_layer
from dpar.loss import next_token_loss
from dpar.patching import stored_entropy, token_entropy
from dpar.pretrained import Pretrained
from dpar.rope import token_table, with_condition


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """The config fields that LlamaGen and DPAR share: token grid, classes, width."""

    codebook_size: int = 16384  # V
    grid_height: int = 16  # H_g
    grid_width: int = 16  # W_g
    classes: int = 1000  # 0: unconditional
    width: int = 768  # d
    heads: int = 12
    dropout: float = 0.1  # on tokens, residual branches and feed-forward, in training

    head_multiple: ClassVar[int] = 8  # which head_dim must be a multiple of, for rotary positions
    layer_prefixes: ClassVar[dict[str, str]] = {}  # depth field: prefix of its layers' tensors
    removed_fields: ClassVar[dict[str, object]] = {}  # in files of earlier versions; their only value that can be read

    def __post_init__(self) -> None:
        for name in ("codebook_size", "grid_height", "grid_width", "width", "heads"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.classes < 0:
            raise ModelError(f"classes is {self.classes}; it must be 0 (unconditional) or more")
        if self.width % self.heads or self.head_dim % self.head_multiple:
            raise ModelError(
                f"width {self.width} over {self.heads} heads is {self.width / self.heads:g} per head; "
                f"rotary positions need a multiple of {self.head_multiple}"
            )
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def n_tokens(self) -> int:
        """Tokens per image, N."""
        return self.grid_height * self.grid_width

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig(SequenceConfig):
    """LlamaGen's sizes; the defaults are LlamaGen-B at 256 px."""

    layers: int = 12
    start_token: bool = True  # False: no start token and no classes (the DPAR authors' entropy model)

    head_multiple: ClassVar[int] = 4  # pairs for rows and for columns; LlamaGen-3B has 100 per head
    layer_prefixes: ClassVar[dict[str, str]] = {"layers": "layers."}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ModelError(f"layers is {self.layers}; it must be at least 1")
        if not self.start_token and self.classes:
            raise ModelError(f"classes is {self.classes}; a model without a start token has no classes")
        if not self.start_token and self.n_tokens < 2:
            raise ModelError("a model without a start token needs a grid of at least 2 tokens")

    @property
    def n_predicted(self) -> int:
        """Tokens per image that the model predicts: N, or N - 1 without a start token."""
        return self.n_tokens if self.start_token else self.n_tokens - 1


class LlamaGen(nn.Module, Pretrained[LlamaGenConfig]):
    """Decoder-only transformer over VQ tokens in raster order, conditioned on a class or unconditional."""

    config_class = LlamaGenConfig
    model_type = "llamagen"

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedder(config.classes, config.width) if config.start_token else None
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.width)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        table = token_table(config.grid_height, config.grid_width, config.head_dim)
        table = with_condition(table) if config.start_token else table
        self.register_buffer("table", table[: config.n_predicted], persistent=False)  # of the stream's inputs
        self.table: Tensor
        self.apply(init_weights)
        nn.init.zeros_(self.output.weight)
        self.checkpoint_layers = False  # True: backward recomputes each layer, to save memory

    def forward(self, codes: Tensor, labels: Tensor | None = None, *, loss: bool = False) -> Tensor:
        """Return teacher-forced logits, or the loss.

        Args:
            codes: (B, N) int64. The last token is only predicted, never read.
            labels: (B,) int64; ``classes`` is the guidance class, as is None. Unused without a start token.
            loss: whether to return the mean cross-entropy, computed without the full logits.

        Returns:
            (B, N, V) logits; those at i are for token i. Without a start token (B, N - 1, V); those at i are for token
            i + 1. With ``loss`` a float32 scalar: mean nats per predicted token.

        Raises:
            ModelError: codes or labels do not fit this model.
        """
        hidden = self.hidden(codes, labels)
        if loss:
            return next_token_loss(hidden, self.output.weight, self.targets(codes))
        logits: Tensor = self.output(hidden)
        return logits

    def hidden(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the input of the output head: (B, N or N - 1, d). Arguments as of :meth:`forward`."""
        labels = check_inputs(self.config, codes, labels)
        x = self.tok_embeddings(codes[:, :-1])  # (B, N) to (B, N - 1, d)
        if self.cls_embedding is not None:
            x = torch.cat([self.cls_embedding(labels).unsqueeze(1), x], dim=1)  # (B, N, d)
        x = self.tok_dropout(x)
        for layer in self.layers:
            x = run_layer(layer, x, self.table, dense_causal, recompute=self.checkpoint_layers)
        hidden: Tensor = self.norm(x)
        return hidden

    def targets(self, codes: Tensor) -> Tensor:
        """Return the tokens to predict: codes (B, N), or all but the first without a start token."""
        return codes if self.config.start_token else codes[:, 1:]

    @torch.no_grad()
    def entropy(self, codes: Tensor) -> Tensor:
        """Return the entropy of each token given those before it, read unconditionally, as artifacts store it.

        An image's entropies depend only on that image.

        Args:
            codes: (B, N) int64.

        Returns:
            (B, N) float16 nats; +inf for token 0.
        """
        # image by image: for a batch, the intermediate tensors would take gigabytes
        entropy = torch.stack([token_entropy(logits) for logits in self(codes)])  # (B, N or N - 1)
        return stored_entropy(entropy if self.config.start_token else F.pad(entropy, (1, 0)))

    def compile_layers(self) -> None:
        """Compile the layers for training, when they first run: one graph."""
        compile_layers(self.layers)


def check_inputs(config: SequenceConfig, codes: Tensor, labels: Tensor | None) -> Tensor:
    """Return the labels to use; raise ModelError if the shapes of codes or labels do not fit.

    Values are checked on input (artifacts, the command line), not on every step.
    """
    if codes.ndim != 2 or codes.shape[1] != config.n_tokens:
        raise ModelError(
            f"codes are {tuple(codes.shape)}; this model takes (B, {config.n_tokens}), "
            f"a grid of {config.grid_height}×{config.grid_width}"
        )
    if labels is None:
        return torch.full((codes.shape[0],), config.classes, dtype=torch.long, device=codes.device)
    if labels.shape != codes.shape[:1]:
        raise ModelError(f"labels are {tuple(labels.shape)} for codes of {tuple(codes.shape)}; one per image is needed")
    return labels
