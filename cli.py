"""The command line: parses, calls a stage, renders what it returns. No logic lives here.

    dpar tokenize | entropy | patchify | train | eval        the five stages, in order
    dpar train-tokenizer | sample | app | probe | inspect | convert | export | flops | demo      around them

Options and their headings come from the stages' settings (``pipeline/settings/``); ``--config FILE.toml`` takes
the same names.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C, 75 stopped training on SIGTERM or SIGUSR1.
``DPAR_DEBUG=1`` shows tracebacks.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pipeline.runtime.errors import KEPT, StageError, claim_error_report, one_message
from pipeline.runtime.terminal import Terminal, grid
from pipeline.settings.app import AppSettings
from pipeline.settings.artifacts import InspectSettings, PatchifySettings, TokenizeSettings
from pipeline.settings.examples import EXAMPLES
from pipeline.settings.fields import OUTPUT
from pipeline.settings.models import ConvertSettings, FlopsSettings, ProbeSettings
from pipeline.settings.options import Command, Commands, build_settings, local_argument, local_path, option_parameters
from pipeline.settings.sampling import EvalSettings, ExportSettings, SampleSettings
from pipeline.settings.training import EntropySettings, TrainSettings, TrainTokenizerSettings
from shards.storage import location

if TYPE_CHECKING:
    from shards.manifest import Manifest

app = typer.Typer(
    name="dpar",
    help="Dynamic patchification for autoregressive image generation: images to codes to patches to pictures.",
    cls=Commands,
    epilog="\n".join(EXAMPLES["dpar"]),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables are too narrow for the text in 80 columns, and take 0.25 s to load
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
console = Terminal(quiet=os.environ.get("RANK", "0") != "0")  # only the first process of torchrun prints
errors = Terminal(stderr=True)

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Images: a folder of class folders, a tar of them or ImageNet's own, WebDataset tars (glob, {000..146}, "
        "folder or URL), Parquet or Arrow files, a saved dataset, owner/name on the Hub, builtin:photos or "
        "builtin:emoji.",
    ),
]
Out = Annotated[Path, local_argument("OUT", "Directory to write; running again resumes.")]
OutArtifact = Annotated[str, typer.Argument(metavar="OUT", help="Directory or URL to write; running again resumes.")]
Codes = Annotated[str, typer.Argument(metavar="CODES", help="Output of `dpar tokenize`; a directory or URL.")]
Run = Annotated[Path, local_argument("RUN", "Output of `dpar train`, or weights of a LlamaGen.")]


def command(name: str, settings_class: type[Any] | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function into a command: its ``settings`` become one option per field, its errors one message."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters
        options = {} if settings_class is None else option_parameters(settings_class)
        parameters = [*(p for p in own.values() if p.name != "settings"), *options.values()]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            chosen = {name: values.pop(name) for name in options}
            with readable_errors():
                if settings_class is not None:
                    values["settings"] = checked_settings(settings_class, chosen)
                function(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, cls=Command, epilog="\n".join(EXAMPLES[name]))(run)
        return function

    return decorate


def checked_settings(settings_class: type[Any], values: dict[str, Any]) -> Any:
    """Return the settings; invalid values are wrong usage (exit status 2)."""
    try:
        return build_settings(settings_class, values)
    except StageError as error:
        if not claim_error_report(error):
            raise typer.Exit(2) from None
        fail(str(error), 2)


class readable_errors:
    """Turns an exception of a stage into one message and an exit status."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        from pipeline.runtime.progress import Stopped

        if error is None or isinstance(error, (typer.Exit, typer.Abort, SystemExit)) or os.environ.get("DPAR_DEBUG"):
            return
        if isinstance(error, Stopped):
            if console.quiet:  # all processes stop at the same step, and the first reports it
                raise typer.Exit(error.status)
            fail(str(error), error.status, lead="")
        if isinstance(error, (Exception, KeyboardInterrupt)) and not claim_error_report(error):
            raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 1)
        if isinstance(error, KeyboardInterrupt):
            fail(f"Stopped. {KEPT}.", 130, lead="")
        if type(error).__module__.startswith(("typer", "click")):
            return  # wrong usage, which Typer reports
        if isinstance(error, Exception):
            fail(one_message(error), 1)


