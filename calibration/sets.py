"""Calibration sets: calls of the reference as shards on disk, one for each trajectory, and what they cover."""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fewstep.bundle.contract import LATENT, SAMPLE
from fewstep.bundle.samples import Sample, StepFeed, load_sample, read_feeds, read_head, save_sample
from fewstep.cache import code_sha256
from fewstep.cache_entries import content_name, is_as_named
from fewstep.calibration.features import step_features
from fewstep.calibration.record import SampleRequest, record_samples
from fewstep.calibration.samplers import Kept, LatentNames, Question, get_sampler, prompt_order
from fewstep.disk import PARTIAL, begin, discard, remove_stale, sync, sync_names, write_whole
from fewstep.errors import CalibrationError
from fewstep.export import Description, Generator, digest
from fewstep.hashing import value_sha256
from fewstep.numerics.inputs import example_inputs
from fewstep.progress import Progress, Silent

INDEX = "calibration.json"
# Trajectories that tell a sampler which steps are alike.
_FEATURE_TRAJECTORIES = 4
_AGAIN = "run `fewstep calibrate` again: it goes on where it was interrupted"
# Number, what determines it, its content; earlier versions left the content out.
_SHARD = re.compile(r"\d{5}-[0-9a-f]{16}(-[0-9a-f]{32})?\.safetensors")
_STEM = 5 + 1 + 16
_log = logging.getLogger("fewstep")


@dataclass(frozen=True)
class Coverage:
    """What a set holds of one component at one step in one branch of guidance."""

    component: str
    step: int | None
    branch: str
    count: int
    prompts: int
    seeds: int
    timesteps: tuple[float, ...]


