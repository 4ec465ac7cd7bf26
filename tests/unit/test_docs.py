"""What the documentation shows is so: commands parse, recipes load, links lead somewhere, names exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest

import fewstep
from fewstep import cli
from fewstep.optimize.quantize import ComponentPlan
from fewstep.optimize.quantize.decisions import OUTERMOST_SHARE, SMALLEST_WEIGHT
from fewstep.recipe.quantization import FLOAT_BITS, RANGES, ROUNDINGS
from fewstep.recipe.recipe import PRESETS, parse_recipe
from fewstep.recipe.target_profiles import PROFILES
from fewstep.runtimes.parity.quantized import BELOW_FLOOR_DB, EQUAL_SHARE, MEAN_DB, OUTPUT_SQNR_DB

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "apps").glob("*/README.md"),
    ]
)


def commands() -> list[tuple[str, str]]:
    lines = [(page, line) for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    return [(page.name, line.removeprefix("$ ")) for page, line in lines if line.startswith("$ fewstep ")]


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value)
def test_command_parses(page: str, line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = cli.cli.commands[name]
    with command.make_context(name, arguments, resilient_parsing=False) as context:
        assert isinstance(context, click.Context)


def test_every_command_is_documented() -> None:
    shown = {shlex.split(line)[1] for _, line in commands()}
    assert set(cli.cli.commands) <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_recipe_of_the_page_loads() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert parse_recipe(tomllib.loads(block), where="recipes.md", name="page").weights == "fp16"


def test_quantization_page_shows_what_the_code_does() -> None:
    text = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    q = parse_recipe(tomllib.loads(block), where="quantization.md", name="page").quantization
    assert q is not None
    assert q.at("linear", "denoiser/x").weights == 4
    assert q.at("conv2d", "decoder/x").weights == FLOAT_BITS
    for comment, known in (("ranges", RANGES), ("rounding", ROUNDINGS), ("profile", PROFILES)):
        line = next(line for line in block.splitlines() if line.startswith(comment))
        assert set(known) <= set(re.findall(r"\w+", line.partition("#")[2])), comment
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (\d+) dB \|$", text, re.MULTILINE)
    quantizing = {name: preset for name, preset in PRESETS.items() if preset.quantization is not None}
    assert dict(rows) == {name: f"{preset.limits.compression_psnr_db:.0f}" for name, preset in quantizing.items()}
    for number in (f"fewer than {SMALLEST_WEIGHT} values", f"at most {OUTERMOST_SHARE:.0%}".replace("%", " %"),
                   f"{EQUAL_SHARE:.1%}".replace("%", " %"), f"no more than {BELOW_FLOOR_DB:.0f} dB",
                   f"within {MEAN_DB} dB", f"at {OUTPUT_SQNR_DB:.0f} dB"):  # fmt: skip
        assert number in " ".join(text.split()), number
    keys = re.findall(r"^\| `(\w+)` \| [a-z]", text.partition("## Reading the plan")[2], re.MULTILINE)
    assert set(keys) == {f.name for f in dataclasses.fields(ComponentPlan)}


def test_presets_of_the_recipes_page() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (\d+) dB \|$", text, re.MULTILINE)
    assert dict(rows) == {name: f"{preset.limits.compression_psnr_db:.0f}" for name, preset in PRESETS.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_page_compiles(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, page.name, "exec")


def test_loop_of_the_page_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "any-generator.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Generator.assemble" in b]
    (tmp_path / "my_module.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    bundle = fewstep.build("my_module:make", out=tmp_path / "jumps", options=options)
    assert bundle.manifest.schedules[2].times == {"s": (0.5, 0.0)}
    assert bundle.generate(seed=7, inputs={"class_label": np.array([3])}).output.shape == (16, 16, 3)


def test_refusals_of_the_page_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "any-generator.md").read_text(encoding="utf-8")
    table = text.partition("## What is refused")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    code = "".join(f.read_text("utf-8") for folder in ("export", "runtimes") for f in (ROOT / folder).rglob("*.py"))
    # A message may be wrapped in the source, and holds values where the page has an ellipsis.
    code = re.sub(r'"\s+f?"', "", code).replace("{DENOISER}", "denoiser")
    for phrase in re.findall(r"`([^`]+)`", "".join(cells)):
        for part in re.split(r" ?\.\.\.,? ?", phrase):
            assert part in code, phrase


def test_tests_of_the_parity_page_exist() -> None:
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = text.partition("| kind of difference |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [re.findall(r"`([^`]+)`", row.rsplit("|", 2)[1]) for row in rows]
    assert len(cells) > 10
    assert all(cells), "each kind of difference has a test"
    for named in cells:
        file, function = "", ""
        for name in named:
            path, _, rest = name.rpartition("::")
            function = rest.partition("[")[0] or function
            file = path or (file if rest.startswith("[") else "integration/test_user_calls.py")
            code = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"\ndef {function}(" in code, name
            case = rest.partition("[")[2].removesuffix("]")
            assert not case or f'id="{case}"' in code, name


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_paths_of_the_page_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:src|runtimes|export|optimize|calibration|tests|apps|docs|benchmarks)/[\w./-]*)`", text)
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
