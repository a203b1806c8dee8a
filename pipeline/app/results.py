"""Sampled pictures on the page: a gallery, and one at full size with its entropies, settings and file.

results = Results(model, folder)                             # places the components, inside gr.Blocks
run.click(work, inputs, results.outputs)                     # work returns results.show(pictures)
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pipeline.app.controls import note, titled_image
from pipeline.app.drawing import mean_patches
from pipeline.app.model import Model
from pipeline.app.pictures import LARGE, THUMBNAIL, Picture, drawn, entropy_picture, shared_scale, write_png

Updates = dict[Any, Any]  # by component


class Results:
    """The components that show pictures."""

    def __init__(self, model: Model, folder: Path) -> None:
        self._model, self._folder = model, folder
        patches = model.pipe.rule is not None
        self.status = gr.HTML(note("Nothing sampled yet."), show_label=False)
        self.draw = gr.Checkbox(patches, label="Draw the patches", visible=patches, container=False)
        self.gallery = gr.Gallery(
            label="Pictures",
            show_label=False,
            columns=4,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_classes="pictures",
        )
        with gr.Row(visible=False) as self.detail:
            self.image = titled_image("Selected picture", scale=20)
            if model.pipe.entropy_model is None:
                self.entropy = gr.Image(visible=False)
            else:
                self.entropy = titled_image("Entropy of each token", scale=23)
        with gr.Column(visible=False) as self.files:
            self.download = gr.DownloadButton("Download PNG with its settings")
            with gr.Accordion("Settings of this picture", open=False):
                self.settings = gr.JSON(show_label=False, open=True, buttons=["copy"])
        self.pictures = gr.State([])
        self.selected = gr.State(0)
        self.outputs = [
            self.status,
            self.gallery,
            self.detail,
            self.files,
            self.image,
            self.entropy,
            self.download,
            self.settings,
            self.pictures,
            self.selected,
        ]
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.draw.change(self._redraw, [self.pictures, self.selected, self.draw], [self.gallery, self.image], **hidden)
        self.gallery.select(
            self._select,
            [self.pictures, self.draw],
            [self.selected, self.image, self.entropy, self.download, self.settings],
            **hidden,
        )

    def show(self, pictures: list[Picture], patches: bool, guided: bool, more: str = "") -> Updates:
        """Return the outputs for new pictures, with the first selected."""
        mean = mean_patches(pictures)
        return {
            self.status: note(f"{more}{mean:.1f} patches per image", *self._model.patches_text(mean, guided)),
            self.gallery: gr.Gallery(_gallery(pictures, patches), selected_index=0),
            self.detail: gr.Row(visible=True),
            self.files: gr.Column(visible=True),
            **self._details(pictures, 0, patches),
            self.pictures: pictures,
            self.selected: 0,
        }

    def _details(self, pictures: Sequence[Picture], index: int, patches: bool) -> Updates:
        picture = pictures[index]
        path = write_png(picture, Path(tempfile.mkdtemp(dir=self._folder)))
        return {
            self.image: drawn(picture, patches, LARGE),
            self.entropy: entropy_picture(picture, shared_scale(pictures)),
            self.download: gr.DownloadButton(value=path),
            self.settings: picture.settings,
        }

    def _select(self, pictures: list[Picture], patches: bool, chosen: gr.SelectData) -> Updates:
        return {self.selected: chosen.index, **self._details(pictures, chosen.index, patches)}

    def _redraw(self, pictures: list[Picture], selected: int, patches: bool) -> Updates:
        if not pictures:
            return {self.gallery: gr.skip()}
        return {
            self.gallery: _gallery(pictures, patches),
            self.image: drawn(pictures[selected], patches, LARGE),
        }


def _gallery(pictures: Sequence[Picture], patches: bool) -> list[tuple[Any, str]]:
    return [(drawn(picture, patches, THUMBNAIL), picture.caption) for picture in pictures]
