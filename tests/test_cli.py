import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cli import app
from dpar import VQConfig, VQTokenizer

ROOT = Path(__file__).parent.parent


def dpar(*arguments: object, status: int = 0, cwd: Path | None = None, **environment: str) -> str:
    """Run the command as a user would and return its output."""
    command = [sys.executable, "-m", "dpar", *(str(a) for a in arguments)]
    env = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=600)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = VQConfig(
        codebook_size=64, channels=32, channel_multipliers=(1, 1, 1), residual_blocks=1, latent_channels=32
    )
    return VQTokenizer(config).save_pretrained(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("ape", "bee", "château d'eau"):
        (root / name).mkdir()
        for i in range(6):
            ramp = np.linspace(0, 255, 40 * 50 * 3).reshape(40, 50, 3)
            noise = rng.normal(0, 40, (40, 50, 3))
            Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)).save(root / name / f"{i} é.png")
    return root


def run_chain(work: Path, pictures: Path, tokenizer: Path, container: str) -> None:
    encode = ("--tokenizer", tokenizer, "--image-size", 32, "--container", container, "--shard-size", 5)
    recipe = ("--steps", 4, "--batch", 6, "--lr", 0.01, "--checkpoint-every", 2)
    dpar("tokenize", pictures, work / "codes", *encode)
    dpar("entropy", work / "codes", work / "entropy", "--model", "llamagen-tiny", *recipe)
    dpar("patchify", work / "codes", work / "patches", "--entropy-model", work / "entropy", "--target-length", 1.5)
    for model in ("dpar", "llamagen"):
        dpar("train", work / "patches", work / model, "--model", f"{model}-tiny", *recipe)
        reference = ("--reference", work / "patches", "--samples", 6, "--cfg-scale", 1.5)
        dpar("eval", work / model, work / f"eval-{model}", *reference)


@pytest.mark.slow
@pytest.mark.parametrize("container", ["arrow", "webdataset"])
def test_the_five_commands_run_from_a_folder_of_images_to_scores(
    tmp_path: Path, pictures: Path, tokenizer: Path, container: str
) -> None:
    run_chain(tmp_path, pictures, tokenizer, container)
    manifest = json.loads((tmp_path / "patches" / "manifest.json").read_text())
    assert manifest["container"] == container
    assert manifest["rows"] == 18
    assert manifest["class_names"] == ["ape", "bee", "château d'eau"]
    for model in ("dpar", "llamagen"):
        results = json.loads((tmp_path / f"eval-{model}" / "results.json").read_text())
        assert 0 < results["bits_per_token"] < 7
        assert results["cells"][0]["samples"] == 6
        assert "FID" not in json.dumps(results)  # the tokenizer's features have another name
        assert Image.open(tmp_path / f"eval-{model}" / "cells" / "cfg-1.5" / "samples.png").size > (100, 100)
    said = dpar("sample", tmp_path / "dpar", tmp_path / "pictures", "--classes", "bee", "--per-class", 2)
    assert "2 images" in said
    assert len(list((tmp_path / "pictures" / "images" / "0001-bee").glob("*.png"))) == 2
    assert "tokens per view" in dpar("inspect", tmp_path / "patches", "--images", 0, "--verify")


