from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpar import PatchLayout
from dpar.graphs import Graphs
from tests.cuda.backward import backward
from tests.cuda.shadow import MixedDevices, Shadow, WaitInGraph, shadow_cuda
from tests.dpar.sampled import LABELS, N, V, dpar


def test_a_shadow_reports_the_gpu_and_has_the_values_of_the_cpu() -> None:
    x = torch.arange(6.0).view(2, 3)
    with shadow_cuda():
        moved = x.cuda()
        assert isinstance(moved, Shadow)
        assert moved.is_cuda
        assert torch.equal((moved @ moved.t()).cpu(), x @ x.t())
        assert torch.zeros(2, device="cuda").is_cuda
        assert not torch.zeros(2).is_cuda


def test_tensors_of_two_devices_in_one_operation_are_refused() -> None:
    with shadow_cuda():
        x = torch.ones(3, device="cuda")
        assert (x + torch.tensor(1.0)).sum().item() == 6  # a host scalar is allowed
        with pytest.raises(MixedDevices, match=r"\(3,\)"):
            x + torch.ones(3)


@pytest.mark.parametrize(
    ("waits", "work"),
    [
        (1, lambda x: x.sum().item()),
        (1, lambda x: x.tolist()),
        (1, lambda x: x.cpu()),
        (1, lambda x: x.nonzero()),
        (1, lambda x: x[x > 1]),
        (1, lambda x: x[torch.tensor([0, 1])]),
        (1, lambda x: torch.ones(3).to("cuda", non_blocking=True)),  # not pinned
        (1, lambda x: torch.cuda.synchronize()),
        (1, lambda x: torch.cuda.current_stream().synchronize()),
        (0, lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True)),
        (0, lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)),
        (0, lambda x: x * 2),
    ],
)
def test_waits_for_the_device_are_counted(waits: int, work: Callable[[Tensor], object]) -> None:
    with shadow_cuda() as counts:
        x = torch.zeros(3, device="cuda")
        counts.waits.clear()
        work(x)
    assert sum(counts.waits.values()) == waits


def test_kernels_are_counted_and_views_are_not() -> None:
    with shadow_cuda() as counts:
        x = torch.ones(4, 2, device="cuda")
        counts.kernels.clear()
        (x.t().view(2, 4)[:, 1:] + 1).relu()
        assert sum(counts.kernels.values()) == 2


def test_a_step_that_waits_cannot_be_captured() -> None:
    with shadow_cuda() as counts:
        graphs, x = Graphs(torch.device("cuda")), torch.ones(3, device="cuda")
        for step in (lambda: x.add_(1), lambda: x.add_(x.sum().item())):
            graphs.run(step, step)  # type: ignore[arg-type]
        launches = counts.launches
        graphs.run(first := (lambda: x.add_(1).mul_(2)), first)  # type: ignore[arg-type]
        assert counts.launches == launches + 2
        graphs.run(first, first)  # type: ignore[arg-type]
        assert counts.launches == launches + 3  # a graph is one launch
        graphs.run("reads", lambda: None)
        with pytest.raises(WaitInGraph, match="_local_scalar_dense"):
            graphs.run("reads", lambda: x.sum().item())  # type: ignore[arg-type]


def boundaries() -> Tensor:
    starts = torch.rand(4, N) < 0.5
    starts[:, 0] = True
    return starts


def test_gradients_of_shadows_equal_those_of_the_cpu() -> None:
    model, codes, layout = dpar().double(), torch.randint(V, (4, N)), PatchLayout.from_starts(boundaries())
    gradients = torch.autograd.grad(model(codes, LABELS, layout, loss=True), list(model.parameters()))
    with shadow_cuda():
        model = model.to("cuda")
        model(codes.cuda(), LABELS.cuda(), layout.to("cuda"), loss=True).backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert isinstance(parameter.grad, Shadow)
        torch.testing.assert_close(parameter.grad.value, gradient, rtol=1e-9, atol=1e-12)


def test_backpropagation_node_by_node_equals_autograds_engine() -> None:
    model, gradients = dpar(), []
    codes, starts = torch.randint(V, (4, N)), boundaries()
    for propagate in (torch.Tensor.backward, backward):
        model.zero_grad()
        propagate(model(codes, LABELS, starts, loss=True))
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(mine, own) for mine, own in zip(*gradients, strict=True))
