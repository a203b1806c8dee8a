"""DPAR: a patch encoder, a transformer over patches, and a patch decoder (paper section 3.2).

    model = DPAR(preset("dpar-b"))
    logits = model(codes, labels, starts)                    # (B, N, V); logits at i are for token i
    loss = model(codes, labels, starts, loss=True)           # mean nats per token; logits are never held in full

Symbols of the paper, mapped once: u are ``tokens`` after the encoder, p_j ``patches``, o_j ``outputs`` of the patch
transformer, z_i the decoder's ``stream``, c the class embedding. ``docs/method.md`` has the equations.
Letters in shapes: B images, N tokens per image, M patches of an image (ΣM in the batch), d width, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from dpar.attention import Backend, PackedBackend, choose_backend, dense_causal, packed_causal
from dpar.errors import ModelError
from dpar.layers import (
    NORM_EPS,
    Block,
    DecoderLayer,
    EncoderLayer,
    LabelEmbedder,
    compile_layers,
    init_weights,
    mark_packed,
    run_layer,
)
from dpar.llamagen import SequenceConfig, check_inputs
from dpar.loss import next_token_loss
from dpar.packing import PatchLayout, spread
from dpar.pretrained import Pretrained
from dpar.rope import PatchRope, patch_table, token_table, with_condition

DecoderStart = Literal["learned", "class"]


@dataclass(frozen=True, kw_only=True)
class DPARConfig(SequenceConfig):
    """DPAR's sizes; the defaults are DPAR-B at 256 px."""

    encoder_layers: int = 1  # E
    patch_layers: int = 8  # G
    decoder_layers: int = 3  # D
    rope: PatchRope = "dynamic"
    # Choices that are not the published model's, for comparison
    decoder_start: DecoderStart = "learned"  # decoder's first input: a learned vector, or the class embedding

    removed_fields: ClassVar[dict[str, object]] = {"patch_query": "max", "offset_embedding": False}
    layer_prefixes: ClassVar[dict[str, str]] = {
        "encoder_layers": "encoder.",
        "patch_layers": "layers.",
        "decoder_layers": "decoder.",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_layers", "patch_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, kind in (("rope", PatchRope), ("decoder_start", DecoderStart)):
            if getattr(self, name) not in get_args(kind):
                raise ModelError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kind))}")
        if self.rope == "dynamic" and self.head_dim % 16:
            raise ModelError(f"a head has {self.head_dim} entries; rope 'dynamic' needs a multiple of 16")


