"""The command line. Results go to stdout, progress and errors to stderr; exit 0 fine, 1 parity, 2 anything else."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

import fewstep
from fewstep import app as web
from fewstep import listing, media, stages
from fewstep.devices import read_device_report
from fewstep.errors import FewstepError, RuntimeMissingError
from fewstep.inputs import example_inputs
from fewstep.progress import Advance, Progress
from fewstep.quantization import parse_size, with_budget
from fewstep.recipe import FORMS, load_recipe
from fewstep.runtimes import RUNTIMES, get_runtime
from fewstep.runtimes.executors import EXECUTORS
from fewstep.selftest import self_test
from fewstep.source import Lora, Replacement, SourceSpec

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False)


class _Bars:
    """Progress as bars on stderr."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars

    def task(self, description: str, total: int) -> Advance:
        """Returns a call that moves the task's bar on by one."""
        task = self._bars.add_task(description, total=total)
        return lambda: self._bars.advance(task)


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with RichProgress(*columns, console=_err) as bars:
        yield _Bars(bars)


def main() -> NoReturn:
    """Runs the command line and exits with its status."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, for their developers; `python -W` brings them back
    try:
        cli.main(standalone_mode=False)
    except FewstepError as error:
        # Not through rich's markup: messages hold [1, 4, 16, 16] and paths.
        _err.print("error:", style="bold red", end=" ")
        _err.print(str(error), markup=False, soft_wrap=True)
        sys.exit(error.exit_status)
    except click.exceptions.Abort:
        _err.print("interrupted; nothing was written, finished stages are cached")
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except OSError as error:
        _err.print("error:", style="bold red", end=" ")
        _err.print(
            f"{error.filename or 'file system'}: {error.strerror}\n\nhint: check the path and its permissions",
            markup=False,
        )
        sys.exit(2)
    sys.exit(0)


def _steps(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of step counts such as 1,2,4") from None


_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


def _adapters(command: Callable[..., None]) -> Callable[..., None]:
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
    @functools.wraps(command)
    def with_adapters(
        *args: Any,
        loras: tuple[str, ...],
        decoder: str | None,
        components: tuple[str, ...],
        config: str | None,
        **kwargs: Any,
    ) -> None:
        over = SourceSpec("", tuple(map(Lora.of, loras)), decoder, tuple(map(Replacement.parse, components)), config)
        command(*args, over=over, **kwargs)

    return with_adapters


def _source(command: Callable[..., None]) -> Callable[..., None]:
    """Adds SOURCE and its adapters; the command gets one `SourceSpec`."""

    @click.argument("source")
    @_adapters
    @functools.wraps(command)
    def with_source(*args: Any, source: str, over: SourceSpec, **kwargs: Any) -> None:
        command(*args, source=replace(over, uri=source), **kwargs)

    return with_source


_bundle = click.argument("bundle", type=click.Path(path_type=Path))
_recipe = click.option("--recipe", default="fp32", show_default=True, help="Preset (fp32, fp16) or a TOML file.")
_targets = click.option(
    "--target", "targets", multiple=True, default=("onnxruntime",), show_default=True, help="Runtime; may be repeated."
)
_counts = click.option("--steps", callback=_steps, help="Step counts that the bundle carries, e.g. 1,2,4.")
_guidance = click.option("--guidance", type=float, help="Guidance scale.")
_runtime = click.option("--runtime", help="Which of the bundle's runtimes; its first unless given.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fewstep.__version__, prog_name="fewstep")
def cli() -> None:
    """Compile few-step generators for devices, with proof.

    SOURCE is a diffusers folder, a single-file checkpoint (with --config), a hub id (owner/name@revision),
    module:function, or stickers, the built-in generator.
    """


@cli.command()
@_source
@_targets
@_recipe
@_counts
@_guidance
@click.option(
    "--shape", metavar="HEIGHTxWIDTH,...", help="Sizes of the pictures in pixels, for instance 512x512,512x768."
)
@click.option("--decoder-tile", type=click.IntRange(1), help="Decode in overlapping tiles of so many pixels to a side.")
@click.option("--bits", type=float, help="Bits of a weight in the mean, scales included; for mixed recipes.")
@click.option("--max-size", metavar="SIZE", help="Size of all components together, such as 12MB; for mixed recipes.")
@click.option("--form", type=click.Choice(FORMS), help="What the loop is compiled for; the steps decide unless given.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the bundle.")
@click.option("--prompts", default=8, show_default=True, help="Prompts to verify with.")
@click.option("--seeds", default=2, show_default=True, help="Seeds for each prompt.")
@click.option(
    "--check-fp16", is_flag=True, help="Look for decoder values beyond fp16, as recipes with fp16 weights do."
)
@_json
def build(
    source: SourceSpec,
    targets: tuple[str, ...],
    recipe: str,
    steps: tuple[int, ...] | None,
    guidance: float | None,
    shape: str | None,
    decoder_tile: int | None,
    bits: float | None,
    max_size: str | None,
    form: str | None,
    out: Path,
    prompts: int,
    seeds: int,
    check_fp16: bool,
    as_json: bool,
) -> None:
    """Build a verified bundle from SOURCE."""
    chosen = load_recipe(recipe)
    most = None if max_size is None else parse_size(max_size, "--max-size")
    budgeted = with_budget(chosen.quantization, f"recipe {chosen.name}", bits=bits, max_bytes=most)
    options = fewstep.Options(prompts=prompts, seeds=seeds, check_fp16=check_fp16)
    with _progress() as progress:
        bundle = fewstep.build(
            source,
            replace(chosen, quantization=budgeted),
            targets,
            out,
            steps=steps,
            guidance=guidance,
            shape=shape,
            decoder_tile=decoder_tile,
            form=form,
            options=options,
            progress=progress,
        )
    if as_json:
        return _print_json({"bundle": str(out), "parity": bundle.manifest.parity})
    _print_parity(bundle.manifest.parity or {}, bundle.manifest.caveats)
    _out.print(f"bundle  {out}", markup=False)
    _out.print(f"report  {out / 'report' / 'index.html'}", markup=False)


@cli.command()
@_bundle
@click.argument("prompt", required=False)
@click.option(
    "--input", "given", multiple=True, metavar="NAME=VALUE", help="File of a picture, or a class; may be repeated."
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@click.option("--steps", type=int, help="Step count; the bundle's default unless given.")
@click.option("--shape", metavar="HEIGHTxWIDTH", help="One of the bundle's shapes; its first unless given.")
@_guidance
@_runtime
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="PNG, WAV, GIF or NPY file.")
@click.option("--rate", type=click.IntRange(1), help="Samples a second of a WAV file; the bundle's unless given.")
@click.option("--grid", is_flag=True, help="Draw the bundle's own prompts as one grid, instead of PROMPT.")
@_json
def generate(
    bundle: Path,
    prompt: str | None,
    given: tuple[str, ...],
    seed: int,
    steps: int | None,
    shape: str | None,
    guidance: float | None,
    runtime: str | None,
    out: Path,
    rate: int | None,
    grid: bool,
    as_json: bool,
) -> None:
    """Draw PROMPT with BUNDLE, or whatever it makes of its inputs."""
    opened = fewstep.Bundle.open(bundle)
    opened = opened if shape is None else opened.shaped(shape)
    contract, prompts = opened.manifest.contract, opened.manifest.prompts
    if not grid:
        prompts = (prompt or "",)
        media.check_output(out, contract.output, rate)
    if contract.takes_text and (prompt is None) != grid:
        raise click.UsageError("give a PROMPT or --grid, and not both")
    if prompt is not None and not contract.takes_text:
        raise click.UsageError("this bundle takes no PROMPT; `fewstep inspect` lists its inputs (contract.inputs)")
    if not contract.takes_text:
        prompts = ("",) * len(prompts)
    inputs = [example_inputs(contract.inputs, i) for i in range(len(prompts))]
    if given or not grid:
        inputs = [media.read_inputs(contract.inputs, given)] * len(prompts)
    with _progress() as progress:
        samples = stages.draw(
            opened, prompts, seed, inputs=inputs, steps=steps, guidance=guidance, runtime=runtime, progress=progress
        )
    if grid:
        media.write_whole(out, media.grid_png(samples))
    else:
        media.write_output(out, samples[0].output, contract.output, rate)
    if as_json:
        kind = "picture" if grid else contract.output.kind
        return _print_json({kind: str(out), "prompts": list(prompts), "seed": seed, "steps": samples[0].steps})
    _out.print(str(out), markup=False)


@cli.command()
@_bundle
@click.option(
    "--against",
    metavar="SOURCE",
    help="Compare with this source instead of the one it was built from; the same for the adapters below.",
)
@_adapters
@_runtime
@click.option("--prompts", default=8, show_default=True)
@click.option("--seeds", default=2, show_default=True)
@click.option("--bisect", is_flag=True, help="If a component fails, name its first departing tensor.")
@click.option(
    "--device-result",
    "device_results",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Result of the app's device check, as one more executor; may be repeated.",
)
@_json
@click.pass_context
def verify(
    context: click.Context,
    bundle: Path,
    against: str | None,
    over: SourceSpec,
    runtime: str | None,
    prompts: int,
    seeds: int,
    bisect: bool,
    device_results: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Compare BUNDLE with PyTorch again, on this machine."""
    opened = fewstep.Bundle.open(bundle)
    devices = [read_device_report(path, opened) for path in device_results]
    given = replace(over, uri=against or "")
    with _progress() as progress:
        result = fewstep.verify(
            opened,
            against=given if given != SourceSpec("") else None,
            runtime=runtime,
            prompts=prompts,
            seeds=seeds,
            bisect=bisect,
            progress=progress,
        )
    departures = {name: None if d is None else d.__dict__ for name, d in result.departures.items()}
    if as_json:
        values = {**result.report.to_json(), "caveats": list(result.caveats), "departures": departures}
        _print_json({**values, "devices": [device.to_json() for device in devices]})
    else:
        _print_parity(result.report.summary(), result.caveats)
        for check in result.report.failures[:10]:
            _out.print(f"failed  {check.where}: {check.metric} {check.value:.1f}, limit {check.limit}", markup=False)
        for component, departure in departures.items():
            _out.print(f"first departure in {component}: {departure or 'none found on this feed'}", markup=False)
        for device in devices:
            _out.print(f"device  {device.report.executor}; {device.picture_ms:.0f} ms a picture", markup=False)
            _print_parity(device.report.summary(), ())
    if not (result.report and all(device.report for device in devices)):
        context.exit(1)


