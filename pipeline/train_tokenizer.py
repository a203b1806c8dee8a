"""``dpar train-tokenizer DATA OUT``: train a VQ tokenizer of LlamaGen's architecture on your own images.

train_tokenizer("photos/", Path("vq"), TrainTokenizerSettings(steps=2000))
tokenizer = VQTokenizer.from_pretrained("vq/model")
"""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dpar.presets import tokenizer_preset
from dpar.pretrained import write_weights
from dpar.tokenizer import VQConfig, VQTokenizer, from_uint8
from dpar.vqgan import LossWeights, VQLoss, restart_unused
from pipeline.runs.checkpoints import Checkpoints, TrainState, load_full_tensors
from pipeline.runs.run_folder import RunFolder
from pipeline.runtime.device import autocast, choose_device, world_size
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress, Stopped, stop_between_steps, stops_with
from pipeline.settings.fields import identity
from pipeline.settings.training import TrainTokenizerSettings
from pipeline.sources import IndexedSource, UnusableImage, open_indexed
from pipeline.sources.decode import budget
from pipeline.training.schedule import learning_rate
from shards.order import TrainingOrder

LARGEST_ZOOM = 1.2  # short side before the random crop, as a multiple of the crop
LOG_EVERY = 25
WEIGHTS = "model.tokenizer."  # prefix of the tokenizer's tensors in a checkpoint


