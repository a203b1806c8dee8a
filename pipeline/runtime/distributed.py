"""The processes of one training run: process group, data parallelism, collectives.

    with process_group(device):
        wrapped = data_parallel(model)                       # DDP: a copy of the model per process
        shard_model(model, device, precision)                # FSDP2: a share of every tensor per process, in place
        worst = all_reduce_max(torch.tensor([0.0, 75.0]))    # elementwise, over all processes

With one process these have no effect.
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
    """Join the processes that ``torchrun`` started; no effect on a single process.

    Raises:
        PeerEnded: another process has died.
    """
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Checkpoints and barriers communicate over the CPU and need no GPU memory.
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
    """Wait until all processes reach this point."""
    if world_size() > 1:
        dist.barrier()


def data_parallel(model: nn.Module) -> nn.Module:
    """Return the model wrapped so that its gradients are averaged over the processes."""
    if world_size() == 1:
        return model
    # Its buffers are constant tables. Newer versions of torch call the argument forward_sync_buffers.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    torch._dynamo.config.optimize_ddp = False  # it would split the graph of every compiled layer
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard_model(model: nn.Module, device: torch.device, precision: Precision) -> None:
    """Shard every parameter, gradient and optimizer state over the processes (FSDP2).

    Args:
        model: changed in place; its parameters become DTensors. A layer's full parameters exist only while it runs.
        device: the model's device.
        precision: with bf16 on CUDA, parameters of layers are gathered in bf16. Residuals and the reduction of
            gradients are float32, as with DistributedDataParallel.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if world_size() == 1:
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    full_precision = policy = MixedPrecisionPolicy()
    if device.type == "cuda" and precision_name(device, precision) == "bf16":
        # Inputs of layers are not cast: bf16 cannot represent rotary positions, and residuals stay float32. For the
        # same reason embeddings, which begin the residual stream, are gathered in float32.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in [layer for part in model.children() if isinstance(part, nn.ModuleList) for layer in part]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=full_precision)


def all_reduce_max(numbers: Tensor) -> Tensor:
    """Return the elementwise maximum of ``numbers`` over all processes; in place."""
    if world_size() > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers


def gather_first(text: str | None) -> str | None:
    """Return the text of the first process that has one; None if none has."""
    if world_size() == 1:
        return text
    texts: list[str | None] = [None] * world_size()
    dist.all_gather_object(texts, text)
    return next((t for t in texts if t is not None), None)


def all_reduce_sum(numbers: Tensor) -> Tensor:
    """Return the elementwise sum of ``numbers`` over all processes; in place."""
    if world_size() > 1:
        dist.all_reduce(numbers)
    return numbers


def all_reduce_mean(value: float) -> float:
    """Return the mean of a number over all processes."""
    return float(all_reduce_sum(torch.tensor(value, dtype=torch.float64))) / world_size()
