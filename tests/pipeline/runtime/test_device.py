import pytest
import torch

from pipeline.runtime.device import autocast, choose_device
from pipeline.runtime.errors import StageError


@pytest.mark.parametrize("name", ["cuda", "auto"])
def test_a_bare_cuda_is_the_gpu_of_this_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(name) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(name) == torch.device("cuda:3")
    assert choose_device("cuda:1") == torch.device("cuda:1")


def test_requesting_a_missing_gpu_is_one_message() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(StageError, match="device cuda:0 is not available: this machine, or this PyTorch, has no CUDA"):
        choose_device("cuda")


def test_float32_convolutions_do_not_use_tf32_and_the_setting_is_restored() -> None:
    before = torch.backends.cudnn.allow_tf32
    assert before, "torch's default, or this test shows nothing"
    with autocast(torch.device("cpu"), "fp32"):
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.is_autocast_enabled("cpu")
    assert torch.backends.cudnn.allow_tf32 == before


def test_bf16_is_torchs_autocast() -> None:
    with autocast(torch.device("cpu"), "bf16"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.bfloat16
