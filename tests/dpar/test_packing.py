from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpar import DPAR, DPARConfig, ModelError, PatchLayout
from dpar.attention import patch_cross_attention
from dpar.packing import segment_mean, segment_softmax, segment_sum, spread

SOME = settings(deadline=None, max_examples=50)
V, CLASSES = 17, 3


def random_starts(batch: int, n: int, share: float, seed: int) -> Tensor:
    starts = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) < share
    starts[:, 0] = True
    return starts


STARTS = st.builds(
    random_starts,
    batch=st.integers(1, 4),
    n=st.integers(1, 20),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10_000),
)


def segments(starts: Tensor) -> list[list[int]]:
    """Return the rows of the packed tokens of each patch, by a plain loop."""
    found: list[list[int]] = []
    for row, start in enumerate(starts.flatten().tolist()):
        if start:
            found.append([])
        found[-1].append(row)
    return found


def model(seed: int = 0) -> DPAR:
    torch.manual_seed(seed)
    config = DPARConfig(codebook_size=V, grid_height=3, grid_width=5, classes=CLASSES, width=32, heads=2)
    made = DPAR(config).eval()
    torch.nn.init.normal_(made.output.weight)
    return made


@SOME
@given(STARTS)
def test_layout_fields_equal_those_of_a_plain_loop(starts: Tensor) -> None:
    batch, n = starts.shape
    layout = PatchLayout.from_starts(starts)
    patches = segments(starts)
    counts = [int(row.sum()) for row in starts]
    assert layout.n_patches == len(patches)
    assert (layout.n_tokens, layout.longest) == (n, max(counts))
    assert layout.first.tolist() == [p[0] % n for p in patches]
    assert layout.last.tolist() == [p[-1] % n for p in patches]
    assert layout.image_of_patch.tolist() == [p[0] // n for p in patches]
    assert layout.patch_of_token.tolist() == [j for j, p in enumerate(patches) for _ in p]
    assert layout.cu_seqlens.tolist() == [sum(counts[:b]) for b in range(batch + 1)]
    assert layout.cu_seqlens.dtype == torch.int32
    for index in (layout.first, layout.last, layout.image_of_patch, layout.patch_of_token):
        assert index.dtype == torch.int64


def test_layout_of_patches_of_one_token_is_trivial() -> None:
    layout = PatchLayout.from_starts(torch.ones(2, 6, dtype=torch.bool))
    assert layout.patch_of_token.tolist() == list(range(12))
    assert layout.first.tolist() == layout.last.tolist() == [*range(6), *range(6)]
    assert layout.cu_seqlens.tolist() == [0, 6, 12]


def test_layout_moves_all_its_tensors_except_the_host_copy() -> None:
    layout = PatchLayout.from_starts(random_starts(2, 6, 0.5, 0))
    moved = layout.to("meta")
    assert (moved.n_tokens, moved.longest, moved.n_patches) == (layout.n_tokens, layout.longest, layout.n_patches)
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, Tensor)}
    assert torch.equal(tensors.pop("host_cu_seqlens"), layout.cu_seqlens)
    assert len(tensors) == 5
    assert all(tensor.is_meta for tensor in tensors.values())