@cli.command()
@_bundle
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write, for any static web host.")
@click.option("--serve", is_flag=True, help="Serve it from here until interrupted.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one.")
@click.option("--lan", is_flag=True, help="Serve the local network, and not this machine alone.")
@click.option("--collect", type=click.Path(path_type=Path), metavar="FOLDER", help="Take results of device checks.")
@click.option("--certificate", type=click.Path(path_type=Path), help="PEM file, for https; with --key.")
@click.option("--key", type=click.Path(path_type=Path), help="PEM file of the certificate's key.")
@click.option("--open", "open_browser", is_flag=True, help="Open it in this machine's browser.")
def app(
    bundle: Path,
    out: Path | None,
    serve: bool,
    port: int,
    lan: bool,
    collect: Path | None,
    certificate: Path | None,
    key: Path | None,
    open_browser: bool,
) -> None:
    """Make a web app of BUNDLE that any phone's browser runs: as a folder (-o), or served (--serve)."""
    if (out is None) != serve:
        raise click.UsageError("give -o FOLDER or --serve, and not both")
    if (certificate is None) != (key is None):
        raise click.UsageError("--certificate and --key belong together")
    opened = fewstep.Bundle.open(bundle)
    site = web.Site.of(opened)
    if out is not None:
        web.write_site(site, out)
        _out.print(str(out), markup=False)
        return
    pair = None if certificate is None or key is None else web.Certificate(certificate, key)
    collector = None if collect is None else web.Collector(opened, collect)
    with web.AppServer(site, port=port, lan=lan, collector=collector, certificate=pair) as server:
        web.run(server, lambda text: _out.print(text, markup=False), open_browser=open_browser)


