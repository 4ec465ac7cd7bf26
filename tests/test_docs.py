"""What the documentation shows is so: commands parse, recipes load, links lead somewhere, names exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest

import fewstep
from fewstep import cli
from fewstep.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "apps").glob("*/README.md")]
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
    code = "".join(f.read_text("utf-8") for folder in ("export", "runtimes") for f in (ROOT / folder).glob("*.py"))
    # A message may be wrapped in the source, and holds values where the page has an ellipsis.
    code = re.sub(r'"\s+f?"', "", code).replace("{DENOISER}", "denoiser")
    for phrase in re.findall(r"`([^`]+)`", "".join(cells)):
        for part in re.split(r" ?\.\.\.,? ?", phrase):
            assert part in code, phrase
