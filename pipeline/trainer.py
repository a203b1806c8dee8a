"""The training loop of DPAR, of the LlamaGen baseline and of the entropy model: one trainer, one loss.

    with process_group(device) as group:
        fit(model, artifact, run, settings, progress, group)

Batches are a function of (seed, step), dropout and guidance dropout of (seed, step, rank), so a run that was broken off
goes on from its newest checkpoint as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dpar.flops import TRAINING_FLOPS_A_MAC, linear_macs
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from pipeline.device import autocast, rank, world_size
from pipeline.errors import StageError
from pipeline.likelihood import bits_per_token, forward, layout_for
from pipeline.progress import Progress, Stopped, stop_between_steps, stops_with
from pipeline.run import RunFolder
from pipeline.schedule import learning_rate
from pipeline.settings import OptimSettings
from shards.order import TrainingOrder
from shards.reader import Artifact, Batch

MEASURED_STEPS = 500  # over which the mean cost of an image is taken


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that ``torchrun`` started; nothing to do where there is one."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Holds this process until all others are here."""
    if world_size() > 1:
        dist.barrier()


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a model is trained on: an artifact, with or without its classes."""

    artifact: Artifact
    validation: Artifact | None
    unconditional: bool = False
    guidance_dropout: float = 0.0


def fit(
    model: DPAR | LlamaGen, objective: Objective, run: RunFolder, settings: OptimSettings, progress: Progress
) -> dict[str, Any]:
    """Trains ``model``, which is on its device, to the last step; gives the last line of metrics.

    Raises:
        StageError: the batch does not divide, or the loss is not finite.
        Stopped: the user pressed Ctrl-C.
    """
    n_steps = total_steps(settings, len(objective.artifact))
    optimizer = make_optimizer(model, settings)
    begin = run.restore(model, {"optimizer": optimizer})
    wait_for_all()
    wrapped = _wrap(model)
    loop = _Loop(model, wrapped, optimizer, objective, run, settings, n_steps)
    keeps = f"Stopped. The newest checkpoint is in {run.checkpoints}; run the same command again to go on from it."
    # one process can finish its step and save; several would have to agree on the step first
    can_wait = stop_between_steps() if world_size() == 1 else contextlib.nullcontext(lambda: False)
    with (
        stops_with(keeps),
        progress.task(run.folder.name, n_steps * settings.batch, "images") as task,
        can_wait as asked,
    ):
        task.begin_at(begin * settings.batch)
        model.train()
        for step in range(begin, n_steps):
            loss = loop.step(step)
            done = step + 1
            stopping = asked()  # once, so that what is said below is what was done
            if done == min(MEASURED_STEPS, n_steps) and not objective.unconditional:
                loop.report(done, loss, **loop.measure(begin, done, progress))
            elif done % settings.log_every == 0 or done == n_steps:
                loop.report(done, loss)
            if done % settings.eval_every == 0 or done == n_steps:
                loop.validate(done)
            if done % settings.checkpoint_every == 0 or done == n_steps or stopping:
                loop.save(done)
            task.advance(settings.batch, f"loss {loss:.3f}, {loss / math.log(2):.2f} bits/token")
            if stopping and done < n_steps:
                raise Stopped(f"Stopped. Step {done} is saved in {run.folder}; run the same command again to go on.")
    lines = run.metrics()
    return {key: value for line in lines for key, value in line.items()}


class _Loop:
    """The parts of one step, in the order in which they run."""

    def __init__(
        self,
        model: DPAR | LlamaGen,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        run: RunFolder,
        settings: OptimSettings,
        n_steps: int,
    ) -> None:
        self.model, self.wrapped, self.optimizer = model, wrapped, optimizer
        self.objective, self.run, self.settings, self.n_steps = objective, run, settings, n_steps
        self.device = model.output.weight.device
        self.order = TrainingOrder(
            rows=len(objective.artifact),
            views=objective.artifact.manifest.views,
            batch=settings.batch,
            seed=settings.seed,
        )
        self.share = settings.batch // world_size()  # images of this process
        self.micro = min(settings.micro_batch or self.share, self.share)
        self.peak_lr = settings.lr * (settings.batch / 256 if settings.scale_lr else 1.0)
        self.spoke, self.images, self.patches = time.monotonic(), 0, 0
        self.measured = 0  # patches of this process since the run was begun or gone on with

    def step(self, step: int) -> float:
        """One optimizer step on global batch ``step``; gives this process's mean loss, nats a token."""
        rate = learning_rate(step, self.n_steps, self.peak_lr, self.settings.warmup, self.settings.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed((self.settings.seed * 1_000_003 + step) * 4_096 + rank())
        rows, views = self.order.batch(step)
        mine = slice(rank() * self.share, (rank() + 1) * self.share)
        rows, views = rows[mine], views[mine]
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(0, self.share, self.micro):
            part = slice(first, first + self.micro)
            batch = self.objective.artifact.gather(rows[part], views[part])
            weight = len(batch.codes) / self.share  # every image has N tokens, so images weigh as tokens do
            last = first + self.micro >= self.share
            with contextlib.nullcontext() if last else self._no_sync():
                loss = self._loss(batch) * weight
                loss.backward()
            total += loss.item()
        # Of all processes' gradients, so that they end together; a step with it would spoil the next checkpoint.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise StageError(
                f"the loss is not finite at step {step}; begin a new run with a lower --lr (it is {self.peak_lr:g}) or "
                f"more --warmup. The newest checkpoint of this one is in {self.run.checkpoints}"
            )
        self.optimizer.step()
        return total

    def _loss(self, batch: Batch) -> Tensor:
        codes = torch.from_numpy(batch.codes).to(self.device, non_blocking=True)
        labels = self._labels(torch.from_numpy(batch.labels)).to(self.device, non_blocking=True)
        layout = layout_for(self.model, batch, self.device)
        self.images += len(codes)
        patches = codes.numel() if layout is None else layout.n_patches
        self.patches += patches
        self.measured += patches
        with autocast(self.device, self.settings.precision):
            logits = forward(self.wrapped, codes, labels, layout)  # type: ignore[arg-type]  # it may be wrapped
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())

    def _labels(self, labels: Tensor) -> Tensor:
        """The classes to condition on: some, or all, replaced by the guidance class."""
        guidance = self.model.config.classes
        if self.objective.unconditional:
            return torch.full_like(labels, guidance)
        return torch.where(torch.rand(len(labels)) < self.objective.guidance_dropout, guidance, labels)

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def report(self, done: int, loss: float, **more: float) -> None:
        """A line of metrics about the steps since the last one, with ``more`` in it."""
        now = time.monotonic()
        mean_loss = _mean_over_processes(loss, self.device)
        if rank() == 0:
            rate = self.images * world_size() / max(now - self.spoke, 1e-9)
            self.run.log(
                step=done,
                loss=mean_loss,
                bits_per_token=mean_loss / math.log(2),
                lr=self.optimizer.param_groups[0]["lr"],
                images_per_s=round(rate, 2),
                tokens_per_s=round(rate * self.model.config.n_tokens, 1),
                patches_per_image=self.patches / max(self.images, 1),
                **more,
            )
        self.spoke, self.images, self.patches = now, 0, 0

    def measure(self, begin: int, done: int, progress: Progress) -> dict[str, float]:
        """Gives and says what an image of the run's first steps cost on average, from its patches (paper section 4.3).

        Args:
            begin: step that the run was gone on with; batches before it are looked up, being a function of the seed.
            done: steps to measure.
            progress: where to say it.

        Returns:
            For the metrics, of the first process; nothing in the others.
        """
        patches = _sum_over_processes(self.measured, self.device)
        if rank() != 0:
            return {}
        mean = (patches + sum(self._patches_of(step) for step in range(begin))) / (done * self.settings.batch)
        macs = linear_macs(self.model.config, mean)
        flops = TRAINING_FLOPS_A_MAC * macs
        progress.say(
            f"mean cost of an image over the first {done} steps: {flops / 1e9:.6g} GFLOPs "
            f"(3 × 2 × {macs / 1e9:.6g} GMACs), {mean:.2f} patches"
        )
        return {
            "measured_steps": done,
            "measured_patches_per_image": mean,
            "training_gflops_per_image": flops / 1e9,
        }

    def _patches_of(self, step: int) -> int:
        """Patches of global batch ``step``; tokens for LlamaGen."""
        if isinstance(self.model, LlamaGen):
            return self.settings.batch * self.model.config.n_tokens
        starts = self.objective.artifact.gather(*self.order.batch(step)).starts
        assert starts is not None  # fits() has refused artifacts without boundaries
        return int(starts.sum())

    def validate(self, done: int) -> None:
        """Held-out bits per token, where there is a held-out artifact."""
        held_out = self.objective.validation
        if held_out is not None and rank() == 0:
            found = bits_per_token(
                self.model,
                held_out,
                batch=self.micro,
                precision=self.settings.precision,
                unconditional=self.objective.unconditional,
            )
            self.run.log(step=done, validation_bits_per_token=found.bits_per_token)
        wait_for_all()
        self.spoke = time.monotonic()

    def save(self, done: int) -> None:
        """A checkpoint, and the weights for everyone else."""
        if rank() == 0:
            self.run.save(done, self.model, {"optimizer": self.optimizer}, publish=self.model)
        wait_for_all()


def total_steps(settings: OptimSettings, images: int) -> int:
    """Optimizer steps of a run.

    Raises:
        StageError: the batch does not divide by the processes.
    """
    if settings.batch % world_size():
        raise StageError(f"--batch {settings.batch} does not divide by the {world_size()} processes")
    return settings.steps or max(1, round(settings.epochs * images / settings.batch))


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices (embeddings among them) and none on norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def _wrap(model: DPAR | LlamaGen) -> nn.Module:
    if world_size() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model)


def _mean_over_processes(value: float, device: torch.device) -> float:
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor)
    return float(tensor) / world_size()


def _sum_over_processes(value: int, device: torch.device) -> int:
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device, dtype=torch.int64)
    dist.all_reduce(tensor)
    return int(tensor)