def fail(message: str, status: int, lead: str = "Error: ") -> typing.NoReturn:
    """Print one message on standard error and exit with this status."""
    errors.print(f"[bold red]{lead}[/]{escape(message)}" if lead else escape(message), soft_wrap=True, highlight=False)
    raise typer.Exit(status)


def show_version(asked: bool) -> None:
    """Print the version and exit."""
    if asked:
        from pipeline.runtime.provenance import made_by

        versions = made_by()
        commit = f" ({versions['git']})" if "git" in versions else ""
        print(f"dpar {versions.get('dpar', 'not installed')}{commit}")  # noqa: T201
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Options of ``dpar`` itself."""


@command("tokenize", TokenizeSettings)
def tokenize(data: Data, out: OutArtifact, settings: TokenizeSettings) -> None:
    """Images to codes: the first stage."""
    from pipeline.tokenize import tokenize as run

    summary(run(data, location(out), settings), out)


@command("entropy", EntropySettings)
def entropy(codes: Codes, out: Out, settings: EntropySettings) -> None:
    """Train the entropy model: the second stage. Or take it from a LlamaGen."""
    from pipeline.train import train_entropy

    show_metrics(train_entropy(location(codes), out, settings))


@command("patchify", PatchifySettings)
def patchify(
    codes: Annotated[
        str, typer.Argument(metavar="CODES", help="Codes; or patches, to move their boundaries. A directory or URL.")
    ],
    out: OutArtifact,
    settings: PatchifySettings,
) -> None:
    """Codes to entropies and patch boundaries: the third stage."""
    if settings.compare is not None:
        from pipeline.boundary_agreement import compare, lines

        show(*lines(compare(location(codes), local_path(out), settings)))
        return
    from pipeline.patchify import patchify as run

    summary(run(location(codes), location(out), settings), out)


@command("train", TrainSettings)
def train(
    patches: Annotated[str, typer.Argument(metavar="PATCHES", help="Output of `dpar patchify`; a directory or URL.")],
    out: Out,
    settings: TrainSettings,
) -> None:
    """Train DPAR or the LlamaGen baseline: the fourth stage."""
    from pipeline.train import train as run

    show_metrics(run(location(patches), out, settings))


@command("eval", EvalSettings)
def evaluate(run: Run, out: Out, settings: EvalSettings) -> None:
    """Sample from a run and score it: the fifth stage."""
    from pipeline.evaluate import evaluate as score
    from pipeline.scoring.results import markdown

    show(markdown(score(run, out, settings)), f"results: {out / 'results.json'}")


@command("train-tokenizer", TrainTokenizerSettings)
def train_tokenizer(data: Data, out: Out, settings: TrainTokenizerSettings) -> None:
    """Train a VQ tokenizer on your own images. Its architecture is LlamaGen's."""
    from pipeline.train_tokenizer import train_tokenizer as run

    run(data, out, settings)


@command("sample", SampleSettings)
def sample(
    run: Run,
    out: Annotated[Path, local_argument("OUT", "Directory for the pictures.")],
    settings: SampleSettings,
) -> None:
    """Sample pictures from a run."""
    from pipeline.sample import sample_pictures

    done = sample_pictures(run, out, settings)
    show(f"{done['images']} images, {done['patches_per_image']:.1f} patches per image: {done['sheet']}")


@command("app", AppSettings)
def serve_app(
    settings: AppSettings,
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A bundle, a run of `dpar train`, or owner/name on the Hub.")
    ] = "builtin:emoji",
) -> None:
    """Sample, patchify and edit in the browser. A local page; it needs the extra app."""
    from pipeline.app.serve import serve

    serve(model, settings, lambda address: show(f"The page is at {address}\nCtrl-C stops it."))


@command("probe", ProbeSettings)
def probe(run: Run, out: Out, settings: ProbeSettings) -> None:
    """Train a linear classifier on a run's features."""
    from pipeline.probe import markdown
    from pipeline.probe import probe as run_probe

    show(markdown(run_probe(run, out, settings)), f"results: {out / 'probe.json'}")