@pytest.mark.parametrize(
    ("starts", "fault"),
    [
        (torch.tensor([[True, False], [False, True]]), "token 0"),
        (torch.tensor([True, False]), r"\(2,\)"),
        (torch.tensor([[1, 0]]), "int64"),
    ],
)
def test_invalid_starts_are_refused(starts: Tensor, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        PatchLayout.from_starts(starts)


@SOME
@given(STARTS)
def test_spread_copies_each_patch_to_its_tokens(starts: Tensor) -> None:
    layout = PatchLayout.from_starts(starts)
    rows = torch.randn(layout.n_patches, 3)
    expected = [rows[j].tolist() for j, p in enumerate(segments(starts)) for _ in p]
    assert spread(rows, layout.patch_of_token).tolist() == expected


@SOME
@given(STARTS)
def test_segment_sum_and_mean_equal_loops(starts: Tensor) -> None:
    layout = PatchLayout.from_starts(starts)
    rows = torch.randn(starts.numel(), 3, dtype=torch.float32)
    patches = segments(starts)
    index, n = layout.patch_of_token, layout.n_patches
    torch.testing.assert_close(segment_sum(rows, index, n), torch.stack([rows[p].sum(0) for p in patches]))
    torch.testing.assert_close(segment_mean(rows, index, n), torch.stack([rows[p].mean(0) for p in patches]))


def test_segment_sum_takes_rows_in_any_order_and_leaves_empty_segments_zero() -> None:
    rows = torch.tensor([[1.0], [2.0], [4.0]])
    assert segment_sum(rows, torch.tensor([2, 0, 2]), 4).tolist() == [[2.0], [0.0], [5.0], [0.0]]


def test_segment_mean_keeps_bfloat16_but_adds_in_float32() -> None:
    rows = torch.ones(257, 2, dtype=torch.bfloat16)  # 257 is no bfloat16 number
    mean = segment_mean(rows, torch.zeros(257, dtype=torch.long), 1)
    assert mean.dtype == torch.bfloat16
    assert mean.tolist() == [[1.0, 1.0]]


@SOME
@given(STARTS, st.sampled_from([1.0, 1e4]))
def test_segment_softmax_equals_a_loop_and_is_stable_for_large_scores(starts: Tensor, scale: float) -> None:
    layout = PatchLayout.from_starts(starts)
    scores = (torch.randn(starts.numel(), 2) * scale).requires_grad_()
    weights = segment_softmax(scores, layout.patch_of_token, layout.n_patches)
    expected = torch.cat([scores[p].softmax(dim=0) for p in segments(starts)])
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)
    pull = torch.randn_like(weights)
    gradients = [torch.autograd.grad((w * pull).sum(), scores)[0] for w in (weights, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def masked_cross_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    owned = torch.zeros(len(q), len(k), dtype=torch.bool)
    for j, rows in enumerate(segments(starts)):
        owned[j, rows] = True
    out = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=owned)
    return out.transpose(0, 1)


def assert_same_with_gradients(
    one: Callable[[Tensor, Tensor, Tensor], Tensor],
    other: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tolerance: float = 1e-5,
) -> None:
    inputs = [x.requires_grad_() for x in (q, k, v)]
    outs = [f(*inputs) for f in (one, other)]
    torch.testing.assert_close(outs[0], outs[1], atol=tolerance, rtol=tolerance)
    pull = torch.randn_like(outs[0])
    gradients = [torch.autograd.grad((out * pull).sum(), inputs) for out in outs]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@SOME
@given(STARTS)
def test_patch_cross_attention_equals_dense_attention_under_a_mask(starts: Tensor) -> None:
    layout = PatchLayout.from_starts(starts)
    q = torch.randn(layout.n_patches, 2, 8)
    k, v = torch.randn(2, starts.numel(), 2, 8)
    assert_same_with_gradients(
        lambda q, k, v: patch_cross_attention(q, k, v, layout.patch_of_token, layout.n_patches),
        lambda q, k, v: masked_cross_attention(q, k, v, starts),
        q,
        k,
        v,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_gives_the_same_logits_with_xformers_as_with_sdpa() -> None:
    pytest.importorskip("xformers")
    made = model().cuda()
    codes = torch.randint(V, (4, 15), device="cuda")
    layout = PatchLayout.from_starts(random_starts(4, 15, 0.5, 2)).to("cuda")
    logits = []
    for backend in ("xformers", "sdpa"):
        made.attention_backend = backend
        with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
            logits.append(made(codes, None, layout).float())
    torch.testing.assert_close(logits[0], logits[1], atol=5e-2, rtol=5e-2)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(2, 5))
@torch.no_grad()
def test_logits_of_an_image_do_not_depend_on_the_rest_of_the_batch(seed: int, batch: int) -> None:
    made = model(seed)
    starts = torch.cat([random_starts(1, 15, share, seed) for share in torch.rand(batch).tolist()])
    codes, labels = torch.randint(V, (batch, 15)), torch.randint(CLASSES + 1, (batch,))
    packed = made(codes, labels, starts)
    for b in range(batch):
        alone = made(codes[b : b + 1], labels[b : b + 1], starts[b : b + 1])
        torch.testing.assert_close(packed[b], alone[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_are_the_same_with_a_precomputed_layout() -> None:
    made, starts = model(), random_starts(3, 15, 0.4, 0)
    codes, labels = torch.randint(V, (3, 15)), torch.tensor([0, 1, CLASSES])
    assert torch.equal(made(codes, labels, starts), made(codes, labels, PatchLayout.from_starts(starts)))


@torch.no_grad()
def test_no_labels_select_the_guidance_class() -> None:
    made, starts = model(), random_starts(2, 15, 0.4, 0)
    codes = torch.randint(V, (2, 15))
    assert torch.equal(made(codes, None, starts), made(codes, torch.tensor([CLASSES, CLASSES]), starts))


@torch.no_grad()
def test_logits_depend_on_the_boundaries() -> None:
    made = model()
    codes = torch.randint(V, (1, 15))
    assert not torch.allclose(
        made(codes, None, random_starts(1, 15, 0.0, 0)), made(codes, None, random_starts(1, 15, 1.0, 0))
    )


def test_the_model_refuses_starts_whose_first_token_starts_no_patch() -> None:
    starts = torch.ones(2, 15, dtype=torch.bool)
    starts[1, 0] = False
    with pytest.raises(ValueError, match="token 0 of every image"):
        model()(torch.randint(V, (2, 15)), None, starts)


@pytest.mark.parametrize("shape", [(1, 15), (3, 15), (2, 14), (3, 10)])
def test_starts_of_another_shape_than_the_codes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match=r"starts do not fit codes of \(2, 15\)"):
        model()(torch.randint(V, (2, 15)), None, torch.ones(shape, dtype=torch.bool))


def test_codes_and_labels_of_other_shapes_are_refused() -> None:
    starts = torch.ones(2, 15, dtype=torch.bool)
    with pytest.raises(ModelError, match=r"codes are \(2, 16\); this model takes \(B, 15\), a grid of 3×5"):
        model()(torch.zeros(2, 16, dtype=torch.long), None, starts)
    with pytest.raises(ModelError, match=r"labels are \(3,\) for codes of \(2, 15\)"):
        model()(torch.zeros(2, 15, dtype=torch.long), torch.zeros(3, dtype=torch.long), starts)


def test_dynamic_rope_uses_the_first_and_last_token_of_each_patch() -> None:
    made = model()
    first, last = torch.tensor([0, 2, 5]), torch.tensor([1, 4, 13])
    table = made.patch_positions(first, last)  # head_dim 16: four pairs for the row, one for each of four columns
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([[0, 1, 1, 0], [2, 4, 4, 2], [0, 3, 3, 0]])
    frequency = 10_000 ** (-torch.arange(4) / 4)
    angle = torch.cat([rows.unsqueeze(1) * frequency, columns], dim=1)
    torch.testing.assert_close(table, torch.stack([angle.cos(), angle.sin()], dim=-1))
