"""Compute the pieces of a stage on the workers of a Ray cluster (``--engine ray``, extra ``ray``).

    driver: hands out indices, shows progress, writes manifests
      └─ worker: an actor per GPU (or per share of one, or per CPU); loads each model once, writes pieces

1. A function and what it captures are pickled once per step and put into Ray's object store. Models are not sent: the
   result of :meth:`RayEngine.load` is pickled as the call, and each worker makes the same call.
2. Each piece is one task. A worker claims it like any other process, so that other processes may join, and writes it.
3. Ray restarts a lost worker as soon as a node has room. Its piece goes to any free worker, because such a node may
   never join. Workers are added as nodes join.
4. An error in a piece ends the run with that error's message; only the loss of a worker leads to another attempt.

The driver computes nothing and needs no GPU. The first worker determines whether bfloat16 is fast, which decides
``--precision auto`` for all workers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pipeline.runtime.device import choose_device, fast_bf16, follow_workers, world_size
from pipeline.runtime.engine import Count, EngineOptions, Pieces, Work
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress, Task
from pipeline.runtime.provenance import made_by

T = TypeVar("T")

ATTEMPTS = 10  # a piece is given up after losing this many workers, plus the number of workers
LOOK_EVERY = 2.0  # seconds between queries of the cluster
PATIENCE = 60.0  # seconds until a file written by another machine must be visible here
STARTING = 0  # the step of a worker that is still starting


class Worker:
    """The actor: runs pieces, and keeps the models that they need."""

    def __init__(self, folder: str, gpus: float) -> None:
        import ray

        with contextlib.suppress(OSError):  # absolute paths and URLs work without it
            os.chdir(folder)
        node = ray.get_runtime_context().get_node_id()
        resources: dict[str, float] = next((n["Resources"] for n in ray.nodes() if n["NodeID"] == node), {})
        os.environ["LOCAL_WORLD_SIZE"] = str(max(1, room(resources, gpus)))  # divides the cores that decode images
        self._step = STARTING
        self._function: Callable[[Any], Any] | None = None
        self._models = Models()

    def describe(self, device: str) -> tuple[str | None, bool]:
        """Return this worker's version of dpar, and whether its device is fast with bfloat16."""
        return made_by().get("dpar"), fast_bf16(choose_device(device))

    def run(self, step: int, is_fast_bf16: bool, function: bytes, item: Any) -> Any:
        """Return ``function(item)``; the function of a new step is unpickled first."""
        if step != self._step:
            self._function = None  # releases its models
            follow_workers(is_fast_bf16)
            self._function, self._step = self._models.loads(function), step
        assert self._function is not None
        return self._function(item)


class Models:
    """A worker's cache: for each function, the result of its last call."""

    def __init__(self) -> None:
        self._results: dict[str, tuple[bytes, Any]] = {}  # by function: the pickled call and its result

    def loads(self, data: bytes) -> Any:
        """Unpickle the output of :meth:`Calls.dumps`; make the calls in it unless their results are cached."""
        models = self

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Any:
                return models._result(pid)

        return Unpickler(io.BytesIO(data)).load()

    def _result(self, call: bytes) -> Any:
        for last, result in self._results.values():
            if last == call:
                return result
        make, arguments = self.loads(call)
        last, _ = self._results.pop(make.__qualname__, (call, None))
        for name in [name for name, (other, _) in self._results.items() if last in other]:
            del self._results[name]  # results that depend on the last result
        result = make(*arguments)
        self._results[make.__qualname__] = call, result
        return result


