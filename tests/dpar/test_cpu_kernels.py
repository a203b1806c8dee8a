import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig, SamplingOptions, sample
from dpar.cpu_kernels import (
    FewCallsNorm,
    PackedLinear,
    PreparedBlock,
    available,
    pad_rows,
    prepare_forward,
    prepare_steps,
)
from dpar.kv_cache import KVCache, Places
from dpar.layers import Block

pytestmark = pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
SIZES = {"codebook_size": 19, "grid_height": 3, "grid_width": 5, "classes": 3, "width": 32, "heads": 2}


def llamagen() -> LlamaGen:
    torch.manual_seed(0)
    return LlamaGen(LlamaGenConfig(**SIZES, layers=2)).eval()  # type: ignore[arg-type]


def dpar() -> DPAR:
    torch.manual_seed(0)
    return DPAR(DPARConfig(**SIZES, patch_layers=2, decoder_layers=2)).eval()  # type: ignore[arg-type]


def block(width: int, heads: int) -> Block:
    torch.manual_seed(width)
    block = Block(width, heads, dropout=0.1).eval()
    for norm in (block.attention_norm, block.ffn_norm):
        torch.nn.init.normal_(norm.weight)  # so that it matters where it is applied
    return block


@torch.no_grad()
def walk(block: Block, rows: int, tokens: int) -> Tensor:
    """Return the outputs of a block for random tokens, one per step: (tokens, rows, width)."""
    heads, width = block.attention.heads, block.attention.wo.in_features
    cache = KVCache(rows, tokens, heads, width // heads, torch.float32)
    x = torch.stack(
        [torch.randn(tokens, width, generator=torch.Generator().manual_seed(i)) for i in range(rows)], dim=1
    )
    angle = torch.arange(1, 1 + width // heads // 2)
    out = []
    for i in range(tokens):
        table = torch.stack([(angle * i).cos(), (angle * i).sin()], dim=-1).expand(rows, -1, -1)
        out.append(block.step(pad_rows(x[i]), pad_rows(table), Places.together_at(i, rows), cache)[:rows])
    return torch.stack(out)


@settings(deadline=None, max_examples=30)
@given(fan_in=st.integers(1, 300), fan_out=st.integers(1, 300), shape=st.sampled_from([(1,), (7,), (2, 3), (4, 1)]))
def test_products_equal_pytorchs(fan_in: int, fan_out: int, shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(fan_in, fan_out, bias=False).eval(), torch.randn(*shape, fan_in)
    packed = prepare_forward(linear)
    assert isinstance(packed, PackedLinear)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), linear(x), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(heads=st.integers(1, 5), head_dim=st.sampled_from([4, 8, 64]), rows=st.integers(1, 9))
def test_steps_of_a_prepared_block_equal_those_of_the_block(heads: int, head_dim: int, rows: int) -> None:
    plain = block(heads * head_dim, heads)
    prepared = prepare_steps(plain)
    assert isinstance(prepared, PreparedBlock)
    torch.testing.assert_close(walk(prepared, rows, 5), walk(plain, rows, 5), atol=2e-5, rtol=1e-4)


def test_a_prepared_model_has_the_same_forward_pass() -> None:
    model, codes = llamagen(), torch.randint(19, (2, 15))
    nn.init.normal_(model.output.weight)
    for prepare in (prepare_forward, prepare_steps):
        with torch.no_grad():
            torch.testing.assert_close(prepare(model)(codes), model(codes), atol=1e-5, rtol=0)


def test_preparing_leaves_the_model_unchanged_and_shares_its_parameters() -> None:
    for model in (llamagen(), dpar()):
        before = {name: type(module) for name, module in model.named_modules()}
        for prepare in (prepare_forward, prepare_steps):
            prepared = prepare(model)
            assert type(prepared) is type(model)
            for mine, own in zip(prepared.parameters(), model.parameters(), strict=True):
                assert mine is own
        assert {name: type(module) for name, module in model.named_modules()} == before


def test_blocks_norms_and_heads_are_prepared_for_steps() -> None:
    prepared = prepare_steps(dpar())
    kinds = {name: type(module) for name, module in prepared.named_modules()}
    assert all(kinds[name] is PreparedBlock for name in ("encoder.0.block", "layers.0", "layers.1", "decoder.1.block"))
    assert all(
        kinds[name] is PackedLinear for name in ("encoder.0.cross_attention.wq", "decoder.0.patch_proj", "output")
    )
    assert all(kinds[name] is FewCallsNorm for name in ("norm", "encoder.0.cross_attention.token_norm"))


def test_a_prepared_model_is_not_prepared_again() -> None:
    for prepare in (prepare_forward, prepare_steps):
        prepared = prepare(dpar())
        assert prepare_forward(prepared) is prepared
        assert prepare_steps(prepared) is prepared


@pytest.mark.parametrize("prepare", [prepare_forward, prepare_steps])
def test_models_without_kernels_are_left_unchanged(prepare: object) -> None:
    assert callable(prepare)
    in_training, half, on_meta = block(32, 2).train(), block(32, 2).bfloat16(), block(32, 2).to("meta")
    biased = nn.Linear(4, 4).eval()
    for model in (in_training, half, on_meta, biased):
        assert prepare(model) is model
    plain = block(32, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare(plain) is plain


def test_sampling_with_and_without_kernels_has_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llamagen()
    nn.init.normal_(model.output.weight)

    def logits() -> Tensor:
        seen: list[Tensor] = []
        greedy = SamplingOptions(temperature=0)
        sample(model, torch.tensor([0, 2]), options=greedy, observe=lambda images, i, logits: seen.append(logits))
        return torch.stack(seen)

    with_kernels = logits()
    monkeypatch.setattr("dpar.cpu_kernels.available", lambda: False)
    torch.testing.assert_close(logits(), with_kernels, atol=1e-4, rtol=0)


ROWS_ALIKE = """
import torch
from torch import nn
from dpar.cpu_kernels import prepare_forward, prepare_steps
from tests.dpar.test_cpu_kernels import block, walk

torch.set_num_threads(2)
for fan_in, fan_out in ((48, 100), (128, 384), (768, 2048), (2816, 1024), (1280, 1280)):
    linear, x = prepare_forward(nn.Linear(fan_in, fan_out, bias=False).eval()), torch.randn(70, fan_in)
    with torch.no_grad():
        together = linear(x)
        for rows in (2, 3, 5, 8, 16, 17, 31, 64):
            assert torch.equal(linear(x[-rows:].clone()), together[-rows:]), (fan_in, fan_out, rows)
for width, heads in ((36, 3), (128, 2), (768, 12)):
    prepared = prepare_steps(block(width, heads))
    alike = [walk(prepared, rows, 35)[:, :1] for rows in (1, 2, 3, 8, 17)]
    assert all(torch.equal(one, alike[0]) for one in alike), width
"""


@pytest.mark.parametrize("instructions", ["SSE41", "AVX", "AVX2", "AVX512_CORE"])
def test_a_row_has_the_same_bits_in_any_batch_on_older_processors_too(instructions: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", ROWS_ALIKE], env=environment, check=True)


@pytest.mark.parametrize("on_onednn", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(48, 100), (768, 2304), (1024, 2816), (2816, 1024)])
def test_a_matrix_product_gives_a_row_the_same_bits_in_any_batch(
    threads: int, fan_in: int, fan_out: int, on_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpar.cpu_kernels.available", lambda: on_onednn)
    linear = prepare_forward(nn.Linear(fan_in, fan_out, bias=False).eval())
    assert isinstance(linear, PackedLinear) == on_onednn
    x = torch.randn(40, fan_in, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            alone = torch.cat([linear(pad_rows(row))[:1] for row in x.split(1)])
            for rows in range(2, len(x) + 1):
                among = linear(pad_rows(x[-rows:]))[:rows]
                assert torch.equal(among, alone[-rows:]), f"{rows} rows"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("on_onednn", "rows"), [(True, [2, 2, 3, 8, 9, 13, 16]), (False, [8, 8, 8, 8, 12, 16, 16])])
def test_padding_gives_row_counts_with_the_same_rounding(
    on_onednn: bool, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpar.cpu_kernels.available", lambda: on_onednn)
    assert [len(pad_rows(torch.ones(given, 2))) for given in (1, 2, 3, 8, 9, 13, 16)] == rows
    assert pad_rows(torch.ones(3, 2)).sum() == 6
    assert np.array_equal(pad_rows(torch.ones(1, 2))[0].numpy(), np.ones(2))
