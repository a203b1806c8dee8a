"""The training loop of DPAR, of the LlamaGen baseline and of the entropy model: one trainer, one loss.

    with process_group(device):
        fit(model, objective, run, settings, progress)

Batches are a function of (seed, step), dropout and guidance dropout of (seed, step, rank), so a run that was stopped
resumes from its newest checkpoint with the results of one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpar.llamagen import LlamaGen
from dpar.model import DPAR, DPARConfig
from dpar.packing import to_device
from dpar.pretrained import write_weights
from pipeline.runs.checkpoints import Checkpoints, TrainState, load_full_tensors
from pipeline.runs.ema import EMA
from pipeline.runs.run_folder import RunFolder
from pipeline.runtime.device import autocast, precision_name, rank, world_size
from pipeline.runtime.distributed import (
    all_reduce_max,
    all_reduce_mean,
    all_reduce_sum,
    barrier,
    data_parallel,
    shard_model,
)
from pipeline.runtime.errors import StageError
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import Progress, Stopped, stop_between_steps, stops_with
from pipeline.scoring.likelihood import shared_bits_per_token
from pipeline.settings.training import OptimSettings
from pipeline.training.micro_batches import MicroBatch, micro_batches
from pipeline.training.optimizer import make_optimizer, step_unless
from pipeline.training.preview import Painter
from pipeline.training.schedule import learning_rate, total_steps
from pipeline.training.step_results import Step, StepResults
from pipeline.training.throughput import Speed, peak_memory
from pipeline.training.trackers import Trackers
from shards.reader import Artifact
from shards.training_data import TrainingData

MEASURED_STEPS = 500  # over which the mean cost of an image is taken
MOST_SKIPPED = 10  # steps in a row that may give no finite loss or gradient


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The data that a model is trained on, with or without classes."""

    artifact: Artifact
    validation: Artifact | None
    unconditional: bool = False
    guidance_dropout: float = 0.0
    painter: Painter | None = None  # of sample sheets


def fit(
    model: DPAR | LlamaGen, objective: Objective, run: RunFolder, settings: OptimSettings, progress: Progress
) -> dict[str, Any]:
    """Train ``model``, on its device, to the last step; return the newest value of each metric.

    Raises:
        StageError: the batch does not divide; steps in a row are not finite; memory or the disk is full.
        Stopped: a signal asked for it; the step is saved.
    """
    n_steps = total_steps(settings, len(objective.artifact))
    keeps = f"Stopped. The newest checkpoint is in {run.checkpoints}; run the same command again to resume from it."
    with (
        stops_with(keeps),
        Checkpoints(run.checkpoints, settings.keep) as checkpoints,
        _open_trackers(run, settings) as trackers,
        _Loop(model, objective, run, settings, n_steps, checkpoints, trackers) as loop,
        progress.task(run.folder.name, n_steps * settings.batch, "images") as task,
        stop_between_steps() as asked,
    ):
        begin = loop.restore(progress)
        task.begin_at(begin * settings.batch)
        model.train()
        for step in range(begin, n_steps):
            loop.step(step, asked())
            done = step + 1
            last = done == n_steps
            measured = done == min(MEASURED_STEPS, n_steps) and not objective.unconditional
            logged, validated, saved = (
                last or done % every == 0
                for every in (settings.log_every, settings.eval_every, settings.checkpoint_every)
            )
            result = loop.read(progress, wait=measured or logged or validated or saved)
            stops = result is not None and result.status > 0
            if stops:
                result = loop.read(progress, wait=True)
            if result is not None and (measured or logged):
                loop.report(result, done, **(loop.measure(begin, done, progress) if measured else {}))
            if validated:
                loop.validate(done)
            if saved or stops:
                loop.save(done)
            task.advance(settings.batch, loop.note(result))
            if result is not None and stops and not last:
                checkpoints.finish()
                barrier()
                message = f"Stopped. Step {done} is saved in {run.folder}; run the same command again to resume."
                raise Stopped(message, result.status)
        checkpoints.finish()
        barrier()
    return {key: value for line in run.metrics() for key, value in line.items() if value is not None}