class Calls:
    """The call behind each result: the driver's side of :class:`Models`."""

    def __init__(self) -> None:
        self._calls: dict[int, bytes] = {}  # by id of the result
        self._results: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def make(self, make: Callable[..., T], *arguments: object) -> T:
        """Return ``make(*arguments)``, which from now on is pickled as this call."""
        result = make(*arguments)
        if self._call(result) is None:
            self._calls[id(result)] = self.dumps((make, arguments))
            self._results[id(result)] = result
        return result

    def dumps(self, value: Any) -> bytes:
        """Pickle a value, including functions and what they capture.

        Raises:
            TypeError: it contains a model that was not returned by :meth:`make`, or a progress bar.
        """
        from ray import cloudpickle

        calls = self

        class Pickler(cloudpickle.Pickler):
            def persistent_id(self, value: Any) -> bytes | None:
                call = calls._call(value)
                if call is None and isinstance(value, torch.nn.Module | Task | Progress):
                    raise TypeError(f"a {type(value).__name__} cannot be sent to workers; create it with engine.load")
                return call

        stream = io.BytesIO()
        Pickler(stream).dump(value)
        return stream.getvalue()

    def _call(self, value: Any) -> bytes | None:
        return self._calls[id(value)] if value is not None and self._results.get(id(value)) is value else None


