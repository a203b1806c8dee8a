"""The command line: parses, calls a stage, renders what it gives. No logic lives here.

    dpar tokenize | entropy | patchify | train | eval        the five stages, in order
    dpar train-tokenizer | sample | probe | inspect | convert | flops | demo   what people need around them

Options and their headings come from the stages' settings (``pipeline/settings/``); ``--config FILE.toml`` takes
the same names.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C, 75 stopped training on SIGTERM or SIGUSR1.
``DPAR_DEBUG=1`` shows tracebacks.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
import tomllib
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from dpar.errors import ModelError
from pipeline.runtime.errors import StageError, claim_error_report
from pipeline.runtime.terminal import Terminal
from pipeline.settings.artifacts import InspectSettings, PatchifySettings, TokenizeSettings
from pipeline.settings.fields import GROUPS, OUTPUT
from pipeline.settings.models import ConvertSettings, FlopsSettings, ProbeSettings
from pipeline.settings.sampling import EvalSettings, ExportSettings, SampleSettings
from pipeline.settings.training import EntropySettings, TrainSettings, TrainTokenizerSettings
from shards.errors import ArtifactError
from shards.files import open_regular

if TYPE_CHECKING:
    from shards.manifest import Manifest

EXAMPLES = {
    "dpar": ("dpar demo", "dpar tokenize photos codes --tokenizer vq --image-size 128"),
    "tokenize": (
        "dpar tokenize photos codes --tokenizer vq --holdout 0.05",
        "torchrun --nproc-per-node 8 -m dpar tokenize imagenet codes --tokenizer vq",
    ),
    "entropy": (
        "dpar entropy codes entropy --model llamagen-tiny --steps 1000 --batch 32",
        "dpar entropy codes entropy --from-llamagen c2i_B_256.pt",
    ),
    "patchify": (
        "dpar patchify codes patches --entropy-model entropy --target-length 1.81",
        "dpar patchify patches longer --target-length 2.5 --max-length 8",
    ),
    "train": (
        "dpar train patches run --model dpar-tiny --steps 2000 --batch 32",
        "torchrun --nproc-per-node 8 -m dpar train patches run --model dpar-b",
    ),
    "eval": (
        "dpar eval run scores --reference patches-holdout --samples 1000",
        "dpar eval run scores --reference patches-holdout --cfg-scale 1.5 --cfg-scale 2",
    ),
    "train-tokenizer": (
        "dpar train-tokenizer photos vq --image-size 128 --steps 2000",
        "dpar train-tokenizer photos vq --model vq-16 --image-size 256 --steps 50000",
    ),
    "sample": (
        "dpar sample run pictures --cfg-scale 2 --per-class 8 --show-patches",
        "dpar sample run below --image cup.png --keep-rows 8 --classes coffee",
    ),
    "probe": (
        "dpar probe run probed --train patches --test patches-holdout",
        "dpar probe run probed --train patches --test patches-holdout --layer 4",
    ),
    "inspect": (
        "dpar inspect patches --out look --images 16",
        "dpar inspect patches --images 0 --verify",
    ),
    "convert": (
        "dpar convert c2i_B_256.pt c2i-b",
        "dpar convert run c2i-b --push-to you/c2i-b",
    ),
    "export": (
        "dpar export run bundle",
        "dpar export run bundle --push-to you/dpar-photos",
    ),
    "flops": (
        "dpar flops --model dpar-b --model llamagen-b --image-size 256",
        "dpar flops --entropy-model llamagen-xs --markdown",
    ),
    "demo": ("dpar demo", "dpar demo look --tiny"),
}


class Command(TyperCommand):
    """A command whose help lists its options under headings, those that must be given first, and ends in examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options, section by section."""
        headings = ("Arguments", "Required", *GROUPS, "Options")
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in headings}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            heading = getattr(parameter, "rich_help_panel", None) or "Options"
            if parameter.param_type_name == "argument":
                heading = "Arguments"
            elif parameter.required:
                heading = "Required"
            sections[heading].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, a line each."""
        write_examples(formatter, str(self.name))


class Commands(TyperGroup):
    """All commands."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, a line each."""
        write_examples(formatter, "dpar")


def write_examples(formatter: Any, command: str) -> None:
    """Write the examples of a command as the last section of its help."""
    with formatter.section("Examples"):
        for example in EXAMPLES[command]:
            formatter.write(" " * formatter.current_indent + example + "\n")