@cli.command()
@_bundle
@click.option("--steps", type=int, help="Step count; the bundle's default unless given.")
@_runtime
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="ONNX file.")
@_json
def loop(bundle: Path, steps: int | None, runtime: str | None, out: Path, as_json: bool) -> None:
    """Write one ONNX file that samples like BUNDLE: tokens and noise in, picture out."""
    with _progress() as progress:
        made = stages.loop(fewstep.Bundle.open(bundle), out, steps=steps, runtime=runtime, progress=progress)
    if as_json:
        return _print_json({**made.__dict__, "path": str(made.path)})
    _out.print(
        f"{out}  {made.steps} steps, {made.bytes / 1e6:.1f} MB ({made.of_components:.3f} of the components),", end=" "
    )
    _out.print(f"{made.output_psnr_db:.1f} dB of the bundle's picture", markup=False)


@cli.command()
@_bundle
@_runtime
@click.option("--steps", type=int)
@click.option("--runs", type=click.IntRange(3), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads inside an op; the runtime's choice unless given.")
@_json
def profile(
    bundle: Path, runtime: str | None, steps: int | None, runs: int, threads: int | None, as_json: bool
) -> None:
    """Measure BUNDLE: latency per component and whole, peak memory, sizes."""
    measured = fewstep.profile(fewstep.Bundle.open(bundle), runtime=runtime, steps=steps, runs=runs, threads=threads)
    if as_json:
        return _print_json(measured.to_json())
    table = Table(
        "component", "calls", "median ms", "10-90 % ms", "MB", title=f"{measured.runtime}, {measured.steps} steps"
    )
    for row in (*measured.latencies, measured.picture):
        size = measured.sizes_bytes.get(row.component)
        megabytes = "" if size is None else f"{size / 1e6:.1f}"
        table.add_row(
            row.component, str(row.calls), f"{row.median_ms:.1f}", f"{row.low_ms:.1f} to {row.high_ms:.1f}", megabytes
        )
    _out.print(table)
    _out.print(f"peak memory {measured.peak_memory_bytes / 1e6:.0f} MB above the idle process")


@cli.command()
@_source
@_json
def inspect(source: SourceSpec, as_json: bool) -> None:
    """Show what is in SOURCE, or in a bundle."""
    found = stages.inspect(source)
    if as_json:
        return _print_json(found)
    for key, value in found.items():
        text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
        _out.print(f"{key}: {text}", markup=False)


@cli.command()
@click.option("--self-test", "tried", metavar="RUNTIME", help="Compile and run a small generator for it, and compare.")
@_json
@click.pass_context
def runtimes(context: click.Context, tried: str | None, as_json: bool) -> None:
    """Say what can compile or run here and, if not, why and the remedy."""
    if tried is not None:
        with _progress() as progress:
            trials = self_test(tried, progress=progress)
        listing.print_trials(tried, trials, as_json=as_json)
        if any(trial.error for trial in trials):
            context.exit(1)
        state = get_runtime(tried).availability()
        if not state.runs:
            raise RuntimeMissingError(
                f"{tried} itself was not tried: its artifacts were computed by {state.stand_in}. {state.detail}",
                hint=state.remedy,
            )
        return
    listing.print_runtimes(
        [runtime.availability() for runtime in RUNTIMES.values()],
        [executor.state() for executor in EXECUTORS.values()],
        as_json=as_json,
    )


@cli.command()
@_source
@_counts
@_guidance
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for contract.json and .pt2 files."
)
def export(source: SourceSpec, steps: tuple[int, ...] | None, guidance: float | None, out: Path) -> None:
    """Trace every component of SOURCE: the first stage of a build."""
    with _progress() as progress:
        _listed(stages.export(source, out, steps=steps, guidance=guidance, progress=progress))