class RayEngine:
    """See :class:`pipeline.runtime.engine.Engine`."""

    def __init__(self, options: EngineOptions, progress: Progress) -> None:
        import ray

        self._ray, self._options, self._progress = ray, options, progress
        gpus = options.gpus_per_worker
        self._gpus = gpus if gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        self._calls = Calls()
        self._fast_bf16 = False
        self._step = STARTING
        self._workers: list[Any] = []
        self._idle: list[Any] = []
        self._lost: list[Any] = []  # workers that Ray may restart
        self._running: dict[Any, tuple[Any, int, Any]] = {}  # by reference: worker, step, numbered item
        self._looked = self._active = time.monotonic() - LOOK_EVERY

    def ask_first_worker(self) -> bool:
        """Return whether the workers are fast with bfloat16.

        Raises:
            StageError: they do not have the device, or have another version of dpar.
        """
        device = self._options.device
        [(version, self._fast_bf16)] = self._results(lambda worker, _: worker.describe.remote(device), [None])
        if version != (own := made_by().get("dpar")):
            raise StageError(f"the workers have dpar {version}, the driver {own}; install one version everywhere")
        return self._fast_bf16

    def load(self, make: Callable[..., T], *arguments: object) -> T:
        """See :class:`pipeline.runtime.engine.Engine`."""
        return self._calls.make(make, *arguments)

    def run(self, pieces: Pieces, work: Work, task: Count) -> None:
        """See :class:`pipeline.runtime.engine.Engine`."""

        def piece(index: int) -> int:
            count = _Images()
            work(pieces.missing(index), count)
            return count.n

        for images in self._map(piece, pieces.unfinished()):
            task.advance(images)
        until = time.monotonic() + PATIENCE
        while left := pieces.unfinished():
            if time.monotonic() > until:
                raise StageError(
                    f"{len(left)} pieces that the workers have written are not in {pieces.output}. Driver and "
                    "workers need a shared file system; name an absolute path on it"
                )
            time.sleep(0.1)

    def call(self, compute: Callable[[], T]) -> T:
        """See :class:`pipeline.runtime.engine.Engine`."""
        [result] = self._map(lambda _: compute(), [None])
        value: T = result
        return value

    def close(self) -> None:
        """Stop all workers; finished pieces are kept."""
        for worker in self._workers:
            self._ray.kill(worker)

    def _map(self, function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
        """Yield the function's results for all items, in order of completion."""
        if not items:
            return
        data = self._ray.put(self._calls.dumps(function))
        step = self._step + 1
        yield from self._results(lambda worker, item: worker.run.remote(step, self._fast_bf16, data, item), items)

    def _results(self, start: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Start each item on a free worker, and again on another if that worker is lost; yield results."""
        self._step += 1
        waiting, losses = deque(enumerate(items)), Counter[int]()
        left = len(waiting)
        while left:
            self._look_at_cluster()
            while waiting and self._idle:
                worker, (number, item) = self._idle.pop(), waiting.popleft()
                self._running[start(worker, item)] = worker, self._step, (number, item)
            if not self._running:  # all requested workers have failed to start
                time.sleep(LOOK_EVERY)
                continue
            done, _ = self._ray.wait(list(self._running), timeout=LOOK_EVERY)
            for reference in done:
                worker, step, numbered = self._running.pop(reference)
                is_current = step == self._step  # not from a step that ended with an error
                try:
                    result = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:
                    self._idle.append(worker)
                    if is_current:
                        raise error.cause from None
                except self._ray.exceptions.RayError as error:
                    self._lose(worker, step, error)
                    if is_current:
                        losses[numbered[0]] += 1
                        if losses[numbered[0]] == ATTEMPTS + len(self._workers):  # each may have died while idle
                            raise StageError(
                                f"a piece of work repeatedly lost its worker; last error: {error}"
                            ) from None
                        waiting.appendleft(numbered)
                else:
                    self._idle.append(worker)
                    if is_current:
                        left -= 1
                        yield result

    def _lose(self, worker: Any, step: int, error: Exception) -> None:
        """Let Ray restart a lost worker; remove one that Ray will not restart, so that it is replaced."""
        if step == STARTING and isinstance(error, self._ray.exceptions.ActorDiedError):
            self._ray.kill(worker)
            self._workers.remove(worker)
        else:
            self._lost.append(worker)

    def _wait_for(self, worker: Any) -> None:
        self._running[worker.__ray_ready__.remote()] = worker, STARTING, None

    def _look_at_cluster(self) -> None:
        """Request as many workers as the nodes have room for; report if none is running."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        while self._lost:
            self._wait_for(self._lost.pop())
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        target = self._options.ray_workers or max(1, sum(room(resources, self._gpus) for resources in nodes))
        actor = self._ray.remote(Worker).options(num_cpus=0 if self._gpus else 1, num_gpus=self._gpus, max_restarts=-1)
        while len(self._workers) < target:
            self._workers.append(actor.remote(os.getcwd(), self._gpus))
            self._wait_for(self._workers[-1])
        if self._idle or any(step != STARTING for _, step, _ in self._running.values()):
            self._active = now
        elif now - self._active > PATIENCE:
            self._active = now
            needs = f"{self._gpus:g} GPUs" if self._gpus else "a CPU"
            self._progress.say(
                f"waiting for Ray to start workers: none of {len(self._workers)} is running; each needs {needs}"
            )


class _Images:
    """Counts the images of a piece."""

    def __init__(self) -> None:
        self.n = 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self.n += n

    def skip(self, n: int) -> None:
        pass


def room(resources: dict[str, float], gpus: float) -> int:
    """Return how many workers with ``gpus`` GPUs each (0: with one CPU) a node has room for."""
    return int(resources.get("GPU", 0) / gpus + 1e-6) if gpus else int(resources.get("CPU", 0))


@contextmanager
def ray_engine(options: EngineOptions, progress: Progress) -> Iterator[RayEngine]:
    """Connect to a cluster, or start one on this machine as `ray.init` decides; stop the workers at the end.

    Raises:
        StageError: Ray is not installed, no cluster answers, ``torchrun`` started this process, or the workers do not
            have the device.
    """
    try:
        import ray
    except ImportError:
        raise StageError("--engine ray needs Ray: pip install 'dpar[ray]'") from None
    if world_size() > 1:
        raise StageError("--engine ray starts the workers itself; run the command without torchrun")
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            try:
                ray.init(options.ray_address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # Ray raises a plain Exception if a node does not start in time
                where = f"--ray-address {options.ray_address}" if options.ray_address else "this machine"
                raise StageError(f"Ray cannot be used at {where}: {str(error).splitlines()[0]}") from error
            stack.callback(ray.shutdown)
        engine = RayEngine(options, progress)
        stack.callback(engine.close)
        follow_workers(engine.ask_first_worker(), driver=True)
        stack.callback(follow_workers, None)
        yield engine