app = typer.Typer(
    name="dpar",
    help="Dynamic patchification for autoregressive image generation: images to codes to patches to pictures.",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables have no room for the text in 80 columns, and load for a quarter of a second
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
console = Terminal()
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
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; running again goes on with it.")]


def stage(settings_class: type[Any] | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function whose ``settings`` become one option a field, with errors in one line."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        options = {} if settings_class is None else settings_parameters(settings_class)
        parameters = [p for name, p in own.parameters.items() if name != "settings"] + list(options.values())

        @functools.wraps(command)
        def run(**values: Any) -> None:
            chosen = {name: values.pop(name) for name in options if name != "config"}
            values.pop("config", None)
            with readable_errors():
                if settings_class is not None:
                    values["settings"] = build_settings(settings_class, chosen)
                command(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def settings_parameters(settings_class: type[Any]) -> dict[str, inspect.Parameter]:
    """An option for each field of a settings class, and ``--config``."""
    hints = typing.get_type_hints(settings_class, include_extras=True)
    found = {}
    for field in dataclasses.fields(settings_class):
        kind, *notes = typing.get_args(hints[field.name])
        several = typing.get_origin(kind) is tuple
        if several:  # repeatable; the help says what stands without it
            kind = list[typing.get_args(kind)[0]] | None  # type: ignore[misc]
        required = field.default is dataclasses.MISSING
        default = inspect.Parameter.empty if required else None if several else field.default
        shown = not (several or default is None)
        texts = [note for note in notes if isinstance(note, str)]
        option = typer.Option(help=texts[0], rich_help_panel=texts[-1], show_default=shown)
        found[field.name] = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )
    config = typer.Option(help="TOML file with any of these options; flags win.", is_eager=True, callback=read_config)
    found["config"] = inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, config]
    )
    return found


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Takes a TOML file's values as this command's defaults; refuses names that it has no option for."""
    if path is None:
        return None
    try:
        with open_regular(path) as file:
            values = tomllib.loads(file.read().decode("utf-8"))
    except RecursionError:
        raise typer.BadParameter(f"{path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:  # not UTF-8, not TOML, or a number of thousands of digits
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    known = [p.name for p in context.command.params if p.name not in (None, "config", "help")]
    named = {key.replace("-", "_"): value for key, value in values.items()}
    for key in named:
        if key not in known:
            from difflib import get_close_matches

            near = get_close_matches(key, [name for name in known if name], n=1)
            raise typer.BadParameter(
                f"{path} has {key!r}, which is no option of {context.command.name}"
                + (
                    f"; did you mean {near[0]!r}?"
                    if near
                    else f"; there are {', '.join(name for name in known if name)}"
                )
            )
    context.default_map = {**(context.default_map or {}), **named}
    return path


def build_settings(settings_class: type[Any], chosen: dict[str, Any]) -> Any:
    """The settings; what they refuse is wrong usage (exit status 2)."""
    given = {}
    for field in dataclasses.fields(settings_class):
        value = chosen[field.name]
        if isinstance(value, list):
            value = tuple(value)
        if (value is None and field.default is not dataclasses.MISSING) or (value == () and field.default != ()):
            continue
        given[field.name] = value
    try:
        return settings_class(**given)
    except StageError as error:
        if not claim_error_report(error):
            raise typer.Exit(2) from None
        fail(str(error), 2)


class readable_errors:
    """Turns what a stage raises into one message and an exit status."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        from pipeline.runtime.progress import Stopped

        if error is None or isinstance(error, (typer.Exit, typer.Abort, SystemExit)) or os.environ.get("DPAR_DEBUG"):
            return
        if isinstance(error, Stopped):
            if not first_process():  # all of them stopped at the same step; one says so
                raise typer.Exit(error.status)
            fail(str(error), error.status, lead="")
        if isinstance(error, (Exception, KeyboardInterrupt)) and not claim_error_report(error):
            raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 1)
        if isinstance(error, (StageError, ArtifactError, ModelError)):
            fail(str(error), 1)
        if isinstance(error, KeyboardInterrupt):
            fail("Stopped. What was finished is kept; run the same command again to go on.", 130, lead="")
        if isinstance(error, OSError):
            where = f": {error.filename}" if error.filename else ""
            fail(f"{error.strerror or error}{where}. What was finished is kept; run the same command again to go on", 1)
        if isinstance(error, Exception) and type(error).__module__.startswith(("typer", "click")):
            return  # wrong usage; Typer says it itself
        if isinstance(error, Exception):
            fail(f"{type(error).__name__}: {error} (a fault of dpar itself; DPAR_DEBUG=1 shows where)", 1)


def fail(message: str, status: int, lead: str = "Error: ") -> typing.NoReturn:
    """Prints one message on standard error and ends with this status."""
    errors.print(f"[bold red]{lead}[/]{escape(message)}" if lead else escape(message), soft_wrap=True, highlight=False)
    raise typer.Exit(status)