@command("inspect", InspectSettings)
def inspect_artifact(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="Codes or patches; a directory or URL.")],
    settings: InspectSettings,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for pictures and a page; without it, numbers only.",
            rich_help_panel=OUTPUT,
            parser=local_path,
            metavar="<path>",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Show the contents of an artifact. With --out, also draw images with their patches."""
    from pipeline.inspect import inspect as look
    from pipeline.reports.inspection import tables

    inspection = look(location(artifact), out, settings)
    if json:
        console.print_json(data=inspection.to_json())
        return
    for part in tables(inspection):
        console.print(grid(part.caption, part.header, part.rows))
    if out is not None:
        show(f"pictures: {out / 'index.html'}")


@command("convert", ConvertSettings)
def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="LlamaGen's .pt file, or a directory, run or Hub name.")],
    dst: Annotated[Path, local_argument("DST", "Directory; a name in .pt is a file for LlamaGen's code.")],
    settings: ConvertSettings,
) -> None:
    """Convert LlamaGen's checkpoints. To directories of config.json and model.safetensors, and back."""
    from pipeline.convert import convert as run

    done = run(src, dst, settings)
    show(
        done.description,
        f"{done.parameters / 1e6:.1f} M parameters in {done.tensors} tensors, {done.bytes / 1e6:.1f} MB",
        f"{dst}: SHA-256 {done.fingerprint}",
        *([] if done.pushed_to is None else [f"pushed to {done.pushed_to}"]),
    )


@command("export", ExportSettings)
def export(
    run: Annotated[Path, local_argument("RUN", "A run of `dpar train`.")],
    out: Annotated[Path, local_argument("DIR", "Directory to write: a bundle, as DPARPipeline loads it.")],
    settings: ExportSettings,
) -> None:
    """Write a run as one bundle to share. Generator, entropy model, tokenizer, patch rule, classes and a model card."""
    from pipeline.export import export as run_stage

    done = run_stage(run, out, settings)
    show(
        f"{done.folder}: {', '.join(done.parts)}, {done.bytes / 1e6:.1f} MB",
        *([] if done.pushed_to is None else [f"pushed to {done.pushed_to}"]),
    )


@command("flops", FlopsSettings)
def flops(
    settings: FlopsSettings,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Print the cost of each model and the paper's figures."""
    from pipeline.flops import NOTES, cost_table, tables
    from pipeline.flops import markdown as markdown_table

    rows = cost_table(settings)
    if json:
        console.print_json(data=[row.as_dict() for row in rows])
    elif markdown:
        show(markdown_table(rows), NOTES)
    else:
        for part in tables(rows):
            console.print(grid(part.title, part.header, part.lines, numbers=True))
        console.print(NOTES, markup=False, highlight=False)


@command("demo")
def demo(
    out: Annotated[Path, local_argument("OUT", "Directory for all outputs.")] = Path("demo"),
    tiny: Annotated[bool, typer.Option("--tiny", help="Take one minute, to check that everything works.")] = False,
) -> None:
    """Run all stages on the built-in emoji. It takes a few minutes and ends with a report."""
    from pipeline.demo import demo as run

    report = run(out, run_command=in_this_process, tiny=tiny)
    show(f"The report and its pictures are in {out}: open {report}")


def in_this_process(arguments: list[str]) -> None:
    """Run one ``dpar`` command as the command line would, without starting Python again."""
    try:
        status = app(arguments, standalone_mode=False)
    except typer.Exit as ended:  # its message is printed already
        status = ended.exit_code
    if status:
        raise typer.Exit(status)


def show(*lines: str) -> None:
    """Print lines without markup or wrapping."""
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def summary(manifest: Manifest | None, out: str) -> None:
    """Print a summary of an artifact; nothing for None, as other processes finish and report that one."""
    if manifest is None:
        return
    lines = [f"{manifest.rows} images, {manifest.views} views each, {len(manifest.class_names)} classes: {out}"]
    if manifest.kind == "patches":
        from shards.patch_statistics import summary as patch_summary

        lines += patch_summary(manifest.statistics)
    if manifest.left_out and manifest.kind == "codes":  # the reasons stay with the codes
        lines.append(f"{manifest.left_out} left out; {os.path.join(out, 'left_out.tsv')} has the reasons")
    show(*lines)


def show_metrics(metrics: dict[str, Any]) -> None:
    """Print the last metrics of a run."""
    names = {
        "step": "step",
        "bits_per_token": "bits/token",
        "validation_bits_per_token": "held-out bits/token",
        "training_gflops_per_image": "training GFLOPs/image",
    }
    if parts := [f"{text} {metrics[name]:.6g}" for name, text in names.items() if name in metrics]:
        show(", ".join(parts))


def main() -> None:
    """The entry point of the ``dpar`` command."""
    sys.exit(app(prog_name="dpar"))


if __name__ == "__main__":
    main()