@dataclass(frozen=True)
class CalibrationSet:
    """Calls of the reference, in a folder.

    Attributes:
        folder: where the shards are.
        shards: their names, in order.
        sampler: which chose the calls.
        note: what it chose, in words.
        steps: N of the trajectories.
        guidance: scale of the trajectories.
        seed: from which all choices and noise come.
        inputs: names of each component's inputs, in the order of its program.
        key: hash of all that determines the set.
    """

    folder: Path
    shards: tuple[str, ...]
    sampler: str
    note: str
    steps: int
    guidance: float
    seed: int
    inputs: Mapping[str, tuple[str, ...]]
    key: str

    @classmethod
    def open(cls, folder: Path) -> CalibrationSet:
        """Returns the set that `collect` wrote to a folder.

        Raises:
            CalibrationError: it is not there, not whole, or damaged.
        """
        try:
            values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            inputs = {component: tuple(names) for component, names in values.pop("inputs").items()}
            opened = cls(folder, tuple(values.pop("shards")), inputs=inputs, **values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{folder} is not a finished calibration set: {error}", hint=_AGAIN) from error
        for name in opened.shards:
            if not is_as_named(folder / name):
                wrong = "was altered" if (folder / name).is_file() else "is missing"
                raise CalibrationError(f"{folder}: {name} {wrong}", hint=_AGAIN)
        return opened

    def samples(self) -> Iterator[Sample]:
        """Yields the trajectories with the calls that were kept, reading one shard at a time."""
        for name in self.shards:
            yield load_sample(self.folder / name)

    def feeds(self, component: str) -> Iterator[StepFeed]:
        """Yields the calls of a component, reading one shard at a time.

        Raises:
            CalibrationError: the set has no such component.
        """
        if component not in self.inputs:
            raise CalibrationError(f"the calibration set has no {component}, it has {', '.join(self.inputs)}")
        for name in self.shards:
            yield from read_feeds(self.folder / name, component)

    def calls(self, component: str, *, by_step: bool = True) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        """Yields (step, inputs in order) of the calls of a component, as `fewstep.calibration.observe` takes them.

        Components that run once have step 0; without ``by_step`` all calls do.
        """
        for feed in self.feeds(component):
            inputs = tuple(torch.from_numpy(feed.inputs[name]) for name in self.inputs[component])
            yield (feed.step or 0) if by_step else 0, inputs

    def coverage(self) -> list[Coverage]:
        """Returns how many calls there are, and of what, by component, step and branch."""
        found: dict[tuple[str, int | None, str], list[tuple[str, int, float | None]]] = defaultdict(list)
        for name in self.shards:
            head = read_head(self.folder / name)
            for call in head["calls"]:
                place = call["component"], call["step"], call["branch"]
                found[place].append((head["prompt"], head["seed"], call["timestep"]))
        order = {component: i for i, component in enumerate(self.inputs)}
        places = sorted(found, key=lambda place: (order[place[0]], -1 if place[1] is None else place[1], place[2]))
        return [
            Coverage(
                *place,
                count=len(found[place]),
                prompts=len({prompt for prompt, _, _ in found[place]}),
                seeds=len({seed for _, seed, _ in found[place]}),
                timesteps=tuple(sorted({t for _, _, t in found[place] if t is not None})),
            )
            for place in places
        ]


def collect(
    generator: Generator,
    described: Description,
    sampler: str,
    prompts: Sequence[str],
    *,
    size: int,
    seed: int,
    steps: int,
    guidance: float,
    folder: Path,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Returns a set of calls of the reference on its own N-step trajectories, recorded to a folder.

    Each trajectory is written when it is done, under a name that holds the hash of all that determines it and the hash
    of its content: a second call with the same arguments goes on where the first was interrupted and makes again what
    was damaged, and one with a larger ``size`` adds to it.
    One trajectory is in memory at a time. Several processes may make the same set in one folder at once.

    Args:
        generator: the reference.
        described: its description, for ``steps`` among others.
        sampler: name of the sampler, see `fewstep.calibration.samplers`.
        prompts: to calibrate with, in turn.
        size: calls of the denoiser to keep, in each branch of guidance; ``own`` rounds up to whole trajectories. Of
            components that run once, a call is kept for every N of these.
        seed: from which the noise of each trajectory and all choices come.
        steps: N.
        guidance: guidance scale, as the generator takes it.
        folder: may hold shards of an earlier call; what does not belong to the set is removed if it is a shard.
        progress: told of each trajectory.

    Raises:
        CalibrationError: unknown sampler, no prompts, a size below 1, or steps that the description does not have.
    """
    chosen = get_sampler(sampler)
    if not prompts or size < 1 or steps not in described.schedules:
        raise _refused(prompts, size, steps, described)

    def features() -> Any:
        count = min(_FEATURE_TRAJECTORIES, size)
        requests = [_request(generator, prompts[i % len(prompts)], seed, i, steps, guidance) for i in range(count)]
        return step_features(generator, described, requests)

    choice = chosen.choose(Question(size, steps, seed, features))
    order = prompt_order(len(choice.kept), len(prompts), steps, seed=seed, in_order=chosen.in_order)
    names = _latent_names(described)
    common = {**trajectory_key(described, steps), "sampler": sampler}
    folder.mkdir(parents=True, exist_ok=True)
    advance = (progress or Silent()).task(f"calibrate ({sampler})", len(choice.kept))
    shards = []
    rest_due = 0.0
    for i, kept in enumerate(choice.kept):
        request = _request(generator, prompts[order[i]], seed, i, steps, guidance)
        rest_due += len(kept) / steps
        with_rest = rest_due > 0.5 or i == 0
        rest_due -= with_rest
        key = value_sha256({**common, "request": [request.prompt, i, seed, guidance], "kept": [kept, with_rest]})
        stem = f"{i:05d}-{key[:16]}"
        name = _whole_shard(folder, stem)
        if name is None:
            sample = _keep(next(record_samples(generator, described, [request])), kept, with_rest)
            sample = sample if chosen.rewrite is None else chosen.rewrite(sample, names)
            name = _write_shard(folder, stem, sample)
        shards.append(name)
        advance()
    _remove_others(folder, shards)
    inputs = {name: tuple(tensor.name for tensor in spec.inputs) for name, spec in described.components.items()}
    made = CalibrationSet(
        folder, tuple(shards), sampler, choice.note, steps, guidance, seed, inputs, value_sha256(shards)
    )
    _write_index(made)
    return made


def _refused(prompts: Sequence[str], size: int, steps: int, described: Description) -> CalibrationError:
    if not prompts:
        return CalibrationError(
            "there are no prompts to calibrate with, expected at least one", hint="give the generator prompts"
        )
    if size < 1:
        return CalibrationError(f"size is {size}, expected at least one call")
    known = ", ".join(map(str, described.schedules))
    return CalibrationError(f"there is no schedule for {steps} steps to calibrate, expected {known}")


def _request(generator: Generator, prompt: str, seed: int, number: int, steps: int, guidance: float) -> SampleRequest:
    """Returns what to sample for a trajectory of a number; its noise is far from that of small seeds."""
    own_seed = int(value_sha256(["calibration", seed, number])[:12], 16)
    return SampleRequest(prompt, own_seed, steps, guidance, example_inputs(generator.inputs, number))


def _keep(sample: Sample, kept: Kept, with_rest: bool) -> Sample:
    feeds = tuple(feed for feed in sample.feeds if (with_rest if feed.step is None else feed.step in kept))
    return replace(sample, feeds=feeds)


def _latent_names(described: Description) -> LatentNames:
    of_step, final = (
        {name: wiring.input_name(origin) for name, wiring in described.wirings.items() if origin in wiring.origins}
        for origin in (LATENT, SAMPLE)
    )
    return LatentNames(of_step, final)


def trajectory_key(described: Description, steps: int) -> dict[str, object]:
    """Returns what determines a trajectory of N steps beside its request, JSON-ready."""
    return {
        "generator": described.fingerprint,
        "schedule": described.schedules[steps].to_json(),
        "wirings": {name: digest(wiring) for name, wiring in described.wirings.items()},
        "code": code_sha256(),
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }


def is_calibration_folder(folder: Path) -> bool:
    """Returns whether there is nothing in a folder, or nothing but what `collect` writes."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(p.name == INDEX or _is_ours(p.name) for p in folder.iterdir())


def _is_ours(name: str) -> bool:
    """Returns whether a file is a shard, or what an interruption left of one or of the index."""
    return bool(_SHARD.fullmatch(name) or name.startswith((f".{PARTIAL}", f".{INDEX}.{PARTIAL}")))


def _whole_shard(folder: Path, stem: str) -> str | None:
    """Returns the name of a shard whose content is what was written; None where there is none."""
    for path in sorted(folder.glob(f"{stem}-*.safetensors")):
        if is_as_named(path):
            return path.name
        _log.warning("a calibration shard is damaged, and made again: %s", path)
    return None


def _write_shard(folder: Path, stem: str, sample: Sample) -> str:
    """Writes a shard, and returns its name: it appears when it is whole."""
    unfinished = begin(folder, ".")
    try:
        content = unfinished / "shard.safetensors"
        save_sample(sample, content)
        sync(content)
        name = content_name(stem, content)
        content.replace(folder / name)
        sync_names(folder)
    finally:
        discard(unfinished)
    return name


def _remove_others(folder: Path, shards: Sequence[str]) -> None:
    """Removes shards of other sets, and what interruptions left."""
    remove_stale(folder, f".{PARTIAL}")
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in shards:
            twin = path.name[:_STEM] in {name[:_STEM] for name in shards} and is_as_named(path)  # another process's
            if not twin:
                path.unlink(missing_ok=True)


def _write_index(made: CalibrationSet) -> None:
    values = asdict(made)
    values.pop("folder")
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    write_whole(made.folder / INDEX, text.encode())
