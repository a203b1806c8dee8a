"""Command-line options derived from settings: one option per field, ``--config``, and help in sections.

parameters = option_parameters(TrainSettings)          # by name, for the signature of a Typer command
settings = build_settings(TrainSettings, values)       # from the values that Typer parsed
"""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.settings.fields import GROUPS
from shards.files import open_regular
from shards.storage import Url, location


class Command(TyperCommand):
    """A command whose help lists its options in sections, the required ones first, and ends with examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options, section by section."""
        sections: dict[str, list[tuple[str, str]]] = {
            name: [] for name in ("Arguments", "Required", *GROUPS, "Options")
        }
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
        """Write the examples, one per line."""
        write_examples(self.epilog, formatter)


class Commands(TyperGroup):
    """All commands, with examples at the end of their help."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, one per line."""
        write_examples(self.epilog, formatter)


def write_examples(examples: str | None, formatter: Any) -> None:
    """Write lines of examples as the last section of a help text."""
    with formatter.section("Examples"):
        for example in (examples or "").splitlines():
            formatter.write(" " * formatter.current_indent + example + "\n")


def option_parameters(settings_class: type[Any]) -> dict[str, inspect.Parameter]:
    """Return an option for each field of a settings class, and ``--config``."""
    hints = typing.get_type_hints(settings_class, include_extras=True)
    parameters = {}
    for field in dataclasses.fields(settings_class):
        kind, *notes = typing.get_args(hints[field.name])
        repeatable = typing.get_origin(kind) is tuple
        parser = parser_of(kind)
        if parser is not None:
            kind = str if field.default is dataclasses.MISSING else str | None
        if repeatable:  # the help text states the default
            kind = list[typing.get_args(kind)[0]] | None  # type: ignore[misc]
        required = field.default is dataclasses.MISSING
        default = inspect.Parameter.empty if required else None if repeatable else field.default
        texts = [note for note in notes if isinstance(note, str)]
        shown = not (repeatable or default is None)
        metavar = None if parser is None else "<path>"
        option = typer.Option(
            help=texts[0], rich_help_panel=texts[-1], show_default=shown, parser=parser, metavar=metavar
        )
        parameters[field.name] = _parameter(field.name, default, Annotated[kind, option])
    config = typer.Option(
        help="TOML file with any of these options; flags take precedence.",
        is_eager=True,
        callback=read_config,
        parser=local_path,
        metavar="<path>",
    )
    parameters["config"] = _parameter("config", None, Annotated[str | None, config])
    return parameters


def parser_of(kind: Any) -> Callable[[str], Any] | None:
    """Return the parser of an option of this type, if it is a path or the location of an artifact."""
    kinds = set(typing.get_args(kind)) or {kind}
    return location if Url in kinds else local_path if Path in kinds else None


def local_argument(metavar: str, help: str) -> Any:
    """Return Typer's description of an argument that is a path on this machine."""
    return typer.Argument(metavar=metavar, help=help, parser=local_path)


def local_path(text: str) -> Path:
    """Return a path on this machine.

    Raises:
        typer.BadParameter: it is a URL.
    """
    if isinstance(place := location(text), Path):
        return place
    raise typer.BadParameter(f"{text} is a URL; only a path on this machine is possible here")


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Use a TOML file's values as this command's defaults.

    Raises:
        typer.BadParameter: the file cannot be read, or has a name that is not an option of the command.
    """
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
            raise typer.BadParameter(
                f"{path} has {key!r}, which is not an option of {context.command.name}; "
                + _suggestion(key, [name for name in known if name])
            )
    context.default_map = {**(context.default_map or {}), **named}
    return path


def _suggestion(key: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def build_settings(settings_class: type[Any], values: dict[str, Any]) -> Any:
    """Return the settings for parsed options; omitted options keep their defaults.

    Raises:
        StageError: a value is invalid.
    """
    given = {}
    for field in dataclasses.fields(settings_class):
        value = values[field.name]
        if isinstance(value, list):
            value = tuple(value)
        if (value is None and field.default is not dataclasses.MISSING) or (value == () and field.default != ()):
            continue
        given[field.name] = value
    return settings_class(**given)
