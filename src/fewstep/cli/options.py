"""Arguments and options that several commands take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fewstep.bundle.source import Lora, Replacement, SourceSpec
from fewstep.recipe.call_options import parse_options


def parse_steps(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Returns the step counts of a list such as ``1,2,4``; a callback of click."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of step counts such as 1,2,4") from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


def adapter_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that lay something over a source; the command gets them as ``over``, without a URI."""

    @click.option("--lora", "loras", multiple=True, metavar="FILE[=SCALE]", help="LoRA to merge; may be repeated.")
    @click.option("--decoder", metavar="FOLDER", help="Another decoder for the same latents, e.g. a tiny autoencoder.")
    @click.option(
        "--component",
        "components",
        multiple=True,
        metavar="NAME=FILE",
        help="Weights of one component, e.g. unet=FILE.",
    )
    @click.option("--config", metavar="FOLDER", help="Configurations of a single-file checkpoint: a diffusers folder.")
    @click.option("--variant", metavar="NAME", help="Which files of a folder with several of each, e.g. fp16.")
    @click.option(
        "--option",
        "options",
        multiple=True,
        metavar="NAME=VALUE",
        help="Argument of every call of the pipeline, e.g. strength=0.5 or sigmas=[1.0,0.4]; may be repeated.",
    )
    @click.option(
        "--input",
        "inputs",
        multiple=True,
        metavar="NAME",
        help="Image that the pipeline can do without and the bundle takes, e.g. image; may be repeated.",
    )
    @click.option(
        "--keep-safety-checker", is_flag=True, help="Compile the pipeline's safety checker, too (refused yet)."
    )
    @functools.wraps(command)
    def with_adapters(
        *args: Any,
        loras: tuple[str, ...],
        decoder: str | None,
        components: tuple[str, ...],
        config: str | None,
        variant: str | None,
        options: tuple[str, ...],
        inputs: tuple[str, ...],
        keep_safety_checker: bool,
        **kwargs: Any,
    ) -> None:
        over = SourceSpec(
            "",
            tuple(map(Lora.of, loras)),
            decoder,
            tuple(map(Replacement.parse, components)),
            config,
            variant,
            parse_options(options),
            inputs,
            keep_safety_checker,
        )
        command(*args, over=over, **kwargs)

    return with_adapters


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds SOURCE and its adapters; the command gets one `SourceSpec`."""

    @click.argument("source")
    @adapter_options
    @functools.wraps(command)
    def with_source(*args: Any, source: str, over: SourceSpec, **kwargs: Any) -> None:
        command(*args, source=replace(over, uri=source), **kwargs)

    return with_source


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
recipe_option = click.option("--recipe", default="fp32", show_default=True, help="Preset (fp32, fp16) or a TOML file.")
targets_option = click.option(
    "--target", "targets", multiple=True, default=("onnxruntime",), show_default=True, help="Runtime; may be repeated."
)
steps_option = click.option("--steps", callback=parse_steps, help="Step counts that the bundle carries, e.g. 1,2,4.")
guidance_option = click.option("--guidance", type=float, help="Guidance scale.")
runtime_option = click.option("--runtime", help="Which of the bundle's runtimes; its first unless given.")
