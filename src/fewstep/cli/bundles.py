"""Commands that make bundles and use them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
from rich.table import Table

import fewstep
from fewstep import app as web
from fewstep import media
from fewstep.bundle import seal
from fewstep.bundle.source import SourceSpec
from fewstep.cli.console import ERR, OUT, print_json, print_parity, progress_bars
from fewstep.cli.options import (
    adapter_options,
    bundle_argument,
    guidance_option,
    json_option,
    recipe_option,
    runtime_option,
    source_options,
    steps_option,
    targets_option,
)
from fewstep.numerics.guidance import guidance_text, unguided_notes
from fewstep.numerics.inputs import example_inputs
from fewstep.pipeline import stages
from fewstep.pipeline.device_checks import read_device_report
from fewstep.pipeline.execution_notes import stand_in_notes
from fewstep.pipeline.replay import MINUTES, replay
from fewstep.recipe.quantization import parse_size, with_budget
from fewstep.recipe.recipe import FORMS, load_recipe


@click.command()
@source_options
@targets_option
@recipe_option
@steps_option
@guidance_option
@click.option(
    "--shape", metavar="HEIGHTxWIDTH,...", help="Sizes of the pictures in pixels, for instance 512x512,512x768."
)
@click.option("--decoder-tile", type=click.IntRange(1), help="Decode in overlapping tiles of so many pixels to a side.")
@click.option("--batch", type=click.IntRange(2), help="Draw so many pictures at once too, on the same weights.")
@click.option("--bits", type=float, help="Bits of a weight in the mean, scales included; for mixed recipes.")
@click.option("--max-size", metavar="SIZE", help="Size of all components together, such as 12MB; for mixed recipes.")
@click.option("--form", type=click.Choice(FORMS), help="What the loop is compiled for; the steps decide unless given.")
@click.option("--image-output", is_flag=True, default=None, help="Core ML: the decoder gives an image of 8 bits.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the bundle.")
@click.option("--prompts", default=8, show_default=True, help="Prompts to verify with.")
@click.option("--seeds", default=2, show_default=True, help="Seeds for each prompt.")
@click.option(
    "--check-fp16", is_flag=True, help="Look for decoder values beyond fp16, as recipes with fp16 weights do."
)
@json_option
def build(
    source: SourceSpec,
    targets: tuple[str, ...],
    recipe: str,
    steps: tuple[int, ...] | None,
    guidance: float | None,
    shape: str | None,
    decoder_tile: int | None,
    batch: int | None,
    bits: float | None,
    max_size: str | None,
    form: str | None,
    image_output: bool | None,
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
    with progress_bars() as progress:
        bundle = fewstep.build(
            source,
            replace(chosen, quantization=budgeted),
            targets,
            out,
            steps=steps,
            guidance=guidance,
            shape=shape,
            decoder_tile=decoder_tile,
            batch=batch,
            form=form,
            image_output=image_output,
            options=options,
            progress=progress,
        )
    if as_json:
        told = guidance_text(bundle.manifest.contract.guidance)
        return print_json({"bundle": str(out), "parity": bundle.manifest.parity, "guidance": told})
    print_parity(bundle.manifest.parity or {}, bundle.manifest.caveats)
    OUT.print(f"guidance  {guidance_text(bundle.manifest.contract.guidance)}", markup=False, soft_wrap=True)
    OUT.print(f"bundle  {out}", markup=False)
    OUT.print(f"report  {out / 'report' / 'index.html'}", markup=False)


@click.command()
@bundle_argument
@click.argument("prompt", required=False)
@click.option(
    "--input", "given", multiple=True, metavar="NAME=VALUE", help="File of a picture, or a class; may be repeated."
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@click.option("--steps", type=int, help="Step count; the bundle's default unless given.")
@click.option("--shape", metavar="HEIGHTxWIDTH", help="One of the bundle's shapes; its first unless given.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=1,
    help="Draw so many at once, of SEED and the seeds after it; the file's name gets the seed.",
)
@guidance_option
@click.option(
    "--negative-prompt", metavar="TEXT", help="What to keep away from; none unless given, as in the pipeline."
)
@runtime_option
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="PNG, WAV, GIF or NPY file.")
@click.option("--rate", type=click.IntRange(1), help="Samples a second of a WAV file; the bundle's unless given.")
@click.option("--grid", is_flag=True, help="Draw the bundle's own prompts as one grid, instead of PROMPT.")
@json_option
def generate(
    bundle: Path,
    prompt: str | None,
    given: tuple[str, ...],
    seed: int,
    steps: int | None,
    shape: str | None,
    batch: int,
    guidance: float | None,
    negative_prompt: str | None,
    runtime: str | None,
    out: Path,
    rate: int | None,
    grid: bool,
    as_json: bool,
) -> None:
    """Draw PROMPT with BUNDLE, or whatever it makes of its inputs."""
    opened = fewstep.Bundle.open(bundle)
    opened = (opened if shape is None else opened.shaped(shape)).batched(batch)
    contract, prompts = opened.manifest.contract, opened.manifest.prompts
    seeds = [seed] * len(prompts)
    if not grid:
        prompts, seeds = (prompt or "",) * batch, [(seed + i) % 2**64 for i in range(batch)]
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
    notes = stand_in_notes(runtime or opened.manifest.runtimes[0])
    for note in [*notes, *unguided_notes(contract.guidance, guidance, negative_prompt)]:
        ERR.print(f"note: {note}", markup=False)
    with progress_bars() as progress:
        samples = stages.draw(
            opened,
            prompts,
            seeds,
            inputs=inputs,
            steps=steps,
            guidance=guidance,
            negative=negative_prompt,
            runtime=runtime,
            progress=progress,
        )
    paths = [out]
    if grid:
        media.write_whole(out, media.grid_png(samples))
    else:
        paths = paths if batch == 1 else [out.with_stem(f"{out.stem}-{seed}") for seed in seeds]
        for path, sample in zip(paths, samples, strict=True):
            media.write_output(path, sample.output, contract.output, rate)
    if as_json:
        kind, made = "picture" if grid else contract.output.kind, [str(path) for path in paths]
        files = made[0] if len(made) == 1 else made
        return print_json({kind: files, "prompts": list(prompts), "seed": seed, "steps": samples[0].steps})
    for path in paths:
        OUT.print(str(path), markup=False)


@click.command()
@bundle_argument
@click.option(
    "--against",
    metavar="SOURCE",
    help="Compare with this source instead of the one it was built from; the same for the adapters below.",
)
@adapter_options
@runtime_option
@click.option("--prompts", default=8, show_default=True)
@click.option("--seeds", default=2, show_default=True)
@click.option("--bisect", is_flag=True, help="If a component fails, name its first departing tensor.")
@click.option(
    "--key", type=click.Path(path_type=Path), help="Public key (PEM) that the bundle must be signed with; see sign."
)
@click.option(
    "--limits",
    type=click.Choice(["recipe", "bundle"]),
    default="recipe",
    show_default=True,
    help="bundle: take its limits also where they are below what its kind of recipe needs.",
)
@click.option(
    "--device-result",
    "device_results",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Result of the app's device check, as one more executor; may be repeated.",
)
@click.option(
    "--executor",
    metavar="NAME",
    help="Replay the golden pack there instead, e.g. on arm64; `fewstep runtimes` lists them.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=MINUTES,
    show_default=True,
    help="How long --executor may replay.",
)
@json_option
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
    key: Path | None,
    limits: str,
    device_results: tuple[Path, ...],
    executor: str | None,
    minutes: float,
    as_json: bool,
) -> None:
    """Compare BUNDLE with PyTorch again, on this machine or where its artifacts are meant to run."""
    if executor is not None and bisect:
        raise click.UsageError("--bisect compares on this machine; leave --executor out")
    opened = fewstep.Bundle.open(bundle)
    opened.refuse_unlisted()
    signed = None if key is None else seal.check_signature(bundle, key)
    devices = [read_device_report(path, opened) for path in device_results]
    given = replace(over, uri=against or "")
    source = given if given != SourceSpec("") else None
    with progress_bars() as progress:
        if executor is not None:
            result = replay(opened, executor, runtime=runtime, against=source, minutes=minutes, progress=progress)
        else:
            result = fewstep.verify(
                opened,
                against=source,
                runtime=runtime,
                prompts=prompts,
                seeds=seeds,
                bisect=bisect,
                trust_limits=limits == "bundle",
                progress=progress,
            )
    departures = {name: None if d is None else d.__dict__ for name, d in result.departures.items()}
    if as_json:
        values = {**result.report.to_json(), "caveats": list(result.caveats), "departures": departures}
        values |= {"signed_by": signed, "host": result.place}
        print_json({**values, "devices": [device.to_json() for device in devices]})
    else:
        if executor is not None:
            OUT.print(f"executor  {result.report.executor}", markup=False)
        if signed is not None:
            OUT.print(f"signed by {signed}", markup=False)
        print_parity(result.report.summary(), result.caveats)
        for check in result.report.failures[:10]:
            OUT.print(f"failed  {check.where}: {check.metric} {check.value:.1f}, limit {check.limit}", markup=False)
        if result.place is not None:
            OUT.print(f"first departure on the host: {result.place}", markup=False)
        for component, departure in departures.items():
            OUT.print(f"first departure in {component}: {departure or 'none found on this feed'}", markup=False)
        for device in devices:
            OUT.print(f"device  {device.report.executor}; {device.picture_ms:.0f} ms a picture", markup=False)
            print_parity(device.report.summary(), ())
    if not (result.report and all(device.report for device in devices)):
        context.exit(1)


@click.command()
@bundle_argument
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
        OUT.print(str(out), markup=False)
        return
    pair = None if certificate is None or key is None else web.Certificate(certificate, key)
    collector = None if collect is None else web.Collector(opened, collect)
    with web.AppServer(site, port=port, lan=lan, collector=collector, certificate=pair) as server:
        web.run(server, lambda text: OUT.print(text, markup=False), open_browser=open_browser)


@click.command()
@bundle_argument
@click.option("--steps", type=int, help="Step count; the bundle's default unless given.")
@runtime_option
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="ONNX file, or .mlpackage.")
@json_option
def loop(bundle: Path, steps: int | None, runtime: str | None, out: Path, as_json: bool) -> None:
    """Write one file that samples like BUNDLE: tokens and noise in, picture out."""
    with progress_bars() as progress:
        made = stages.loop(fewstep.Bundle.open(bundle), out, steps=steps, runtime=runtime, progress=progress)
    if as_json:
        return print_json({**made.__dict__, "path": str(made.path)})
    OUT.print(
        f"{out}  {made.steps} steps, {made.bytes / 1e6:.1f} MB ({made.of_components:.3f} of the components),", end=" "
    )
    OUT.print(f"{made.output_psnr_db:.1f} dB of the bundle's picture", markup=False)


@click.command()
@bundle_argument
@runtime_option
@click.option("--steps", type=int)
@click.option("--runs", type=click.IntRange(3), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads inside an op; the runtime's choice unless given.")
@json_option
def profile(
    bundle: Path, runtime: str | None, steps: int | None, runs: int, threads: int | None, as_json: bool
) -> None:
    """Measure BUNDLE: latency per component and whole, peak memory, sizes."""
    measured = fewstep.profile(fewstep.Bundle.open(bundle), runtime=runtime, steps=steps, runs=runs, threads=threads)
    if as_json:
        return print_json(measured.to_json())
    table = Table(
        "component", "calls", "median ms", "10-90 % ms", "MB", title=f"{measured.runtime}, {measured.steps} steps"
    )
    for row in (*measured.latencies, measured.picture):
        size = measured.sizes_bytes.get(row.component)
        megabytes = "" if size is None else f"{size / 1e6:.1f}"
        table.add_row(
            row.component, str(row.calls), f"{row.median_ms:.1f}", f"{row.low_ms:.1f} to {row.high_ms:.1f}", megabytes
        )
    OUT.print(table)
    OUT.print(f"peak memory {measured.peak_memory_bytes / 1e6:.0f} MB above the idle process")


@click.command()
@bundle_argument
@click.option("--key", type=click.Path(path_type=Path), required=True, help="Private key: Ed25519, PEM, unencrypted.")
def sign(bundle: Path, key: Path) -> None:
    """Sign BUNDLE, so that whoever has your public key can tell that it is yours: `fewstep verify BUNDLE --key`."""
    opened = fewstep.Bundle.open(bundle)
    opened.refuse_unlisted()
    public = seal.sign(bundle, key)
    OUT.print(f"{bundle / seal.SIGNATURE}  by {public}", markup=False)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def keygen(file: Path) -> None:
    """Write a new private key to FILE and its public key to FILE.pub, for `fewstep sign` and `verify --key`."""
    OUT.print(f"{seal.make_keys(file)}  to give away; keep {file} to yourself", markup=False)


COMMANDS = (build, generate, verify, app, loop, profile, sign, keygen)
