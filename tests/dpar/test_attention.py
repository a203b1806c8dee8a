import re
import subprocess
import sys
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpar import ModelError, PatchLayout
from dpar.attention import PackedBackend, choose_backend, dense_causal, packed_attention, packed_causal

CPU = torch.device("cpu")
ON_GPU: list[PackedBackend] = ["varlen", "xformers", "flex", "sdpa"]
SOME = settings(deadline=None, max_examples=30)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def cumulative(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def inputs(
    lengths: list[int], dtype: torch.dtype, device: str = "cpu", head_dim: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    # as in the model: three views of one matrix product
    qkv = torch.randn(sum(lengths), 3, 2, head_dim, generator=generator).to(device, dtype)
    q, k, v = (x.requires_grad_() for x in qkv.unbind(1))
    return q, k, v


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Compute each image's attention separately, in float32, from the definition."""
    out = []
    for begin, end in pairwise(cumulative(lengths).tolist()):
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), k[begin:end].float()) * q.shape[-1] ** -0.5
        later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[begin:end].float()))
    return torch.cat(out)


def check(backend: PackedBackend, lengths: list[int], dtype: torch.dtype, device: str = "cpu") -> None:
    q, k, v = qkv = inputs(lengths, dtype, device, 16 if device == "cpu" else 64)
    found = packed_attention(q, k, v, cumulative(lengths, device), max(lengths), backend)
    assert found.dtype == dtype
    q, k, v = wide = [x.detach().float().requires_grad_() for x in qkv]
    expected = one_by_one(q, k, v, lengths)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
    pull = torch.randn_like(found)
    ours = torch.autograd.grad((found * pull).sum(), qkv)
    theirs = torch.autograd.grad((expected * pull).sum(), wide)
    for mine, own in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.float(), own, atol=tolerance, rtol=tolerance)


