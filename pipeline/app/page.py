"""The page, with three tabs: Generate samples images, Patchify shows an image's patches, Edit resamples a part.

page = build(model, folder)                                  # gr.Blocks; folder is for files to download
page.launch(**LAUNCH)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from dpar.image_pipeline import PatchedImage
from pipeline.app.controls import Sampling, failure, image_examples, note, titled_image
from pipeline.app.drawing import (
    MOST_IMAGES,
    edit,
    generate,
    mask_of_layers,
    measured_pictures,
    place_patches,
)
from pipeline.app.examples import write_examples
from pipeline.app.jobs import Cancelled, Jobs
from pipeline.app.model import Model
from pipeline.app.pictures import Picture
from pipeline.app.results import Results, Updates

CSS = """
.note small { display: block; font-size: var(--text-sm); opacity: 0.8; }
.error { color: var(--error-text-color); border: 1px solid var(--error-border-color);
  background: var(--error-background-fill); border-radius: var(--radius-md); padding: 0.5rem 0.75rem; }
.pictures .grid-wrap { min-height: 0 !important; }
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) !important; }
.pictures .thumbnail-item { height: auto; aspect-ratio: auto; }
.pictures .thumbnail-item > img { height: auto; }
.pictures .caption-label { position: static; max-width: 100%; border: 0; white-space: normal;
  font-size: var(--text-xs); opacity: 1 !important; }
