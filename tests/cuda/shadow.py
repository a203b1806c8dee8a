"""Tensors that report ``cuda:0`` and hold CPU values, to run, count and check code for GPUs without one.

    with shadow_cuda() as counts:
        model = model.to("cuda")
        sample(model, labels)
    counts.kernels, counts.waits            # Counters by place in the code

Complete stages run with their real control flow and values. This detects or counts:

- operations on tensors of two devices, which CUDA refuses: raised as :class:`MixedDevices`;
- kernels: operations on a GPU that are neither views nor copies between host and device;
- waits of the host for the device: reading a value, or a size that depends on values; copies from or to memory that is
  not pinned; indexing with a mask, or with indices on the host; ``synchronize``. A non-blocking copy from or to pinned
  memory does not wait;
- waits inside a step that :class:`dpar.graphs.Graphs` would capture: raised as :class:`WaitInGraph`.

Not covered: the results of CUDA's kernels, NCCL, Triton, compiled code (``test_graphs.py`` counts its graphs). Under
autocast results differ from the CPU's by rounding, because on CUDA it keeps other operations in float32. This uses
private hooks of torch, so it belongs in tests only.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dpar.graphs import Graphs
from tests.cuda.backward import backward

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = Path(__file__).parents[2]
ROOMS = tuple(str(ROOT / name) for name in ("dpar", "pipeline", "shards", "cli.py"))
# Operations without a kernel: views and uninitialised memory.
FREE = frozenset(
    re.findall(
        r"\w+",
        "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze split split_with_sizes chunk "
        "unbind as_strided detach alias unfold diagonal view_as_real view_as_complex _reshape_alias lift_fresh "
        "is_same_size movedim unflatten narrow empty empty_like new_empty empty_strided _conj set_ resize "
        "_local_scalar_dense _pin_memory is_pinned record_stream",
    )
)
COPIES = frozenset({"_to_copy", "copy"})
# Operations whose result, or its size, the host reads.
READS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"})
INDEXING = frozenset({"index", "index_put", "_index_put_impl"})


class MixedDevices(RuntimeError):
    """An operation on tensors of two devices."""


class WaitInGraph(RuntimeError):
    """A step to be captured waits for the device."""


class Counts:
    """Operations that ran, by name and by place: ``dpar/sampling.py:160 index``."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.launches = 0  # kernels outside of graphs, and graphs
        self.in_graph = False
        self.inside = False  # inside a kernel whose parts run as separate operations
        self.pinned: set[int] = set()  # addresses of memory

    def kernel(self, name: str) -> None:
        """Count a kernel."""
        if self.inside:
            return
        self.kernels[f"{place()} {name}"] += 1
        self.launches += not self.in_graph

    @contextlib.contextmanager
    def one_kernel(self, name: str) -> Iterator[None]:
        """Count everything in the block as one kernel."""
        self.kernel(name)
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def wait(self, what: str) -> None:
        """Count a wait of the host for the device."""
        if self.in_graph:
            raise WaitInGraph(f"{what} at {place()}")
        self.waits[f"{place()} {what}"] += 1

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor lies in pinned memory."""
        return tensor.untyped_storage().data_ptr() in self.pinned


class Shadow(torch.Tensor):
    """A tensor on a pretended GPU; ``value`` holds its values on the CPU."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor, requires_grad: bool = False) -> Shadow:
        made: Shadow = torch.Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=CUDA,
            requires_grad=requires_grad,
        )
        made.value = value
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Shadow({self.value})"

    def tolist(self) -> Any:
        """Return the values, after a wait."""
        _counts().wait("tolist")
        return self.value.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Raise, as CUDA tensors do."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


