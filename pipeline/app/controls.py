"""Controls that tabs share, and messages about results and errors.

sampling = Sampling(model)                               # places the sliders
run.click(work, [image, *sampling.inputs], ...)          # work(image, *values): sampling.choices(*values)
note("133 patches", "31 % saved"), failure(error)        # HTML
"""

from __future__ import annotations

import html
import secrets
import traceback
from pathlib import Path

import gradio as gr

from dpar.errors import ModelError
from pipeline.app.drawing import Choices
from pipeline.app.model import Model
from pipeline.runtime.errors import StageError
from pipeline.settings.fields import LARGEST
from shards.errors import ArtifactError


class Sampling:
    """How images are drawn: guidance, temperature, top-k and top-p, threshold, seed."""

    def __init__(self, model: Model) -> None:
        threshold = model.threshold if model.by_entropy else 0.0
        new_seed = gr.Button("New seed")
        self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST, buttons=[new_seed])
        guidance = gr.Slider(1, 10, 2.0, step=0.1, label="Guidance", info="1 is none", buttons=["reset"])
        limit = gr.Slider(
            0,
            model.highest_threshold,
            threshold,
            step=0.01,
            label="Threshold, nats",
            info="A higher entropy starts a patch",
            visible=model.by_entropy,
            buttons=["reset"],
            elem_classes="threshold",
        )
        with gr.Accordion("Temperature, top-k, top-p", open=False):
            temperature = gr.Slider(0, 2, 1.0, step=0.05, label="Temperature", info="0 takes the likeliest token")
            top_k = gr.Slider(
                0, model.pipe.generator.config.codebook_size, 0, step=1, label="Top-k", info="0 is all tokens"
            )
            top_p = gr.Slider(0.01, 1, 1.0, step=0.01, label="Top-p", info="1 is all tokens")
        self._by_entropy = model.by_entropy
        self.inputs = [guidance, temperature, top_k, top_p, limit, self.seed]
        new_seed.click(lambda: secrets.randbelow(LARGEST + 1), None, self.seed, api_visibility="private", queue=False)

    def choices(
        self, cfg_scale: float, temperature: float, top_k: int, top_p: float, threshold: float, seed: int
    ) -> Choices:
        """Return the choices for these input values.

        Raises:
            StageError: a field is empty.
        """
        return Choices(
            cfg_scale=cfg_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            threshold=threshold if self._by_entropy else None,
            seed=seed,
        )


def image_examples(paths: list[Path], image: gr.Image | gr.ImageEditor) -> None:
    """Add example images for a component."""
    gr.Examples([[str(path)] for path in paths], [image], label="Or pick one", examples_per_page=len(paths))


def titled_image(title: str, scale: int) -> gr.Image:
    """Add an output image with a title above it; Gradio's label would cover a corner of the image."""
    with gr.Column(scale=scale, min_width=240):
        gr.Markdown(f"**{title}**")
        return gr.Image(label=title, show_label=False, interactive=False, buttons=[])


def note(text: str, *details: str) -> str:
    """Return a line about a result, and smaller ones below it, as HTML."""
    small = "".join(f"<small>{html.escape(detail)}</small>" for detail in details)
    return f'<p class="note" role="status"><b>{html.escape(text)}</b>{small}</p>'


def failure(error: Exception) -> str:
    """Return an error message as HTML; print the traceback of an unexpected error on the terminal."""
    if isinstance(error, (StageError, ArtifactError, ModelError)):
        message = str(error)
    else:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error} (a bug in dpar; the terminal has the traceback)"
    return f'<p class="error" role="alert">Error: {html.escape(message)}</p>'