.threshold input[type="number"] { width: 7rem; }
"""
FONTS = ("system-ui", "sans-serif")  # nothing is fetched: the page works without a network
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Default(primary_hue="indigo", font=FONTS, font_mono=("ui-monospace", "monospace")),
    "css": CSS,
    "footer_links": [],
    "run_history": False,
    "share": False,
    "show_error": True,
    "max_file_size": "50mb",
    "enable_monitoring": False,
}
MODEL_EVENT: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # one job at a time
REDRAW: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
ROWS, MASK = "Keep the top rows", "Draw the part to sample"
DAY = 24 * 60 * 60  # seconds


def build(model: Model, folder: Path) -> gr.Blocks:
    """Lay out the page; files written to ``folder``, which exists, are served."""
    jobs = Jobs()
    examples = write_examples(model.pipe.class_names, folder)
    with gr.Blocks(title="DPAR", analytics_enabled=False, delete_cache=(DAY, DAY)) as page:
        gr.Markdown(f"# DPAR\n{model.title}")
        with gr.Tab("Generate"):
            _generate_tab(model, jobs, folder)
        with gr.Tab("Patchify"):
            _patchify_tab(model, jobs, examples)
        with gr.Tab("Edit"):
            _edit_tab(model, jobs, folder, examples)

        def left(request: gr.Request) -> None:
            jobs.stop(_session(request))

        page.unload(left)
    page.queue(max_size=64)
    return page


def _generate_tab(model: Model, jobs: Jobs, folder: Path) -> None:
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            classes = gr.Dropdown(_choices(model), value=[0], multiselect=True, label="Classes")
            per_class = gr.Slider(1, 16, 4, step=1, label="Pictures per class", info=f"At most {MOST_IMAGES} in all")
            sampling = Sampling(model)
            with gr.Row():
                run = gr.Button("Generate", variant="primary", min_width=120)
                cancel = gr.Button("Cancel", min_width=120)
        with gr.Column(scale=8, min_width=300):
            results = Results(model, folder)

    def sample(progress: Any, labels: list[int], per_class: int, *values: Any) -> Sampled:
        choices = sampling.choices(*values)
        return generate(model, labels, per_class, choices, progress), choices.cfg_scale != 1, ""

    _wire(jobs, results, run, cancel, [classes, per_class, *sampling.inputs], sample)


def _edit_tab(model: Model, jobs: Jobs, folder: Path, examples: list[Path]) -> None:
    rows = model.pipe.grid[0]
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            editor = gr.ImageEditor(
                label="Image",
                show_label=False,
                type="pil",
                sources=("upload", "clipboard"),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=48, colors=["#e0218a"], color_mode="fixed"),
                canvas_size=(512, 512),
                buttons=[],
            )
            image_examples(examples, editor)
            mode = gr.Radio([ROWS, MASK], value=ROWS, label="Part to keep")
            keep_rows = gr.Slider(0, rows - 1, rows // 2, step=1, label="Rows of tokens to keep, from the top")
            label = gr.Dropdown(_choices(model), value=0, label="Class of the sampled part")
            count = gr.Slider(1, 16, 4, step=1, label="Pictures")
            sampling = Sampling(model)
            with gr.Row():
                run = gr.Button("Edit", variant="primary", min_width=120)
                cancel = gr.Button("Cancel", min_width=120)
        with gr.Column(scale=7, min_width=300):
            results = Results(model, folder)
    mode.change(
        lambda chosen: gr.Slider(visible=chosen == ROWS), mode, keep_rows, api_visibility="private", queue=False
    )

    def sample(
        progress: Any, drawing: dict[str, Any] | None, mode: str, kept: int, label: int, count: int, *values: Any
    ) -> Sampled:
        image: Image.Image | None = None if drawing is None else drawing["background"]
        mask = None
        if image is not None and mode == MASK:
            mask = mask_of_layers((drawing or {})["layers"], image.size)
        choices = sampling.choices(*values)
        pictures = edit(
            model,
            image,
            label,
            count,
            choices,
            mask=mask,
            keep_rows=kept if mask is None else None,
            progress=progress,
        )
        kept_tokens = pictures[0].settings["kept_tokens"]
        return pictures, choices.cfg_scale != 1, f"{kept_tokens} of {model.tokens} tokens kept, "

    _wire(jobs, results, run, cancel, [editor, mode, keep_rows, label, count, *sampling.inputs], sample)


def _patchify_tab(model: Model, jobs: Jobs, examples: list[Path]) -> None:
    if model.pipe.entropy_model is None:
        gr.Markdown("This model does not patch by entropy: it is a LlamaGen, or was trained on static patches.")
        return
    rule = model.pipe.rule
    assert rule is not None  # models with an entropy model have one
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            image = gr.Image(
                label="Image",
                show_label=False,
                type="pil",
                image_mode=None,
                sources=["upload", "clipboard"],
                height=280,
                buttons=[],
            )
            image_examples(examples, image)
            threshold = gr.Slider(
                0,
                model.highest_threshold,
                model.threshold,
                step=0.01,
                label="Threshold, nats",
                info="A higher entropy starts a patch",
                buttons=["reset"],
                elem_classes="threshold",
            )
            limit = gr.Slider(
                0,
                max(16, rule.max_length or 0),
                rule.max_length or 0,
                step=1,
                label="Most tokens in a patch",
                info="0 is no limit",
                buttons=["reset"],
            )
            row_reset = gr.Checkbox(rule.row_reset, label="Each row starts a patch")
        with gr.Column(scale=9, min_width=300):
            status = gr.HTML(note("Pick an image, or upload one."), show_label=False)
            with gr.Row():
                decoded = titled_image("Reconstruction", scale=20)
                patches = titled_image("Patches", scale=20)
                entropy = titled_image("Entropy of each token", scale=23)
    measured, settings = gr.State(None), list[Any]([threshold, limit, row_reset])

    def place(measured: PatchedImage | None, *values: Any) -> Updates:
        if measured is None:
            return {status: gr.skip()}
        try:
            placed = place_patches(model, measured, *values)
        except Exception as error:  # any failure becomes a message on the page
            return {status: failure(error)}
        return {
            patches: placed.picture,
            status: note(f"{placed.patches} patches", *model.patches_text(placed.patches, None)),
        }

    def measure(request: gr.Request, picture: Image.Image | None, *values: Any) -> Updates:
        empty = {patches: None, entropy: None, decoded: None, measured: None}
        if picture is None:
            return {**empty, status: note("Pick an image, or upload one.")}
        try:
            result = jobs.run(_session(request), lambda _: model.pipe.patchify(picture))
        except Exception as error:  # as above
            return {**empty, status: failure(error)}
        reconstruction, map_of_entropy = measured_pictures(model.pipe, result)
        return {decoded: reconstruction, entropy: map_of_entropy, measured: result, **place(result, *values)}

    image.change(
        measure,
        [image, *settings],
        [status, patches, entropy, decoded, measured],
        api_name="patchify",
        show_progress_on=patches,
        **MODEL_EVENT,
    )
    for control in settings:
        control.change(place, [measured, *settings], [status, patches], api_visibility="private", **REDRAW)


Sampled = tuple[list[Picture], bool, str]  # pictures, whether with guidance, and a sentence about them


def _wire(
    jobs: Jobs,
    results: Results,
    run: gr.Button,
    cancel: gr.Button,
    inputs: list[Any],
    sample: Callable[..., Sampled],
) -> None:
    """Make ``run`` sample and show the results, and ``cancel`` stop it."""

    def work(request: gr.Request, progress: gr.Progress = gr.Progress(), *values: Any) -> Updates:  # noqa: B008
        patches, *others = values
        try:
            pictures, guided, sentence = jobs.run(
                _session(request),
                lambda report: sample(report, *others),
                lambda share: progress(share, desc="Sampling"),
            )
        except Cancelled:
            return {results.status: note("Stopped.")}
        except Exception as error:  # any failure becomes a message on the page
            return {results.status: failure(error)}
        return results.show(pictures, patches, guided, sentence)

    def stop(request: gr.Request) -> str:
        jobs.stop(_session(request))
        return note("Stopped.")

    event = run.click(
        work,
        [results.draw, *inputs],
        results.outputs,
        api_name=run.value.lower(),
        show_progress_on=results.gallery,
        **MODEL_EVENT,
    )
    cancel.click(stop, None, results.status, cancels=[event], queue=False, api_visibility="private")


def _choices(model: Model) -> list[tuple[str, int]]:
    return [(name, label) for label, name in enumerate(model.pipe.class_names)]


def _session(request: gr.Request) -> str:
    return request.session_hash or ""