class ShadowMode(TorchDispatchMode):
    """Sends all operations through :func:`run`, including those that create tensors."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


ACTIVE: list[Counts] = []


def _counts() -> Counts:
    return ACTIVE[-1]


def place() -> str:
    """Return the line of this project that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(ROOMS):
            return f"{frame.f_code.co_filename[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run, check and count an operation on the values of shadows; results are shadows if they would be on a GPU."""
    counts, name = _counts(), func._schema.name.split("::")[1]
    base = name if name.startswith("_") else name.rstrip("_")
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    shadows = [x for x in tensors if isinstance(x, Shadow)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    on_gpu = bool(shadows) if asked is None else asked.type == "cuda"
    if base in COPIES:
        on_gpu = _count_copy(counts, base, args, kwargs, on_gpu)
    elif shadows:
        _check_devices(counts, func, base, args, tensors)
    if shadows:
        _count_reads(counts, base, args)
    if on_gpu and base not in FREE and not (base in COPIES and len(shadows) < len(tensors)):
        counts.kernel(name)
    host = {**kwargs, **({"device": CPU} if asked is not None and asked.type == "cuda" else {})}
    pinned = host.pop("pin_memory", False)
    if base == "_pin_memory":
        func, args, host, pinned = torch.ops.aten.clone.default, args[:1], {}, True
    if base == "is_pinned":
        return counts.is_pinned(args[0])
    plain_args, plain_kwargs = tree_map(_value, (args, host))
    out = STAND_INS.get(base, func)(*plain_args, **plain_kwargs)
    if pinned:
        counts.pinned.add(out.untyped_storage().data_ptr())
    return _results(out, tensors, on_gpu, base)


def _rms_norm_backward(
    pull: torch.Tensor, x: torch.Tensor, shape: list[int], rstd: torch.Tensor, weight: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x (..., d) and weight (d,)."""
    normed, weighed = x * rstd, pull * weight
    for_x = rstd * (weighed - normed * (weighed * normed).mean(dim=-1, keepdim=True))
    return for_x.to(x.dtype), (pull * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)


# Kernels that the CPU lacks, and views whose conjugate bit a dispatch mode would ignore.
STAND_INS: dict[str, Callable[..., Any]] = {
    "_fused_rms_norm_backward": _rms_norm_backward,
    "_conj": torch.conj_physical,
    "_neg_view": torch.neg,
}


def _results(out: Any, tensors: list[torch.Tensor], on_gpu: bool, base: str) -> Any:
    own = {id(_value(x)): x for x in tensors}  # an operation in place returns its own argument

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in own and isinstance(own[id(x)], Shadow) == on_gpu:
            return own[id(x)]
        if id(x) in own:  # a copy to the other device, which does not share memory
            x = x.clone()
        return Shadow(x) if on_gpu else x

    return tree_map(wrap, out)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Shadow) else x


def _check_devices(counts: Counts, func: Any, base: str, args: Any, tensors: list[torch.Tensor]) -> None:
    host = [x for x in tensors if not isinstance(x, Shadow) and x.dim() > 0]  # host scalars are allowed
    if not host:
        return
    if base not in INDEXING or not isinstance(args[0], Shadow):
        shapes = ", ".join(str(tuple(x.shape)) for x in host)
        raise MixedDevices(f"{func} has tensors on the CPU among those on the GPU: {shapes}; at {place()}")
    counts.wait("indices on the host")


def _count_reads(counts: Counts, base: str, args: Any) -> None:
    if base in READS:
        counts.wait(base)
    if base in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
        counts.wait("a mask as index")
    if base == "repeat_interleave":
        counts.wait(base)


def _count_copy(counts: Counts, base: str, args: Any, kwargs: dict[str, Any], on_gpu: bool) -> bool:
    """Whether the result is on the GPU."""
    source = args[0] if base == "_to_copy" else args[1]
    if base == "copy":
        on_gpu = isinstance(args[0], Shadow)
    elif kwargs.get("device") is None:
        on_gpu = isinstance(source, Shadow)
    if isinstance(source, Shadow) == on_gpu:
        return on_gpu
    on_host = source if on_gpu else (args[0] if base == "copy" else None)
    later = kwargs.get("non_blocking", False) or (base == "copy" and len(args) > 2 and args[2])
    if not (later and on_host is not None and counts.is_pinned(on_host)):
        counts.wait("host to device" if on_gpu else "device to host")
    return on_gpu


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, real: Any = F.scaled_dot_product_attention, **kw: Any
) -> torch.Tensor:
    """SDPA, which is one kernel on a GPU if fused kernels are allowed."""
    if not isinstance(q, Shadow):
        return real(q, k, v, *args, **kw)
    with _counts().one_kernel("scaled_dot_product_attention"):
        return real(q, k, v, *args, **kw)


def _packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seq_q: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """``varlen_attn``, causal: the device reads lengths that the host need not know."""
    lengths = _value(cu_seq_q).diff().tolist()
    images = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    with _counts().one_kernel("varlen_attn"):
        out = [
            F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True)
            for q, k, v in images
        ]
        return torch.cat([x.transpose(0, 1) for x in out])


class Stream:
    """The device's only stream."""

    def synchronize(self) -> None:
        """Count a wait."""
        _counts().wait("synchronize")


class Event:
    """A point on the stream."""

    def __init__(self, **_: object) -> None: ...

    def record(self, stream: object = None) -> None:
        """Do nothing: the stream runs in order."""

    def synchronize(self) -> None:
        """Count a wait."""
        _counts().wait("synchronize")


class Replay:
    """Replaces a captured graph: its kernels are one launch, and none of them may wait."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step

    def replay(self) -> None:
        """Run the step."""
        counts = _counts()
        counts.launches += 1
        counts.in_graph = True
        try:
            self.step()
        finally:
            counts.in_graph = False


def _shadowed(run: Callable[[threading.Thread], None], counts: Counts) -> Callable[[threading.Thread], None]:
    """Wrap the target of a thread to enable the mode there, because modes are per thread."""

    def shadowed(thread: threading.Thread) -> None:
        with ShadowMode(counts):
            run(thread)

    return shadowed


@contextlib.contextmanager
def shadow_cuda() -> Iterator[Counts]:
    """Pretend that the machine has one GPU, an H100, whose tensors are shadows."""
    torch._C._ensureCUDADeviceGuardSet()
    counts = Counts()
    stand_ins = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.max_memory_allocated": lambda device=None: 0,
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.cuda.current_stream": lambda device=None: Stream(),
        "torch.cuda.Event": Event,
        "torch.cuda.synchronize": lambda device=None: counts.wait("synchronize"),
    }
    ACTIVE.append(counts)
    swap = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        stack.callback(ACTIVE.pop)
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        stack.enter_context(mock.patch("torch.nn.attention.varlen.varlen_attn", _packed_attention))
        stack.enter_context(mock.patch.object(Graphs, "_capture", lambda graphs, step: Replay(step)))
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot become a shadow in place
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, swap)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda")
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
        stack.enter_context(mock.patch.object(threading.Thread, "run", _shadowed(threading.Thread.run, counts)))
        stack.enter_context(ShadowMode(counts))
        yield counts
