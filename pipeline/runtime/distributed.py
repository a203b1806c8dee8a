"""The processes of one training run: joining them, spreading a model over them, agreeing on what to do.

    with process_group(device):
        wrapped = data_parallel(model)                       # a copy of the model in each process (DDP)
        shard_model(model, device, precision)                # or a share of every tensor in each (FSDP2), in place
        worst = agree(torch.tensor([0.0, 75.0]))             # the largest of all processes' numbers

With one process all of it does nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.runtime.device import Precision, precision_name, world_size
from pipeline.runtime.errors import PeerEnded


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that ``torchrun`` started; nothing to do where there is one.

    Raises:
        PeerEnded: another process has died.
    """
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Checkpoints and barriers talk over the CPU, so that they need no GPU memory.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "closed by peer" in str(error) or "reset by peer" in str(error):
            raise PeerEnded("another process of this run has ended; its own message says why") from error
        raise
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Holds this process until all others are here."""
    if world_size() > 1:
        dist.barrier()


def data_parallel(model: nn.Module) -> nn.Module:
    """The model with its gradients averaged over the processes."""
    if world_size() == 1:
        return model
    # Its buffers are tables that no step changes. Newer versions of torch call the argument forward_sync_buffers.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard_model(model: nn.Module, device: torch.device, precision: Precision) -> None:
    """Leaves each process a share of every parameter, gradient and optimizer state; whole layers exist while they run.

    Args:
        model: changed in place; its parameters become DTensors.
        device: where it is.
        precision: with bf16 on CUDA, parameters travel in bf16 and gradients are added up in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if world_size() == 1:
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy()
    if device.type == "cuda" and precision_name(device, precision) == "bf16":
        # Rotary tables are inputs of layers, and lose positions in bf16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in [layer for part in model.children() if isinstance(part, nn.ModuleList) for layer in part]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def all_reduce_max(numbers: Tensor) -> Tensor:
    """The largest of each of ``numbers`` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers


def gather_first(text: str | None) -> str | None:
    """The text of the first process that has one; None where none has."""
    if world_size() == 1:
        return text
    texts: list[str | None] = [None] * world_size()
    dist.all_gather_object(texts, text)
    return next((t for t in texts if t is not None), None)


def all_reduce_sum(numbers: Tensor) -> Tensor:
    """The sum of each of ``numbers`` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(numbers)
    return numbers


def all_reduce_mean(value: float) -> float:
    """The mean of one number over all processes."""
    return float(all_reduce_sum(torch.tensor(value, dtype=torch.float64))) / world_size()