def test_a_cli_py_in_the_working_directory_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "cli.py").write_text("raise SystemExit('not this one')")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for before in ([], launcher):
        command = [sys.executable, *before, "-m", "dpar", "flops", "--model", "dpar-b", "--json"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert '"model": "dpar-b"' in done.stdout


def test_help_does_not_import_slow_packages() -> None:
    slow = {"torch", "pyarrow", "numpy.random", "PIL", "rich.markdown"}
    code = (
        f"import sys, cli; cli.app(['--help'], standalone_mode=False); sys.exit(any(m in sys.modules for m in {slow}))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)


def commands() -> dict[str, Any]:
    from typer.main import get_command

    import cli

    return dict(get_command(cli.app).commands)  # type: ignore[attr-defined]


def help_of(command: str) -> str:
    from typer.testing import CliRunner

    import cli

    return CliRunner().invoke(cli.app, [*command.split(), "--help"], env={"COLUMNS": "80"}, prog_name="dpar").output


def test_help_fits_80_columns_and_names_every_option_in_full() -> None:
    for name, command in commands().items():
        lines = help_of(name).splitlines()
        assert max(map(len, lines)) <= 80, name
        listed = {word for line in lines if line.startswith("  --") for word in line.split()}
        assert {option for p in command.params for option in p.opts if option.startswith("--")} <= listed, name
    assert max(map(len, help_of("").splitlines())) <= 80
    assert "..." not in help_of("").split("Commands:")[1]  # one line says what each command does


def test_help_lists_options_under_headings_those_that_must_be_given_first() -> None:
    from pipeline.settings.fields import GROUPS

    for name in commands():
        headings = [line[:-1] for line in help_of(name).splitlines() if line.endswith(":") and line[0] not in " U"]
        known = ["Arguments", "Required", *GROUPS, "Options", "Examples"]
        assert headings == [heading for heading in known if heading in headings], name
        options = help_of(name).split("\nOptions:\n")[1].split("\nExamples:\n")[0]
        ungrouped = {line.split()[0] for line in options.splitlines() if line.startswith("  -")}
        assert ungrouped <= {"--config", "-h,", "--tiny"}, name


def test_help_ends_with_two_valid_examples() -> None:
    from pipeline.settings.examples import EXAMPLES

    assert set(EXAMPLES) == {"dpar", *commands()}
    for name, examples in EXAMPLES.items():
        assert help_of(name if name in commands() else "").rstrip().splitlines()[-2:] == [f"  {e}" for e in examples]
        for example in examples:
            check_command(example)


def check_command(line: str) -> None:
    """Parse a command line of ``dpar``, or of ``torchrun -m dpar``, without running it."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    assert words[0] == "dpar", line
    assert words[1] in commands(), line
    commands()[words[1]].make_context(words[1], words[2:])  # raises for unknown options and values of a wrong type


def test_the_version_is_printed() -> None:
    assert dpar("--version").startswith("dpar ")


def test_every_command_has_help_for_every_option() -> None:
    assert {"tokenize", "entropy", "patchify", "train", "eval"} <= set(commands())
    assert {"train-tokenizer", "sample", "inspect", "flops", "demo"} <= set(commands())
    for name, one in commands().items():
        assert one.help, name
        for parameter in one.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_options_come_from_a_config_file_and_flags_override_it(tmp_path: Path) -> None:
    config = tmp_path / "flops.toml"
    config.write_text('model = ["dpar-b"]\nimage-size = [256]\npatch_length = 2.0\n')
    rows = json.loads(dpar("flops", "--json", "--config", config))
    assert [(row["model"], row["image_size"], row["patches"]) for row in rows] == [("dpar-b", 256, 128.0)]
    rows = json.loads(dpar("flops", "--json", "--config", config, "--patch-length", 4))
    assert [row["patches"] for row in rows] == [64.0]


def test_a_config_file_can_give_a_required_option(tmp_path: Path) -> None:
    config = tmp_path / "tokenize.toml"
    config.write_text('tokenizer = "builtin:nothing"\n')
    assert "builtin:nothing" in dpar("tokenize", "builtin:photos", tmp_path / "out", "--config", config, status=1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("patch_lenght = 2.0\n", "did you mean 'patch_length'"),
        ("patch_length = \n", "cannot be read"),
        ('patch_length = "long"\n', "--patch-length"),
        ("patch_length = " + "[" * 100_000, "it is nested too deeply"),
        ("patch_length = 1" + "0" * 5000, "cannot be read: Exceeds the limit"),
        ("downsampling = 1" + "0" * 30, "--downsampling is a number of too many digits; it must be at most"),
    ],
)
def test_an_invalid_config_file_is_wrong_usage(tmp_path: Path, content: str, says: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(content)
    assert says in " ".join(dpar("flops", "--config", config, status=2).replace("│", "").split())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_config_file_that_is_a_pipe_or_a_device_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.toml")
    for config in (tmp_path / "c.toml", "/dev/zero"):
        found = CliRunner().invoke(app, ["flops", "--config", str(config)], env={"COLUMNS": "200"})
        assert found.exit_code == 2
        assert "not a regular file" in found.output


def test_wrong_input_gets_one_message_and_a_status(tmp_path: Path, pictures: Path, tokenizer: Path) -> None:
    encode = ("--tokenizer", tokenizer, "--image-size", 32)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("do not lose me")
    empty = tmp_path / "empty"
    (empty / "class").mkdir(parents=True)
    cases: list[tuple[int, tuple[object, ...], str]] = [
        (1, ("tokenize", tmp_path / "nowhere", tmp_path / "o", *encode), "no such"),
        (1, ("tokenize", empty, tmp_path / "o", *encode), "no images"),
        (1, ("tokenize", pictures, other, *encode), "holds something else"),
        (1, ("tokenize", pictures, tmp_path / "o", *encode, "--classes", "bea"), "bee"),
        (1, ("tokenize", pictures, tmp_path / "o", "--tokenizer", other), "no config.json"),
        (1, ("tokenize", pictures, tmp_path / "o", "--tokenizer", tokenizer, "--image-size", 33), "multiple of 4"),
        (2, ("tokenize", pictures, tmp_path / "o"), "--tokenizer"),
        (2, ("tokenize", pictures, tmp_path / "o", *encode, "--batch", 0), "--batch is 0"),
        (2, ("tokenize", pictures, tmp_path / "o", *encode, "--device"), "--device"),
        (1, ("train", other, tmp_path / "o"), "manifest.json"),
        (1, ("eval", other, tmp_path / "o", "--reference", other), "run.json"),
        (1, ("sample", other, tmp_path / "o"), "run.json"),
        (2, ("sample", other, tmp_path / "o", "--cfg-scale", 0), "--cfg-scale is 0"),
        (2, ("patchify", other, tmp_path / "o", "--threshold", 1, "--target-length", 2), "give one of"),
        (1, ("flops", "--model", "dpar-bb"), "Did you mean dpar-b?"),
        (1, ("flops", "--patch-length", 1000), "1 to 256"),
    ]
    for status, arguments, says in cases:
        said = dpar(*arguments, status=status)
        assert says in said.replace("\n", " "), f"{arguments}: {said}"
    assert not (tmp_path / "o").exists()
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_the_demo_makes_its_report_from_the_installed_wheel_outside_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    files = zipfile.ZipFile(wheel).namelist()
    assert {f"pipeline/sources/fluent_emoji/{name}" for name in ("emoji.tar", "LICENSE", "README.md")} <= set(files)
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    assert not list(site.glob("cli*"))  # a common name, which the wheel must not install
    where = "import dpar, pipeline, dpar.command.cli as c; print(dpar.__file__, pipeline.__file__, c.__file__)"
    installed = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    used = subprocess.run([sys.executable, "-c", where], check=True, capture_output=True, text=True, env=installed)
    assert all(path.startswith(str(site)) for path in used.stdout.split())
    (tmp_path / "cli.py").write_text("raise SystemExit('not this one')")
    assert "dpar-b" in dpar("flops", cwd=tmp_path, PYTHONPATH=str(site))
    script = [sys.executable, str(site / "bin" / "dpar"), "flops"]
    assert b"dpar-b" in subprocess.run(script, check=True, capture_output=True, cwd=tmp_path, env=installed).stdout
    said = dpar("demo", "out", "--tiny", cwd=tmp_path, PYTHONPATH=str(site), PYTHONSAFEPATH="1")
    report = (tmp_path / "out" / "report.html").read_text()
    assert "bits per token" in report
    assert len(report) < 4_000_000
    assert "://" not in report.replace("http://www.w3.org", "")  # no URLs; base64 has no colon
    for name in (
        "reconstructions-1",
        "patches-shipped",
        "patches-own",
        "shipped-samples",
        "dpar-samples",
        "llamagen-samples",
    ):
        assert (tmp_path / "out" / "pictures" / f"{name}.png").is_file()
    assert "$ dpar train out/patches out/dpar --model dpar-tiny" in said
    assert "report.html" in said
