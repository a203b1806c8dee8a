import pytest
import torch

from dpar import DPAR, LlamaGen, preset
from pipeline.generation.batch_size import MOST, ON_CPU, batch_for, bytes_per_image, sampling_batch


def test_the_batch_is_the_largest_power_of_two_that_fits() -> None:
    for free in (0, 99, 100, 250, 800, 1599, 1600, 10**9):
        batch = batch_for(free, 100)
        assert batch.bit_count() == 1
        assert batch == 1 or batch * 100 <= free
        assert batch == MOST or 2 * batch * 100 > free


def test_the_memory_of_an_image_includes_the_caches_of_all_layers() -> None:
    with torch.device("meta"):
        model = DPAR(preset("dpar-xl"))  # type: ignore[arg-type]
        entropy_model = LlamaGen(preset("llamagen-xs", classes=0, start_token=False))  # type: ignore[arg-type]
    caches = 2 * 256 * 2 * (1280 * (1 + 2 * 30 + 2 * 5) + 160 * 3)  # keys and values in bfloat16
    size = bytes_per_image(model, entropy_model, guided=True, bf16=True)
    assert caches < size < 1.1 * caches
    assert batch_for(int(0.8 * 75 * 2**30), size) == 256  # an 80 GB GPU


def test_on_the_cpu_the_batch_is_fixed() -> None:
    model = LlamaGen(preset("llamagen-tiny"))  # type: ignore[arg-type]
    assert sampling_batch(model, None, guided=True, device=torch.device("cpu"), bf16=False) == ON_CPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_batch_follows_the_free_memory() -> None:
    model = LlamaGen(preset("llamagen-tiny")).cuda()  # type: ignore[arg-type]
    assert sampling_batch(model, None, guided=True, device=torch.device("cuda"), bf16=True) >= 32