@cli.command()
@_source
@click.option("--steps", type=int, help="Step count; the generator's default unless given.")
@_guidance
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
    with _progress() as progress:
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
    _err.print(table)
    _listed([out / name for name in made.shards])


@cli.command()
@_source
@_recipe
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Diffusers folder to write.")
def optimize(source: SourceSpec, recipe: str, out: Path) -> None:
    """Apply a recipe's passes to SOURCE and write the result as a diffusers folder."""
    with _progress() as progress:
        _listed(stages.optimize(source, out, recipe=recipe, progress=progress))


@cli.command("compile")
@_source
@_targets
@_recipe
@_counts
@_guidance
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
    with _progress() as progress:
        _listed(
            stages.compile(
                source, out, targets=targets, recipe=recipe, steps=steps, guidance=guidance, progress=progress
            )
        )
    _err.print("not verified: `fewstep build` compares the result with PyTorch")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _print_parity(summary: Mapping[str, Any], caveats: tuple[str, ...]) -> None:
    verdict = "verified" if summary["passed"] else "FAILED"
    _out.print(
        f"{verdict}  {summary['checks']} checks, {summary['failed']} failed, against {summary['reference']}",
        markup=False,
    )
    for level, worst in summary["worst"].items():
        text = (
            f"{worst['metric']} {worst['value']:.1f}"
            if isinstance(worst["value"], float)
            else f"{worst['metric']} {worst['value']}"
        )
        _out.print(
            f"  worst {level}: {text} (limit {worst['limit']}), {worst['component']}, {worst['sample']}", markup=False
        )
    for caveat in caveats:
        _out.print(f"  note: {caveat}", markup=False)


def _listed(paths: list[Path]) -> None:
    for path in paths:
        _out.print(str(path), markup=False)