class DPAR(nn.Module, Pretrained[DPARConfig]):
    """Autoregressive model of VQ tokens; most of its layers are over patches of tokens."""

    config_class = DPARConfig
    model_type = "dpar"

    def __init__(self, config: DPARConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, dropout = config.width, config.heads, config.dropout
        self.cls_embedding = LabelEmbedder(config.classes, width)
        self.tok_embeddings = nn.Embedding(config.codebook_size, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads) for _ in range(config.encoder_layers))
        self.patch_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(width, heads, dropout) for _ in range(config.patch_layers))
        self.decoder_start = nn.Embedding(1, width) if config.decoder_start == "learned" else None
        self.decoder = nn.ModuleList(DecoderLayer(width, heads) for _ in range(config.decoder_layers))
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.output = nn.Linear(width, config.codebook_size, bias=False)
        token_positions = token_table(config.grid_height, config.grid_width, config.head_dim)
        self.register_buffer("token_table", token_positions, persistent=False)
        self.register_buffer("stream_table", with_condition(token_positions)[:-1], persistent=False)
        self.token_table: Tensor
        self.stream_table: Tensor
        self.apply(init_weights)
        nn.init.zeros_(self.output.weight)
        self.attention_backend: Backend = "auto"  # of the packed patches; does not change results
        self.compiled = False  # see compile_layers
        self.checkpoint_layers = False  # True: backward recomputes each layer, to save memory

    def forward(
        self, codes: Tensor, labels: Tensor | None, starts: Tensor | PatchLayout, *, loss: bool = False
    ) -> Tensor:
        """Return teacher-forced logits, or the loss.

        Args:
            codes: (B, N) int64.
            labels: (B,) int64; ``classes`` is the guidance class, as is None.
            starts: (B, N) bool, or the batch's :class:`PatchLayout`, if computed beforehand.
            loss: whether to return the mean cross-entropy, computed without the full logits.

        Returns:
            (B, N, V) logits; those at i are for token i, and depend only on earlier tokens and boundaries.
            With ``loss`` a float32 scalar, nats per token.

        Raises:
            ModelError: codes, labels or starts do not fit this model.
        """
        hidden = self.hidden(codes, labels, starts)
        if loss:
            return next_token_loss(hidden, self.output.weight, codes)
        logits: Tensor = self.output(hidden)
        return logits

    def hidden(self, codes: Tensor, labels: Tensor | None, starts: Tensor | PatchLayout) -> Tensor:
        """Return the input of the output head: (B, N, d). Arguments as of :meth:`forward`."""
        labels = check_inputs(self.config, codes, labels)
        layout = starts if isinstance(starts, PatchLayout) else PatchLayout.from_starts(starts)
        if layout.patch_of_token.shape[0] != codes.numel() or layout.n_tokens != codes.shape[1]:
            raise ModelError(f"starts do not fit codes of {tuple(codes.shape)}; they must have the same shape")
        condition = self.cls_embedding(labels)  # (B, d)
        patches, tokens = self.encode(codes, layout)  # (ΣM, d), (B, N, d)
        outputs = self.transform(condition, patches, layout)  # (ΣM, d)
        return self.decode_hidden(condition, tokens, outputs, layout)

    def compile_layers(self) -> None:
        """Compile the layers for training, when they first run: three graphs for any number of patches."""
        compile_layers([*self.encoder, *self.layers, *self.decoder])
        self.compiled = True

    def encode(self, codes: Tensor, layout: PatchLayout) -> tuple[Tensor, Tensor]:
        """Encode tokens into patches; return patches (ΣM, d) and tokens (B, N, d)."""
        tokens = self.tok_embeddings(codes)  # (B, N) to (B, N, d)
        patches: Tensor | None = None
        self._mark_packed(layout.first)  # whose length is the number of patches
        for layer in self.encoder:
            patches, tokens = self._run(layer, patches, tokens, self.token_table, dense_causal, layout)
        assert patches is not None  # there is at least one layer
        return patches, tokens

    def transform(self, condition: Tensor, patches: Tensor, layout: PatchLayout) -> Tensor:
        """Run the patch transformer over [c, p_0, …, p_{M-2}] of each image; return outputs (ΣM, d).

        Output j depends only on tokens before patch j.
        """
        leads = layout.first == 0  # (ΣM,): an image's sequence is its patches shifted by one, with c in front
        x = torch.where(
            leads.unsqueeze(1),
            spread(condition, layout.image_of_patch),  # (B, d) to (ΣM, d)
            patches.roll(1, dims=0).to(condition.dtype),
        )  # (ΣM, d)
        x = self.patch_dropout(x)
        table = self.patch_positions(layout.first, layout.last).roll(1, dims=0)  # (ΣM, head_dim / 2, 2)
        table = table.masked_fill(leads[:, None, None], 0.0)
        attend = packed_causal(layout, self._packed_backend(x))
        self._mark_packed(x, table)
        for layer in self.layers:
            x = self._run(layer, x, table, attend)
        return x

    def decode(self, condition: Tensor, tokens: Tensor, outputs: Tensor, layout: PatchLayout) -> Tensor:
        """Return logits (B, N, V) of tokens (B, N, d), shifted by one, and the outputs (ΣM, d) of their patches."""
        logits: Tensor = self.output(self.decode_hidden(condition, tokens, outputs, layout))
        return logits

    def decode_hidden(self, condition: Tensor, tokens: Tensor, outputs: Tensor, layout: PatchLayout) -> Tensor:
        """Return the input of the output head, (B, N, d). Arguments as of :meth:`decode`."""
        start = self.stream_start(condition).unsqueeze(1).to(tokens.dtype)  # (B, 1, d)
        stream = torch.cat([start, tokens[:, :-1]], dim=1)  # (B, 1, d) and (B, N - 1, d) to (B, N, d)
        self._mark_packed(outputs)
        for layer in self.decoder:
            stream = self._run(layer, stream, outputs, self.stream_table, dense_causal, layout.patch_of_token)
        hidden: Tensor = self.norm(stream)
        return hidden

    def stream_start(self, condition: Tensor) -> Tensor:
        """Return the decoder's first input, (B, d), for the class embeddings ``condition`` (B, d)."""
        return condition if self.decoder_start is None else self.decoder_start.weight.expand_as(condition)

    def _mark_packed(self, *tensors: Tensor) -> None:
        if self.compiled and self.training:
            mark_packed(*tensors)

    def _run(self, layer: nn.Module, *args: Any) -> Any:
        return run_layer(layer, *args, recompute=self.checkpoint_layers)

    def _packed_backend(self, x: Tensor) -> PackedBackend:
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind) if kind != "meta" else False
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        return choose_backend(x.device, dtype, self.attention_backend)[0]

    def encoder_layers(self) -> list[EncoderLayer]:
        """Return the layers of the patch encoder, in order."""
        return cast("list[EncoderLayer]", list(self.encoder))

    def patch_layers(self) -> list[Block]:
        """Return the layers of the patch transformer, in order."""
        return cast("list[Block]", list(self.layers))

    def decoder_layers(self) -> list[DecoderLayer]:
        """Return the layers of the patch decoder, in order."""
        return cast("list[DecoderLayer]", list(self.decoder))

    def patch_positions(self, first: Tensor, last: Tensor) -> Tensor:
        """Return rotary positions of patches from token ``first`` to ``last``, (M,) each: (M, head_dim / 2, 2)."""
        return patch_table(first, last, self.config.grid_width, self.config.head_dim, self.config.rope)