class _Loop:
    """The parts of a step, in execution order."""

    def __init__(
        self,
        model: DPAR | LlamaGen,
        objective: Objective,
        run: RunFolder,
        settings: OptimSettings,
        n_steps: int,
        checkpoints: Checkpoints,
        trackers: Trackers,
    ) -> None:
        self.model, self.objective, self.run, self.settings, self.n_steps = model, objective, run, settings, n_steps
        self.checkpoints, self.trackers = checkpoints, trackers
        self.device = model.output.weight.device
        self.sharded = settings.fsdp and world_size() > 1
        if self.sharded:
            shard_model(model, self.device, settings.precision)
        self.wrapped = model if self.sharded else data_parallel(model)
        self.optimizer = make_optimizer(model, settings)
        self.average = EMA(model, settings.ema) if settings.ema else None
        self.state = TrainState(model, [self.optimizer], self.average)
        self.data = TrainingData(
            objective.artifact, batch=settings.batch, seed=settings.seed, rank=rank(), world_size=world_size()
        )
        self.share = settings.batch // world_size()  # images of this process
        self.micro = min(settings.micro_batch or self.share, self.share)
        self.batches = self._batches(0)
        self.peak_lr = settings.lr * (settings.batch / 256 if settings.scale_lr else 1.0)
        self.speed = Speed(model.config, self.device, precision_name(self.device, settings.precision), world_size())
        self.spoke, self.images, self.patches = time.monotonic(), 0, 0
        self.measured = 0  # patches of this process since this process began or resumed
        self.results = StepResults()
        self.newest: Step | None = None  # result that has been read
        self.skipped, self.in_a_row = 0, 0
        self.rates = ""

    def __enter__(self) -> _Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.batches.close()
        self.data.close()

    def restore(self, progress: Progress) -> int:
        """Resume from the newest checkpoint; return the number of finished steps."""
        done, notes = self.checkpoints.restore(self.state, progress)
        self.skipped, self.in_a_row = notes.get("skipped", 0), notes.get("in_a_row", 0)
        self.run.forget_metrics_after(done)
        self.batches = self._batches(done)
        self.spoke = time.monotonic()
        return done

    def _batches(self, begin: int) -> Generator[list[MicroBatch], None, None]:
        """Yield the micro-batches of each step from ``begin`` on, prepared one step ahead."""
        steps, on_gpu = range(begin, self.n_steps), self.device.type == "cuda"
        packed = isinstance(self.model, DPAR)
        return prefetch(micro_batches(self.data, steps, micro=self.micro, packed=packed, pin=on_gpu), limit=1)

    def step(self, step: int, status: int) -> None:
        """Run one optimizer step on global batch ``step``; ``status`` is the exit status that a signal asks for.

        The device skips the update if the step is not finite; the host does not wait for it.
        """
        rate = learning_rate(step, self.n_steps, self.peak_lr, self.settings.warmup, self.settings.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed((self.settings.seed * 1_000_003 + step) * 4_096 + rank())
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        parts = next(self.batches)
        for part in parts:
            weight = len(part.codes) / self.share  # every image has N tokens, so images weigh as tokens do
            with contextlib.nullcontext() if part is parts[-1] else self._no_sync():
                partial = self._loss(part) * weight
                partial.backward()
            loss += partial.detach()
        norm = self._clip()
        unsound = ~torch.isfinite(loss + norm)
        own = to_device(torch.tensor([float(self.checkpoints.failed()), float(status)]), self.device)
        flags = all_reduce_max(torch.cat([unsound.float().view(1), own]))
        step_unless(self.optimizer, flags[0])
        if self.average is not None:
            self.average.update(self.model, skip=flags[0])
        self.results.add(step + 1, torch.cat([flags, torch.stack([loss, norm])]))

    def read(self, progress: Progress, *, wait: bool) -> Step | None:
        """Return the newest result: of this step with ``wait``, else of the one before. Raises as :func:`fit`."""
        for result in self.results.read(wait=wait):
            if result.save_failed:
                self.checkpoints.finish()
            self._count_skipped(result, progress)
            self.newest = result
        return self.newest

    def _loss(self, batch: MicroBatch) -> Tensor:
        codes = to_device(batch.codes, self.device)
        labels = to_device(self._labels(batch.labels), self.device)
        self.images += len(codes)
        self.patches += batch.n_patches
        self.measured += batch.n_patches
        inputs = (codes, labels) if batch.layout is None else (codes, labels, batch.layout.to(self.device))
        with autocast(self.device, self.settings.precision):
            loss: Tensor = self.wrapped(*inputs, loss=True)  # inside, where FSDP has the head's weights
        return loss

    def _labels(self, labels: Tensor) -> Tensor:
        """Return the classes to condition on, some or all of them replaced by the guidance class."""
        guidance = self.model.config.classes
        if self.objective.unconditional:
            return torch.full_like(labels, guidance)
        return torch.where(torch.rand(len(labels)) < self.objective.guidance_dropout, guidance, labels)

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Keep gradients local until the last micro-batch under DDP. FSDP reduces those of every micro-batch."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def _clip(self) -> Tensor:
        """Clip the norm of the gradients; return their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _count_skipped(self, result: Step, progress: Progress) -> None:
        """Report a skipped step; raise StageError after too many in a row."""
        if not result.skipped:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row < MOST_SKIPPED:
            progress.say(f"step {result.done} is skipped: its loss or gradient is not finite ({self.skipped} in all)")
            return
        raise StageError(
            f"{MOST_SKIPPED} steps in a row, to step {result.done}, gave a loss or gradient that is not finite; begin "
            f"a new run with a lower --lr (it is {self.peak_lr:g}) or more --warmup. The newest checkpoint of this one "
            f"is in {self.run.checkpoints}"
        )

    def report(self, result: Step, done: int, **more: float) -> None:
        """Log the metrics of the steps since the last report, with ``more``."""
        elapsed = max(time.monotonic() - self.spoke, 1e-9)
        loss = all_reduce_mean(result.loss)
        images, patches = all_reduce_sum(torch.tensor([self.images, self.patches], dtype=torch.float64)).tolist()
        rate, patches_per_image = images / elapsed, patches / max(images, 1)
        speed = self.speed.of(rate, patches_per_image)
        memory = peak_memory(self.device) / 1e9
        if rank() == 0:
            self.log(
                done,
                loss=loss,
                bits_per_token=loss / math.log(2),
                lr=self.optimizer.param_groups[0]["lr"],
                grad_norm=result.norm,
                skipped_steps=self.skipped,
                images_per_s=round(rate, 2),
                tokens_per_s=round(rate * self.model.config.n_tokens, 1),
                patches_per_image=patches_per_image,
                memory_gb=round(memory, 3),
                **speed,
                **more,
            )
        mfu = f" ({speed['mfu']:.1%} MFU)" if "mfu" in speed else ""
        self.rates = (
            f", {rate * self.model.config.n_tokens:,.0f} tokens/s, {patches_per_image:.1f} patches/image, "
            f"{speed['flops_per_s'] / 1e12:.3g} TFLOP/s{mfu}, {memory:.2f} GB"
        )
        self.spoke, self.images, self.patches = time.monotonic(), 0, 0

    def log(self, done: int, **values: float) -> None:
        """Log metrics to the run and to all trackers."""
        self.run.log(step=done, **values)
        self.trackers.log(done, values)

    def note(self, result: Step | None) -> str:
        """Return the text next to the progress bar."""
        loss = "" if result is None else f"loss {result.loss:.3f}, {result.loss / math.log(2):.2f} bits/token"
        return loss + self.rates

    def measure(self, begin: int, done: int, progress: Progress) -> dict[str, float]:
        """Return and print the mean cost per image over the first steps, from their patches (paper section 4.3).

        Args:
            begin: step at which the run was resumed; batches before it are looked up, being a function of the seed.
            done: steps to measure.
            progress: where to say it.

        Returns:
            For the metrics, of the first process; nothing in the others.
        """
        patches = int(all_reduce_sum(torch.tensor(self.measured)))
        if rank() != 0:
            return {}
        mean_patches = (patches + sum(self._patches_of(step) for step in range(begin))) / (done * self.settings.batch)
        flops = self.speed.flops(mean_patches)
        progress.say(
            f"mean cost of an image over the first {done} steps: {flops / 1e9:.6g} GFLOPs "
            f"(3 × 2 × {flops / 6e9:.6g} GMACs), {mean_patches:.2f} patches"
        )
        return {
            "measured_steps": done,
            "measured_patches_per_image": mean_patches,
            "training_gflops_per_image": flops / 1e9,
        }

    def _patches_of(self, step: int) -> int:
        """Return the number of patches of global batch ``step``; of tokens for LlamaGen."""
        if isinstance(self.model, LlamaGen):
            return self.settings.batch * self.model.config.n_tokens
        starts = self.objective.artifact.gather(*self.data.order.batch(step), entropy=False).starts
        assert starts is not None  # check_compatible has refused artifacts without boundaries
        return int(starts.sum())

    def validate(self, done: int) -> None:
        """Log held-out bits per token, of the averaged weights too, and draw a sheet of samples, if requested."""
        began = time.monotonic()
        held_out = {"validation_bits_per_token": self._held_out()} if self.objective.validation else {}
        with self.average.in_place_of(self.model) if self.average else contextlib.nullcontext():
            if self.average is not None and self.objective.validation:
                held_out["ema_validation_bits_per_token"] = self._held_out()
            if self.objective.painter is not None:
                model = _unsharded(self.model, self.device) if self.sharded else self.model
                if rank() == 0:
                    self.objective.painter.draw(model, self.run.sheets / f"step-{done:08d}.png")
        if held_out and rank() == 0:
            self.log(done, **held_out)
        barrier()
        self.spoke += time.monotonic() - began  # no step's time

    def _held_out(self) -> float:
        assert self.objective.validation is not None
        bits = shared_bits_per_token(
            self.model,
            self.objective.validation,
            batch=self.micro,
            precision=self.settings.precision,
            unconditional=self.objective.unconditional,
        )
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # it keeps its outermost weights gathered for a backward pass, which does not follow
        return bits

    def save(self, done: int) -> None:
        """Start saving a checkpoint, and with it the weights in ``model/``."""
        notes = {"skipped": self.skipped, "in_a_row": self.in_a_row}
        self.checkpoints.save(done, self.state, publish=self._publish, notes=notes)

    def _publish(self, checkpoint: Path) -> None:
        values = dataclasses.asdict(self.model.config)
        for prefix, folder in (("model.", self.run.model), ("ema.", self.run.model_ema)):
            if tensors := load_full_tensors(checkpoint, prefix):
                write_weights(folder, self.model.model_type, values, tensors)


def _open_trackers(run: RunFolder, settings: OptimSettings) -> Trackers:
    here = rank() == 0
    return Trackers(
        run.folder,
        tensorboard=here and settings.tensorboard,
        wandb=here and settings.wandb,
        config=dataclasses.asdict(settings),
    )


def _unsharded(model: DPAR | LlamaGen, device: torch.device) -> DPAR | LlamaGen:
    """Return an unsharded copy of a sharded model; only the first process's has its weights."""
    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    config = model.config
    copy = DPAR(config) if isinstance(config, DPARConfig) else LlamaGen(config)
    if rank() == 0:
        copy.load_state_dict(tensors)
    return copy.to(device)