def train_tokenizer(data: str, out: Path, settings: TrainTokenizerSettings, progress: Progress | None = None) -> Path:
    """Train a tokenizer on ``data`` and return the directory of its weights, ``out/model``.

    Running it again resumes from the newest checkpoint; the number of steps may be increased.

    Raises:
        StageError, ModelError: data, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    if world_size() > 1:
        raise StageError("`dpar train-tokenizer` trains in one process; start it without torchrun")
    overrides = {} if settings.codebook_size is None else {"codebook_size": settings.codebook_size}
    config = tokenizer_preset(settings.model, **overrides)
    factor = config.downsampling
    if settings.image_size % factor:
        raise StageError(f"--image-size is {settings.image_size}; {settings.model} needs a multiple of {factor}")
    source = open_indexed(data, split=settings.split, classes=settings.classes)
    inputs = {"data": data, "source": source.describe()}
    with RunFolder(out, "tokenizer", identity(settings), inputs, steps=settings.steps) as run:
        return _fit(config, source, run, settings, progress)


def _fit(
    config: VQConfig, source: IndexedSource, run: RunFolder, settings: TrainTokenizerSettings, progress: Progress
) -> Path:
    def publish(checkpoint: Path) -> None:
        write_weights(
            run.model, VQTokenizer.model_type, dataclasses.asdict(config), load_full_tensors(checkpoint, WEIGHTS)
        )

    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    model = VQTokenizer(config).to(device)  # not channels_last: its group norms are slow on CPU
    loss = VQLoss(_loss_weights(settings)).to(device)
    optimizers = _optimizers(model, loss, settings.lr)
    optimizer = optimizers["optimizer"]
    trained = _Trained(model, loss).to(device)
    used = trained.used
    state = TrainState(trained, optimizers.values())
    crops = RandomCrops(source, settings.image_size, settings.batch, settings.seed, settings.workers)
    message = f"Stopped. The newest checkpoint is in {run.checkpoints}; run the same command again to resume from it."
    with (
        stops_with(message),
        progress.task("tokenizer", settings.steps, "steps") as task,
        crops,
        Checkpoints(run.checkpoints) as checkpoints,
        stop_between_steps() as stop_status,
    ):
        begin, _ = checkpoints.restore(state, progress)
        run.forget_metrics_after(begin)
        task.begin_at(begin)
        model.train()
        for step in range(begin, settings.steps):
            rate = learning_rate(step, settings.steps, settings.lr, settings.warmup, "cosine")
            for group in (group for o in optimizers.values() for group in o.param_groups):
                group["lr"] = rate
            torch.manual_seed(settings.seed * 1_000_003 + step)
            pixels = torch.from_numpy(crops.batch(step)).to(device)
            images = from_uint8(pixels).contiguous()
            adversarial = loss.discriminator is not None and step >= settings.adversarial_start
            with autocast(device, settings.precision):
                latent = model.latent(images)
                quantised = model.quantize(latent)
                reconstruction = model.decode_latent(quantised.latent)
                total, parts = loss(images, reconstruction, quantised, adversarial)
            if not torch.isfinite(total):
                raise StageError(f"the loss is not finite at step {step}; lower --lr (it is {settings.lr})")
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if adversarial:
                optimizers["discriminator_optimizer"].zero_grad(set_to_none=True)
                with autocast(device, settings.precision):
                    discriminator_loss = loss.discriminator_loss(images, reconstruction)
                discriminator_loss.backward()
                optimizers["discriminator_optimizer"].step()
            used += torch.bincount(quantised.codes.flatten(), minlength=config.codebook_size)
            done = step + 1
            if done % LOG_EVERY == 0 or done == settings.steps:  # before a restart clears the counts
                values = {name: part.item() for name, part in parts.items()}
                run.log(step=done, loss=total.item(), lr=rate, codes_used=int((used > 0).sum()), **values)
            if settings.restart_every and done % settings.restart_every == 0:
                if done <= settings.steps // 2:
                    generator = torch.Generator().manual_seed(settings.seed + done)
                    restart_unused(model.quantize, used, latent, generator)
                used.zero_()
            status = stop_status()  # read once: the save and the message below must agree
            if done % settings.checkpoint_every == 0 or done == settings.steps or status:
                checkpoints.save(done, state, publish)
            task.advance(1, f"loss {total.item():.4f}, PSNR {_psnr(parts['reconstruction'].item()):.1f} dB")
            if status and done < settings.steps:
                checkpoints.finish()
                raise Stopped(
                    f"Stopped. Step {done} is saved in {run.folder}; run the same command again to resume.", status
                )
        checkpoints.finish()
    if settings.weights_dtype == "bf16":
        model.save_pretrained(run.model, dtype=torch.bfloat16)
    progress.say(f"weights: {run.model}")
    return run.model


def _loss_weights(settings: TrainTokenizerSettings) -> LossWeights:
    return LossWeights(
        commitment=settings.commitment_weight,
        entropy=settings.entropy_weight,
        perceptual=settings.perceptual_weight,
        adversarial=settings.adversarial_weight,
    )


def _optimizers(model: VQTokenizer, loss: VQLoss, lr: float) -> dict[str, torch.optim.Optimizer]:
    optimizers: dict[str, torch.optim.Optimizer] = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    }
    if loss.discriminator is not None:
        optimizers["discriminator_optimizer"] = torch.optim.Adam(
            loss.discriminator.parameters(), lr=lr, betas=(0.5, 0.9)
        )
    return optimizers


class _Trained(torch.nn.Module):
    """The contents of a checkpoint: the tokenizer, the discriminator if there is one, and counts of codes."""

    used: torch.Tensor  # (V,) how often each code was chosen since the last restart

    def __init__(self, model: VQTokenizer, loss: VQLoss) -> None:
        super().__init__()
        self.tokenizer = model
        self.discriminator = loss.discriminator
        self.register_buffer("used", torch.zeros(model.config.codebook_size))


class RandomCrops:
    """Batches of random crops, half of them mirrored; a function of (seed, step). Threads prefetch the next batch."""

    def __init__(self, source: IndexedSource, size: int, batch: int, seed: int, workers: int) -> None:
        self.source, self.size, self.seed = source, size, seed
        self.order = TrainingOrder(rows=len(source), views=1, batch=batch, seed=seed)
        self._pool = ThreadPoolExecutor(workers)
        self._prefetched: dict[int, list[Future[NDArray[np.uint8]]]] = {}

    def __enter__(self) -> RandomCrops:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, step: int) -> NDArray[np.uint8]:
        """Return the crops of step ``step``: (batch, size, size, 3) uint8."""
        for wanted in (step, step + 1):
            if wanted not in self._prefetched:
                rows, _ = self.order.batch(wanted)
                self._prefetched[wanted] = [
                    self._pool.submit(self._crop, int(row), wanted, place) for place, row in enumerate(rows)
                ]
        return np.stack([future.result() for future in self._prefetched.pop(step)])

    def _crop(self, row: int, step: int, place: int) -> NDArray[np.uint8]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, step * 65_536 + place]))
        for i in range(len(self.source)):
            try:
                with budget.in_use():
                    return random_crop(self.source.load((row + i) % len(self.source)), self.size, rng)
            except UnusableImage:
                continue  # the next usable image replaces it
        raise StageError("none of the images can be used; `dpar tokenize` lists the reasons")


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a (size, size, 3) uint8 crop at a random place and scale, mirrored half of the time."""
    short = round(size * rng.uniform(1.0, LARGEST_ZOOM))
    scale = short / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    left, top = rng.integers(width - size + 1), rng.integers(height - size + 1)
    crop = np.asarray(resized.crop((int(left), int(top), int(left) + size, int(top) + size)))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _psnr(mean_squared_error: float) -> float:
    return 10 * math.log10(4.0 / max(mean_squared_error, 1e-10))  # pixels span -1..1
