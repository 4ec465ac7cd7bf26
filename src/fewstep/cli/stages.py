"""Commands for the stages of a build one by one, and for what there is to work with."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Table

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.source import SourceSpec
from fewstep.cli.console import ERR, OUT, print_json, print_paths, progress_bars
from fewstep.cli.options import (
    guidance_option,
    json_option,
    recipe_option,
    source_options,
    steps_option,
    targets_option,
)
from fewstep.pipeline import stages


@click.command()
@source_options
@json_option
def inspect(source: SourceSpec, as_json: bool) -> None:
    """Show what is in SOURCE, or in a bundle."""
    found = stages.inspect(source)
    if as_json:
        print_json(found)
    else:
        for key, value in found.items():
            text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
            OUT.print(f"{key}: {text}", markup=False)
    if found.get("unlisted"):
        Bundle.open(source.uri).refuse_unlisted()


@click.command()
@source_options
@steps_option
@guidance_option
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for contract.json and .pt2 files."
)
def export(source: SourceSpec, steps: tuple[int, ...] | None, guidance: float | None, out: Path) -> None:
    """Trace every component of SOURCE: the first stage of a build."""
    with progress_bars() as progress:
        print_paths(stages.export(source, out, steps=steps, guidance=guidance, progress=progress))


@click.command()
@source_options
@click.option("--steps", type=int, help="Step count; the generator's default unless given.")
@guidance_option
@click.option(
    "--prompts", default="8", show_default=True, metavar="N|FILE", help="How many of its own, or a text file of them."
)
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="Samples of each prompt.")
@click.option("--sampler", default="own", show_default=True, help="Which calls to keep, e.g. uniform, ndtc, tdac.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of noise and choices.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for safetensors shards.")
def calibrate(
    source: SourceSpec,
    steps: int | None,
    guidance: float | None,
    prompts: str,
    seeds: int,
    sampler: str,
    seed: int,
    out: Path,
) -> None:
    """Record network calls of SOURCE on its own trajectory, keyed by step and time; goes on if interrupted."""
    with progress_bars() as progress:
        made = stages.calibrate(
            source,
            out,
            steps=steps,
            guidance=guidance,
            prompts=prompts,
            seeds=seeds,
            sampler=sampler,
            seed=seed,
            progress=progress,
        )
    table = Table("component", "step", "branch", "calls", "prompts", "seeds", "times", title=made.note)
    for row in made.coverage():
        step, times = "" if row.step is None else str(row.step), ", ".join(f"{t:g}" for t in row.timesteps)
        table.add_row(row.component, step, row.branch, str(row.count), str(row.prompts), str(row.seeds), times)
    ERR.print(table)
    print_paths([out / name for name in made.shards])


@click.command()
@source_options
@recipe_option
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Diffusers folder to write.")
def optimize(source: SourceSpec, recipe: str, out: Path) -> None:
    """Apply a recipe's passes to SOURCE and write the result as a diffusers folder."""
    with progress_bars() as progress:
        print_paths(stages.optimize(source, out, recipe=recipe, progress=progress))


@click.command("compile")
@source_options
@targets_option
@recipe_option
@steps_option
@guidance_option
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the artifacts.")
def compile_(
    source: SourceSpec,
    targets: tuple[str, ...],
    recipe: str,
    steps: tuple[int, ...] | None,
    guidance: float | None,
    out: Path,
) -> None:
    """Compile SOURCE without verifying it: artifacts, no bundle."""
    with progress_bars() as progress:
        print_paths(
            stages.compile(
                source, out, targets=targets, recipe=recipe, steps=steps, guidance=guidance, progress=progress
            )
        )
    ERR.print("not verified: `fewstep build` compares the result with PyTorch")


COMMANDS = (inspect, export, calibrate, optimize, compile_)
