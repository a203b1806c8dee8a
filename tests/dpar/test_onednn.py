import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpar import LlamaGen, LlamaGenConfig, sample
from dpar.onednn import available, onednn

pytestmark = pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")


def model(**sizes: int) -> LlamaGen:
    torch.manual_seed(0)
    config = LlamaGenConfig(codebook_size=19, grid_height=3, grid_width=5, classes=3, width=32, heads=2, layers=2)
    return LlamaGen(config).eval()


@settings(deadline=None, max_examples=30)
@given(fan_in=st.integers(1, 300), fan_out=st.integers(1, 300), shape=st.sampled_from([(1,), (7,), (2, 3), (4, 1)]))
def test_products_are_those_of_pytorch(fan_in: int, fan_out: int, shape: tuple[int, ...]) -> None:
    linear, x = torch.nn.Linear(fan_in, fan_out, bias=False), torch.randn(*shape, fan_in)
    expected = linear(x).detach()
    with torch.no_grad(), onednn(linear):
        found = linear(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_model_computes_the_same_inside_and_is_itself_again_outside() -> None:
    ours, codes = model(), torch.randint(19, (2, 15))
    with torch.no_grad():
        before = ours(codes)
        with onednn(ours):
            assert sum("forward" in vars(part) for part in ours.modules()) == 2 * 5 + 1
            torch.testing.assert_close(ours(codes), before, atol=1e-5, rtol=0)
        assert torch.equal(ours(codes), before)
    assert not any("forward" in vars(part) for part in ours.modules())


def test_sampling_runs_on_it() -> None:
    ours, seen = model(), []
    sample(ours, None, torch.tensor([0]), observe=lambda *_: seen.append("forward" in vars(ours.output)))
    assert seen == [True] * 15
    assert "forward" not in vars(ours.output)


def test_a_model_is_itself_again_after_an_error() -> None:
    ours = model()
    with pytest.raises(KeyboardInterrupt), onednn(ours):
        raise KeyboardInterrupt
    assert not any("forward" in vars(part) for part in ours.modules())


def test_a_block_inside_a_block_leaves_the_outer_one_as_it_is() -> None:
    ours = model()
    with onednn(ours):
        outer = ours.output.forward
        with onednn(ours):
            assert ours.output.forward is outer
        assert ours.output.forward is outer


def test_layers_that_it_has_no_kernels_for_are_left_alone() -> None:
    half, biased = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16), torch.nn.Linear(4, 4)
    with onednn(half, biased):
        assert "forward" not in vars(half)
        assert "forward" not in vars(biased)
    plain = torch.nn.Linear(4, 4, bias=False)
    with torch.autocast("cpu", torch.bfloat16), onednn(plain):
        assert "forward" not in vars(plain)


ROWS_ALIKE = """
import torch
from dpar.onednn import onednn

torch.set_num_threads(2)
for fan_in, fan_out in ((48, 100), (128, 384), (768, 2048), (2816, 1024), (1280, 1280)):
    linear, x = torch.nn.Linear(fan_in, fan_out, bias=False), torch.randn(70, fan_in)
    with torch.no_grad(), onednn(linear):
        whole = linear(x)
        for rows in (2, 3, 5, 8, 16, 17, 31, 64):
            assert torch.equal(linear(x[-rows:].clone()), whole[-rows:]), (fan_in, fan_out, rows)
"""


@pytest.mark.parametrize("instructions", ["SSE41", "AVX", "AVX2", "AVX512_CORE"])
def test_from_two_rows_on_a_row_has_the_same_bits_on_older_processors_too(instructions: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", ROWS_ALIKE], env=environment, check=True)
