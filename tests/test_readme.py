"""The code accepts all commands in README.md and docs/."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.main import get_command

import cli
from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig, PatchRule, VQConfig, VQTokenizer, fingerprint
from dpar.bundle import Bundle, Part

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS: dict[str, Any] = get_command(cli.app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[list[str]]:
    """Return the words of each ``dpar`` command in the page's shell blocks, including those after ``torchrun … -m``."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[line.index("dpar") :] for line in lines if "dpar" in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_has_options_that_exist_and_values_of_their_type(page: Path) -> None:
    for name, *words in (line[1:] for line in command_lines(page)):
        COMMANDS[name].make_context(name, words)  # raises for wrong usage


def test_the_readme_has_command_lines_to_check() -> None:
    names = {line[1] for line in command_lines(ROOT / "README.md")}
    assert {"train-tokenizer", "tokenize", "entropy", "patchify", "train", "eval", "sample"} <= names
    first = next(line for line in command_lines(ROOT / "README.md") if line[1] in ("train-tokenizer", "tokenize"))
    assert first[1] == "train-tokenizer"  # before users encode their own images


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    for code in re.findall(r"`dpar ([^`]+)`", page.read_text(encoding="utf-8")):
        name, *words = code.split()
        assert name in COMMANDS or name in ("COMMAND", "--version"), code
        if name in COMMANDS:
            options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
            options |= {option for parameter in COMMANDS[name].params for option in parameter.secondary_opts}
            assert {word for word in words if word.startswith("--")} <= options | {"--help"}, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_readme_is_short_and_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
    code = "\n".join(blocks(ROOT / "README.md", "python"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"codebook_size": 64, "grid_height": 16, "grid_width": 16, "width": 32, "heads": 2}
    vq = VQConfig(
        codebook_size=64, channels=32, channel_multipliers=(1, 1, 1, 1), residual_blocks=1, latent_channels=32
    )
    models: dict[str, Any] = {
        "vq": VQTokenizer(vq),
        "entropy": LlamaGen(LlamaGenConfig(**sizes, layers=1, classes=0)),
        "run": DPAR(DPARConfig(**sizes, classes=2, patch_layers=1, decoder_layers=1)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name / "model")
        (tmp_path / name / "run.json").write_text(json.dumps({"kind": name}))
    parts: dict[Part, str] = {"generator": "run", "entropy_model": "entropy", "tokenizer": "vq"}
    for part, name in parts.items():
        models[name].save_pretrained(tmp_path / "bundle" / part)
    origins = {part: fingerprint(tmp_path / "bundle" / part) for part in parts}
    Bundle(class_names=("cat", "dog"), parts=origins, rule=PatchRule(threshold=4.0)).write(tmp_path / "bundle")
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.new("RGB", (140, 150), (200, 10, 10)).save(tmp_path / "photos" / "cat" / "1.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 256, 64)
    assert Image.open(tmp_path / "picture.png").size == (128, 128)
    assert len(names["pictures"]) == 8
    assert names["patched"].starts.shape == (16, 16)