def first_process() -> bool:
    """Whether this process speaks for all that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def show_version(asked: bool) -> None:
    """Prints the version and ends."""
    if asked:
        from pipeline.runtime.provenance import made_by

        made = made_by()
        commit = f" ({made['git']})" if "git" in made else ""
        print(f"dpar {made.get('dpar', 'not installed')}{commit}")  # noqa: T201
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Options of ``dpar`` itself."""


@app.command(cls=Command)
@stage(TokenizeSettings)
def tokenize(data: Data, out: Out, settings: TokenizeSettings) -> None:
    """Images to codes: the first stage."""
    from pipeline.tokenize import tokenize as run

    summary(run(data, out, settings), out)


@app.command(cls=Command)
@stage(EntropySettings)
def entropy(
    codes: Annotated[Path, typer.Argument(metavar="CODES", help="What `dpar tokenize` made.")],
    out: Out,
    settings: EntropySettings,
) -> None:
    """Train the entropy model: the second stage. Or take it from a LlamaGen."""
    from pipeline.train import train_entropy

    show_metrics(train_entropy(codes, out, settings))


@app.command(cls=Command)
@stage(PatchifySettings)
def patchify(
    codes: Annotated[Path, typer.Argument(metavar="CODES", help="Codes; or patches, to move their boundaries.")],
    out: Out,
    settings: PatchifySettings,
) -> None:
    """Entropies and patch boundaries: the third stage."""
    if settings.compare is not None:
        from pipeline.boundary_agreement import compare, lines

        said = lines(compare(codes, out, settings))
        if first_process():
            console.print("\n".join(said), markup=False, highlight=False, soft_wrap=True)
        return
    from pipeline.patchify import patchify as run

    summary(run(codes, out, settings), out)


@app.command(cls=Command)
@stage(TrainSettings)
def train(
    patches: Annotated[Path, typer.Argument(metavar="PATCHES", help="What `dpar patchify` made.")],
    out: Out,
    settings: TrainSettings,
) -> None:
    """Train DPAR, or LlamaGen beside it: the fourth stage."""
    from pipeline.train import train as run

    show_metrics(run(patches, out, settings))


@app.command(cls=Command, name="eval")
@stage(EvalSettings)
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What `dpar train` made, or a LlamaGen's weights.")],
    out: Out,
    settings: EvalSettings,
) -> None:
    """Sample from a run and score it: the fifth stage."""
    from pipeline.evaluate import evaluate as score
    from pipeline.scoring.results import markdown

    results = score(run, out, settings)
    if first_process():
        console.print(markdown(results), markup=False, highlight=False, soft_wrap=True)
        console.print(f"results: {out / 'results.json'}", markup=False, highlight=False)


@app.command(cls=Command, name="train-tokenizer")
@stage(TrainTokenizerSettings)
def train_tokenizer(data: Data, out: Out, settings: TrainTokenizerSettings) -> None:
    """Train a VQ tokenizer on your own images. Its architecture is LlamaGen's."""
    from pipeline.train_tokenizer import train_tokenizer as run

    run(data, out, settings)


@app.command(cls=Command)
@stage(SampleSettings)
def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What `dpar train` made, or a LlamaGen's weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory for the pictures.")],
    settings: SampleSettings,
) -> None:
    """Sample pictures from a run."""
    from pipeline.sample import sample_pictures

    made = sample_pictures(run, out, settings)
    if not first_process():
        return
    console.print(
        f"{made['images']} images, {made['patches_per_image']:.1f} patches per image: {made['sheet']}",
        markup=False,
        highlight=False,
    )


@app.command(cls=Command)
@stage(ProbeSettings)
def probe(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What `dpar train` made, or a LlamaGen's weights.")],
    out: Out,
    settings: ProbeSettings,
) -> None:
    """What a linear classifier can read off a run's features."""
    from pipeline.probe import markdown
    from pipeline.probe import probe as run_probe

    results = run_probe(run, out, settings)
    if first_process():
        console.print(markdown(results), markup=False, highlight=False, soft_wrap=True)
        console.print(f"results: {out / 'probe.json'}", markup=False, highlight=False)


