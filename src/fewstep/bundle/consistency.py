"""What the JSON schema of a manifest cannot say: that its parts fit together. Checked whenever a manifest is read.

Names exist where they are used, and before they are used; shapes that are bound to each other hold as many values;
tables have the lengths and rows that their step counts need. `apps/web/src/lib/consistency.ts` checks the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fewstep.bundle.contract import (
    AFTER,
    BEFORE,
    DRAW,
    GUIDANCE,
    IMAGE,
    INPUT,
    LATENT,
    LOOP,
    MASK,
    NOISE,
    SAMPLE,
    STEP,
    TEXT,
    TIME,
    TIMESTEP,
    TOKENS,
    ZEROS,
    ComponentSpec,
    TensorSpec,
    is_denoiser,
)
from fewstep.bundle.variants import batch_of
from fewstep.errors import BundleError, FewstepError
from fewstep.numerics.noise import DRAWS_OF_A_STEP, EARLY_DRAWS

if TYPE_CHECKING:
    from fewstep.bundle.manifest import Manifest

HINT = "build the bundle again; manifests are not edited"
# Values of one tensor: 1 GiB of float32. Frames of a long video are a third of it.
MOST_VALUES = 1 << 28
TOKENIZER = "tokenizer.json"
_COUNT = re.compile(r"0|[1-9]\d{0,9}")
# No control characters, and nothing that a path has on Windows alone.
_PATH = re.compile(r"[^\x00-\x1f\x7f\\:]+")
_PHASES = {BEFORE: 0, LOOP: 1, AFTER: 2}


def is_inside(path: str) -> bool:
    """Returns whether a path, by its text, is one of a file inside a folder, on any system."""
    parts = path.split("/")
    return _PATH.fullmatch(path) is not None and not any(part in ("", ".", "..") for part in parts)


def check_consistent(manifest: Manifest, where: str) -> None:
    """Raises BundleError for the first thing in a manifest that contradicts another."""
    try:
        for problem in _problems(manifest):
            raise BundleError(f"{where}: {problem}", hint=HINT)
    except BundleError:
        raise
    except FewstepError as error:
        raise BundleError(f"{where}: {error.message}", hint=error.hint or HINT) from error


def _problems(manifest: Manifest) -> Iterator[str]:
    """Yields what is wrong with a manifest, and at its further shapes."""
    yield from _of_paths(manifest)
    yield from _of_one(manifest)
    yield from _of_artifacts(manifest)
    yield from _of_tokenizers(manifest)
    for shape, other in manifest.shapes.items():
        if other.contract.batch != batch_of(shape):
            yield f"shapes/{shape} has a batch of {other.contract.batch}"
        if other.components.keys() != manifest.components.keys():
            yield f"shapes/{shape} has other components than the first shape"
        if other.schedules.keys() != manifest.schedules.keys():
            yield f"shapes/{shape} has other step counts than the first shape"
        yield from (f"shapes/{shape}: {problem}" for problem in _of_one(manifest.shaped(shape)))


def _of_one(manifest: Manifest) -> Iterator[str]:
    """Yields what is wrong with the contract, the components and the schedules of one shape."""
    contract = manifest.contract
    if contract.latent_scale == 0:
        yield "contract/latent_scale is 0, and the latent is divided by it"
    if contract.output.clip is not None and not contract.output.clip[0] < contract.output.clip[1]:
        yield f"contract/output/clip is {list(contract.output.clip)}, expected the lower number first"
    yield from _twice("contract/inputs", (spec.name for spec in contract.inputs))
    yield from _too_large("contract/latent_shape", (contract.batch, *contract.latent_shape))
    for spec in contract.inputs:
        if spec.kind == IMAGE and len(spec.shape) != 4:
            yield f"contract/inputs: the image {spec.name} has the shape {list(spec.shape)}, expected 4 sides"
        yield from _too_large(f"contract/inputs: {spec.name}", spec.shape)
    yield from _of_schedules(manifest)
    for name, component in manifest.components.items():
        yield from _of_component(name, component)
    yield from _of_bindings(manifest)
    yield from _of_results(manifest)


def _of_component(name: str, component: ComponentSpec) -> Iterator[str]:
    where = f"components/{name}"
    yield from _twice(f"{where}/inputs", (spec.name for spec in component.inputs))
    yield from _twice(f"{where}/outputs", (spec.name for spec in component.outputs))
    for spec in (*component.inputs, *component.outputs):
        yield from _too_large(f"{where}: {spec.name}", spec.shape)
    names = {spec.name for spec in component.inputs}
    for unbound in (spec.name for spec in component.inputs if spec.name not in component.bindings):
        yield f"{where}: the input {unbound} is bound to nothing"
    for unknown in (bound for bound in component.bindings if bound not in names):
        yield f"{where}/bindings has {unknown}, which is no input"
    if component.tiles is not None:
        tiles, sides = component.tiles, [spec.shape for spec in (*component.inputs[:1], *component.outputs[:1])]
        if len(component.inputs) != 1 or any(len(shape) != 4 for shape in sides):
            yield f"{where} has tiles, and not one input and output of 4 sides"
        elif tiles.stride > tiles.size or max(tiles.blend, tiles.keep) > tiles.size * tiles.scale:
            yield f"{where}/tiles overlap by less than nothing, or keep more than a tile has"


def _of_schedules(manifest: Manifest) -> Iterator[str]:
    contract, components = manifest.contract, manifest.components
    if manifest.default_steps not in manifest.schedules:
        yield f"default_steps is {manifest.default_steps}, which has no schedule"
    rowed = contract.form != "step"
    if rowed != bool(contract.rows):
        yield f"contract/rows has {len(contract.rows)} rows, and the form is {contract.form}"
    for steps, table in manifest.schedules.items():
        where = f"schedules/{steps}"
        for k in range(table.steps):  # of an image-to-image pipeline fewer than its step count
            if rowed:
                contract.row(table, k)
            spec = components.get(table.network(k))
            if spec is None or spec.phase != LOOP or not is_denoiser(table.network(k)):
                expected = ", ".join(sorted(name for name in components if is_denoiser(name))) or "denoiser"
                yield f"{where}/networks: {table.network(k)!r} is no network of the loop, expected one of {expected}"
                continue
            yield from _holds(f"{where}: what {table.network(k)} puts out", spec.outputs[0], _latent(manifest))
        if table.uses_anchor and contract.anchor is None:
            yield f"{where} has a term for the anchor, and contract/anchor is null"


def _of_bindings(manifest: Manifest) -> Iterator[str]:
    """Yields inputs that are bound to nothing that is known then, or to what has another number of values."""
    known = _given(manifest)
    in_order = sorted(manifest.components.items(), key=lambda item: _PHASES[item[1].phase])
    phase = BEFORE
    for name, component in in_order:
        if component.phase != phase:
            phase = component.phase
            known |= _known_in(manifest, phase)
        for spec in component.inputs:
            where, origin = f"components/{name}: {spec.name}", component.bindings.get(spec.name, "")
            size = known[origin] if origin in known else _drawn(origin, phase, spec)
            if size is None:
                yield f"{where} is bound to {origin!r}, which is nothing that is known {_when(phase)}"
            elif size != 1 and size != math.prod(spec.shape):
                yield f"{where} is {spec.dtype} {list(spec.shape)}, and {origin} has {size} values"
            elif phase == BEFORE and origin.startswith(NOISE):
                known[origin] = size  # what was drawn before the loop is the same in it
            frequencies = manifest.contract.guidance.frequencies
            if origin == GUIDANCE and frequencies and spec.shape[-1:] != (2 * len(frequencies),):
                yield f"{where} is {spec.dtype} {list(spec.shape)}, and guidance has {len(frequencies)} frequencies"
        known |= {f"{name}.{spec.name}": math.prod(spec.shape) for spec in component.outputs}


def _given(manifest: Manifest) -> dict[str, int]:
    """Returns how many values has what is known before any network runs, by origin."""
    contract, batch = manifest.contract, manifest.contract.batch
    known = {f"{INPUT}{i.name}": batch * max(1, math.prod(i.shape)) for i in contract.inputs if i.kind != TEXT}
    for name, tokenizer in manifest.tokenizers.items():
        known |= {f"{TOKENS}{name}": batch * tokenizer.length, f"{MASK}{name}": batch * tokenizer.length}
    if contract.guidance.kind in ("embedded", "scalar"):
        known[GUIDANCE] = 1  # one row is enough for all samples
    return known


def _known_in(manifest: Manifest, phase: str) -> dict[str, int]:
    """Returns how many values has what becomes known in a phase, by origin."""
    if phase == AFTER:
        return {SAMPLE: _latent(manifest)}
    times = set.intersection(*(set(table.times) for table in manifest.schedules.values()))
    known = {LATENT: _latent(manifest), TIMESTEP: 1, **{f"{TIME}{name}": 1 for name in times}}
    return known if manifest.contract.form == "step" else {**known, STEP: 1}


def _drawn(origin: str, phase: str, spec: TensorSpec) -> int | None:
    """Returns how many values has noise, which is drawn in the shape that is wanted; None for what is none."""
    for prefix, when, least, most in ((NOISE, BEFORE, 0, EARLY_DRAWS), (DRAW, LOOP, 1, DRAWS_OF_A_STEP)):
        number = origin.removeprefix(prefix)
        if origin.startswith(prefix) and phase == when and _COUNT.fullmatch(number) and least <= int(number) <= most:
            return math.prod(spec.shape)
    return None


def _of_results(manifest: Manifest) -> Iterator[str]:
    """Yields what is wrong with the first latent, the anchor and the last output."""
    contract, latent = manifest.contract, _latent(manifest)
    before = {
        f"{name}.{spec.name}": math.prod(spec.shape)
        for name, component in manifest.components.items()
        if component.phase == BEFORE
        for spec in component.outputs
    }
    given = {**before, **{o: size for o, size in _given(manifest).items() if o.startswith(INPUT)}}
    whole = TensorSpec("latent", "float32", (contract.batch, *contract.latent_shape))
    for replaced in contract.guidance.unconditional:
        if replaced not in before and replaced not in _given(manifest):
            yield f"contract/guidance/unconditional: {replaced!r} is nothing that is known before the loop"
    for name, origin in (("initial", contract.initial), ("anchor", contract.anchor)):
        size = None if origin is None else given.get(origin, _drawn(origin, BEFORE, whole))
        if origin is not None and size != latent:
            what = "nothing that is known before the loop" if size is None else f"of {size} values"
            yield f"contract/{name} is {origin!r}, {what}; expected {latent} values"
    last = [component.outputs[0].shape for component in manifest.components.values() if component.phase == AFTER]
    shape = last[-1] if last else whole.shape
    if not shape or shape[0] % contract.batch or (contract.output.kind == "picture" and len(shape) != 4):
        yield f"the last output is {list(shape)}, which is no {contract.output.kind} for each of {contract.batch}"


def _of_paths(manifest: Manifest) -> Iterator[str]:
    folders = [tokenizer.folder for tokenizer in manifest.tokenizers.values()]
    artifacts = [artifact.path for artifact in manifest.artifacts]
    for path in (*manifest.files, *folders, *artifacts):
        if not is_inside(path):
            yield f"path {path[:200]!r} leaves the bundle, expected a relative path inside it"
    for path in artifacts:
        if path not in manifest.files:
            yield f"artifact {path} is not listed in the manifest's files"
    for path in set(manifest.contract.guidance.unconditional.values()) - {ZEROS}:
        if not is_inside(path):
            yield f"path {path[:200]!r} leaves the bundle, expected a relative path inside it"
        if path not in manifest.files:
            yield f"contract/guidance/unconditional: {path} is not listed in the manifest's files"
    for folder in folders:
        if f"{folder}/{TOKENIZER}" not in manifest.files:
            yield f"{folder}/{TOKENIZER} is not listed in the manifest's files"


def _of_artifacts(manifest: Manifest) -> Iterator[str]:
    if not manifest.artifacts:
        yield "artifacts is empty: nothing can run it"
    yield from _twice("artifacts", ("/".join((a.runtime, a.component, a.variant)) for a in manifest.artifacts))
    have: dict[str, set[str]] = {}
    for artifact in manifest.artifacts:
        if artifact.component not in manifest.components:
            yield f"artifacts: {artifact.path} is of {artifact.component!r}, which is no component"
        have.setdefault(artifact.runtime, set()).add(artifact.component)
    for runtime, components in have.items():
        for missing in (name for name in manifest.components if name not in components):
            yield f"artifacts: there is no {missing} for {runtime}"


def _of_tokenizers(manifest: Manifest) -> Iterator[str]:
    texts = {spec.name for spec in manifest.contract.inputs if spec.kind == TEXT}
    for name, tokenizer in manifest.tokenizers.items():
        if tokenizer.input not in texts:
            yield f"tokenizers/{name} is for the input {tokenizer.input!r}, which is no text of contract/inputs"


def _latent(manifest: Manifest) -> int:
    return manifest.contract.batch * math.prod(manifest.contract.latent_shape)


def _holds(where: str, spec: TensorSpec, values: int) -> Iterator[str]:
    if math.prod(spec.shape) != values:
        yield f"{where} is {spec.dtype} {list(spec.shape)}, expected {values} values"


def _twice(where: str, names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield f"{where} has {name} twice"
        seen.add(name)


def _too_large(where: str, shape: Iterable[int]) -> Iterator[str]:
    sides = [*shape]
    if math.prod(sides) > MOST_VALUES:
        yield f"{where} is {sides}, more than {MOST_VALUES} values"


def _when(phase: str) -> str:
    return {BEFORE: "before the loop", LOOP: "in the loop, there", AFTER: "after the loop"}[phase]
