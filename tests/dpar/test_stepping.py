import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpar import LlamaGen, LlamaGenConfig, sample
from dpar.cache import KVCache, Places, pad_rows
from dpar.layers import Block
from dpar.onednn import available, onednn
from dpar.stepping import stepping, take_step

pytestmark = pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
CPU = torch.device("cpu")


def block(width: int, heads: int, dropout: float = 0.1) -> Block:
    torch.manual_seed(width)
    made = Block(width, heads, dropout).eval()
    for norm in (made.attention_norm, made.ffn_norm):
        torch.nn.init.normal_(norm.weight)  # so that it matters where it is applied
    return made


def walk(made: Block, rows: int, tokens: int) -> Tensor:
    """What a block makes of random tokens, one a step: (tokens, rows, width)."""
    heads, width = made.attention.heads, made.attention.wo.in_features
    cache = KVCache(rows, tokens, heads, width // heads, CPU, torch.float32)
    x = torch.stack(
        [torch.randn(tokens, width, generator=torch.Generator().manual_seed(i)) for i in range(rows)], dim=1
    )
    angle = torch.arange(1, 1 + width // heads // 2)
    out = []
    for i in range(tokens):
        places = Places.of(np.arange(rows), np.full(rows, i), total=rows)
        table = torch.stack([(angle * i).cos(), (angle * i).sin()], dim=-1).expand(rows, -1, -1)
        out.append(take_step(made, pad_rows(x[i]), pad_rows(table), places, cache)[:rows])
    return torch.stack(out)


@settings(deadline=None, max_examples=20)
@given(heads=st.integers(1, 5), head_dim=st.sampled_from([4, 8, 64]), rows=st.integers(1, 9))
def test_a_prepared_block_steps_as_the_block_does(heads: int, head_dim: int, rows: int) -> None:
    made = block(heads * head_dim, heads)
    with torch.no_grad():
        expected = walk(made, rows, 5)
        with stepping(made):
            assert "prepared" in vars(made)
            found = walk(made, rows, 5)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def model() -> LlamaGen:
    config = LlamaGenConfig(codebook_size=19, grid_height=3, grid_width=5, classes=3, width=32, heads=2, layers=2)
    return LlamaGen(config).eval()


def prepared(ours: LlamaGen) -> list[str]:
    names = [name for name, part in ours.named_modules() if {"prepared", "forward"} & vars(part).keys()]
    return sorted(names)


def test_sampling_steps_through_prepared_blocks_and_leaves_no_trace() -> None:
    ours, seen = model(), []
    sample(ours, None, torch.tensor([0]), observe=lambda *_: seen.append(prepared(ours)))
    assert seen == [["layers.0", "layers.1", "norm", "output"]] * 15
    assert prepared(ours) == []


def test_a_model_is_itself_again_after_an_error() -> None:
    ours = model()
    with pytest.raises(KeyboardInterrupt), stepping(ours):
        raise KeyboardInterrupt
    assert prepared(ours) == []


def test_a_model_that_is_named_twice_is_itself_again_too() -> None:
    ours = model()
    with stepping(ours, ours):
        assert prepared(ours) == ["layers.0", "layers.1", "norm", "output"]
    assert prepared(ours) == []


def test_what_an_outer_block_has_prepared_is_used_and_kept() -> None:
    ours = model()
    with stepping(ours):
        outer = vars(ours.layers[0])["prepared"]
        sample(ours, None, torch.tensor([0]), observe=lambda *_: None)
        assert vars(ours.layers[0])["prepared"] is outer


def test_a_model_whose_forward_pass_runs_on_onednn_can_be_sampled_too() -> None:
    ours = model()
    with onednn(ours):
        codes, _ = sample(ours, None, torch.tensor([0, 1]))
        assert "forward" in vars(ours.output)
    assert torch.equal(codes, sample(ours, None, torch.tensor([0, 1]))[0])


def test_blocks_that_it_has_no_kernels_for_step_as_they_are() -> None:
    in_training, half, on_meta = block(32, 2).train(), block(32, 2).bfloat16(), block(32, 2).to("meta")
    with stepping(in_training, half, on_meta):
        assert not any("prepared" in vars(made) for made in (in_training, half, on_meta))
    plain = block(32, 2)
    with torch.autocast("cpu", torch.bfloat16), stepping(plain):
        assert "prepared" not in vars(plain)


ROWS_ALIKE = """
import torch
from tests.dpar.test_stepping import block, walk
from dpar.stepping import stepping

torch.set_num_threads(2)
for width, heads in ((36, 3), (128, 2), (768, 12)):
    made = block(width, heads)
    with torch.no_grad(), stepping(made):
        alike = [walk(made, rows, 35)[:, :1] for rows in (1, 2, 3, 8, 17)]
    assert all(torch.equal(one, alike[0]) for one in alike), width
"""


@pytest.mark.parametrize("instructions", ["SSE41", "AVX", "AVX2", "AVX512_CORE"])
def test_a_row_steps_alike_to_the_last_bit_among_any_number_of_rows(instructions: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", ROWS_ALIKE], env=environment, check=True)