@SOME
@given(LENGTHS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_packed_attention_and_its_gradients_equal_those_of_each_image_alone(
    lengths: list[int], dtype: torch.dtype
) -> None:
    check("sdpa", lengths, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("lengths", [[1], [141, 120, 161], [3, 256, 1, 77, 64]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_on_a_gpu_equals_that_of_each_image_alone(
    backend: PackedBackend, lengths: list[int], dtype: torch.dtype
) -> None:
    try:
        choose_backend(torch.device("cuda"), dtype, backend)
    except ModelError as cannot:
        pytest.skip(str(cannot))
    check(backend, lengths, dtype, "cuda")


@pytest.mark.filterwarnings("ignore")  # that it is not compiled
@torch.no_grad()
def test_flex_attention_without_gradients_equals_that_of_each_image_alone() -> None:
    lengths = [30, 1, 17]
    q, k, v = inputs(lengths, torch.float32)
    found = packed_attention(q, k, v, cumulative(lengths), max(lengths), "flex")
    torch.testing.assert_close(found, one_by_one(q, k, v, lengths), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # xformers' own, where it has no GPU
def test_the_mask_for_xformers_equals_its_own_mask_from_lengths() -> None:
    fmha = pytest.importorskip("xformers.ops").fmha
    lengths = [3, 1, 4]
    attend = packed_causal(layout_of(lengths), "xformers")
    mask = attend.args[0]  # type: ignore[attr-defined]  # a partial
    own = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths, device=CPU)
    assert mask.q_seqinfo.seqstart_py == own.q_seqinfo.seqstart_py
    assert torch.equal(mask.q_seqinfo.seqstart, own.q_seqinfo.seqstart)
    for name in ("min_seqlen", "max_seqlen"):
        assert getattr(mask.k_seqinfo, name) == getattr(own.k_seqinfo, name)


def layout_of(lengths: list[int], n_tokens: int = 8) -> PatchLayout:
    return PatchLayout.from_starts(torch.arange(n_tokens) < torch.tensor(lengths).unsqueeze(1))


@SOME
@given(LENGTHS.filter(lambda found: len(found) > 1), st.sampled_from([torch.float32, torch.bfloat16]))
@torch.no_grad()
def test_an_images_attention_does_not_depend_on_its_neighbours(lengths: list[int], dtype: torch.dtype) -> None:
    q, k, v = inputs(lengths, dtype)
    begin, end = lengths[0], lengths[0] + lengths[1]
    before = packed_attention(q, k, v, cumulative(lengths), max(lengths), "sdpa")[begin:end]
    outside = torch.ones(sum(lengths), 1, 1, dtype=torch.bool)
    outside[begin:end] = False
    q, k, v = (torch.where(outside, torch.full_like(x, 100.0), x) for x in (q, k, v))
    assert torch.equal(before, packed_attention(q, k, v, cumulative(lengths), max(lengths), "sdpa")[begin:end])


def test_packed_attention_passes_the_operator_checks_of_torch_compile() -> None:
    torch.library.opcheck(
        torch.ops.dpar.packed_cpu.default,
        (*inputs([3, 1, 4], torch.float32), cumulative([3, 1, 4])),
        atol=1e-5,
        rtol=1e-5,
    )


def test_images_of_equal_length_use_dense_attention() -> None:
    q, k, v = inputs([5, 5, 5], torch.float32)
    dense = dense_causal(*(x.unflatten(0, (3, 5)) for x in (q, k, v))).flatten(0, 1)
    torch.testing.assert_close(packed_attention(q, k, v, cumulative([5, 5, 5]), 5, "sdpa"), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_chooses_sdpa_on_the_cpu_with_the_reason(dtype: torch.dtype) -> None:
    assert choose_backend(CPU, dtype) == ("sdpa", "varlen: it needs a CUDA GPU; xformers: it needs a CUDA GPU")


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("varlen", "it needs a CUDA GPU"),
        ("xformers", "it needs a CUDA GPU"),
        ("flex", "it has no backward pass on the CPU"),
    ],
)
def test_an_unsupported_backend_is_refused_with_the_supported_ones(backend: PackedBackend, why: str) -> None:
    with pytest.raises(ModelError, match=re.escape(f"{backend} cannot run here: {why}. These can: sdpa")):
        choose_backend(CPU, torch.float32, backend)


def test_an_unknown_backend_is_refused_with_the_names() -> None:
    with pytest.raises(ModelError, match=f"'flash'; choose from auto, {', '.join(get_args(PackedBackend))}"):
        choose_backend(CPU, torch.float32, "flash")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_on_a_gpu_chooses_no_half_precision_backend_for_float32() -> None:
    assert choose_backend(torch.device("cuda"), torch.float32)[0] == "sdpa"
    assert choose_backend(torch.device("cuda"), torch.bfloat16)[0] in ("varlen", "xformers")


@pytest.mark.parametrize("is_old", [True, False])
def test_varlen_is_causal_with_the_signatures_of_both_versions(is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def of_2_10(q: Tensor, k: Tensor, v: Tensor, *lengths: object, is_causal: bool = False) -> Tensor:
        given["is_causal"] = is_causal
        return v

    def later(q: Tensor, k: Tensor, v: Tensor, *lengths: object, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        given["window_size"] = window_size
        return v

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_2_10 if is_old else later)
    q, k, v = inputs([3, 2], torch.float32)
    packed_attention(q, k, v, cumulative([3, 2]), 3, "varlen")
    assert given == ({"is_causal": True} if is_old else {"window_size": (-1, 0)})


def test_xformers_finds_the_cuda_runtime_that_it_is_linked_to() -> None:
    pytest.importorskip("xformers")
    code = "from dpar.xformers_loading import xformers_hindrance; print(xformers_hindrance())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_xformers_is_not_offered_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("dpar.attention.xformers_hindrance", lambda: "xformers has no CUDA kernels here")
    with pytest.raises(ModelError, match="xformers cannot run here: xformers has no CUDA kernels here"):
        choose_backend(torch.device("cuda"), torch.bfloat16, "xformers")