@app.command(cls=Command, name="inspect")
@stage(InspectSettings)
def inspect_artifact(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Codes or patches.")],
    settings: InspectSettings,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for pictures and a page; without it, numbers only.", rich_help_panel=OUTPUT),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Show what is in an artifact. With --out, pictures of images with their patches too."""
    from pipeline.inspect import inspect as look
    from pipeline.reports.inspection import tables

    inspection = look(artifact, out, settings)
    if json:
        console.print_json(data=inspection.to_json())
        return
    for part in tables(inspection):
        table = Table(title=escape(part.caption), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in part.header:
            table.add_column(escape(name))
        for row in part.rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
    if out is not None:
        console.print(f"pictures: {out / 'index.html'}", markup=False, highlight=False)


@app.command(cls=Command)
@stage(ConvertSettings)
def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="LlamaGen's .pt file, or a directory, run or Hub name.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Directory; a name in .pt is a file for LlamaGen's code.")],
    settings: ConvertSettings,
) -> None:
    """Convert LlamaGen's checkpoints. To directories of config.json and model.safetensors, and back."""
    from pipeline.convert import convert as run

    done = run(src, dst, settings)
    lines = [
        done.description,
        f"{done.parameters / 1e6:.1f} M parameters in {done.tensors} tensors, {done.bytes / 1e6:.1f} MB",
        f"{dst}: SHA-256 {done.fingerprint}",
    ]
    lines += [] if done.pushed_to is None else [f"pushed to {done.pushed_to}"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


@app.command(cls=Command)
@stage(ExportSettings)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of `dpar train`.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to write: a bundle, as DPARPipeline loads it.")],
    settings: ExportSettings,
) -> None:
    """Write a run as one bundle to share. Generator, entropy model, tokenizer, patch rule, classes and a model card."""
    from pipeline.export import export as run_stage

    done = run_stage(run, out, settings)
    lines = [f"{done.folder}: {', '.join(done.parts)}, {done.bytes / 1e6:.1f} MB"]
    lines += [] if done.pushed_to is None else [f"pushed to {done.pushed_to}"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


@app.command(cls=Command)
@stage(FlopsSettings)
def flops(
    settings: FlopsSettings,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """What each model costs, beside the paper's figures."""
    from pipeline.flops import HEADER, NOTES, cost_table, table, tables

    rows = cost_table(settings)
    if json:
        console.print_json(data=[row.as_dict() for row in rows])
        return
    if markdown:
        rule = ("---", *["---:"] * (len(HEADER) - 1))
        console.print("\n".join(map(_markdown_row, [HEADER, rule, *table(rows)])), markup=False, soft_wrap=True)
    else:
        for part in tables(rows):
            grid = Table(title=part.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
            for i, name in enumerate(part.header):
                grid.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
            for line in part.lines:
                grid.add_row(*line)
            console.print(grid)
    console.print(("\n" if markdown else "") + NOTES, markup=False, highlight=False, soft_wrap=markdown)


@app.command(cls=Command)
@stage()
def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory for everything it makes.")] = Path("demo"),
    tiny: Annotated[bool, typer.Option("--tiny", help="A minute's worth, to see that everything works.")] = False,
) -> None:
    """Run all stages on photographs. In minutes, on those that ship with scikit-image; ends with a report."""
    from pipeline.demo import demo as run

    report = run(out, run_command=in_this_process, tiny=tiny)
    console.print(f"The report and its pictures are in {out}: open {report}", markup=False, highlight=False)


def in_this_process(arguments: list[str]) -> None:
    """Runs one ``dpar`` command as the command line would, without starting Python again."""
    try:
        status = app(arguments, standalone_mode=False)
    except typer.Exit as ended:  # its message is printed already
        status = ended.exit_code
    if status:
        raise typer.Exit(status)


def summary(manifest: Manifest | None, out: Path) -> None:
    """A few lines about an artifact that was written; a stage that leaves it to other processes has said so."""
    if manifest is None or not first_process():
        return
    lines = [f"{manifest.rows} images, {manifest.views} views each, {len(manifest.class_names)} classes: {out}"]
    if manifest.kind == "patches":
        from shards.patch_statistics import summary as patch_summary

        lines += patch_summary(manifest.statistics)
    if manifest.left_out and manifest.kind == "codes":  # the reasons stay with the codes
        lines.append(f"{manifest.left_out} left out; {out / 'left_out.tsv'} has the reasons")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def show_metrics(metrics: dict[str, Any]) -> None:
    """The last metrics of a run."""
    if not first_process():
        return
    names = {
        "step": "step",
        "bits_per_token": "bits/token",
        "validation_bits_per_token": "held-out bits/token",
        "training_gflops_per_image": "training GFLOPs/image",
    }
    shown = [f"{text} {metrics[name]:.6g}" for name, text in names.items() if name in metrics]
    if shown:
        console.print(", ".join(shown), markup=False, highlight=False)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """The entry point of the ``dpar`` command."""
    sys.exit(app(prog_name="dpar"))


if __name__ == "__main__":
    main()
