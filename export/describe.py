"""Reads what a bundle says of a generator off one recorded run: contract, components, schedules, tokenizer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep import noise
from fewstep.errors import ExportError
from fewstep.export.generator import Generator
from fewstep.export.probe import probe
from fewstep.export.reference import Call, Run, run, split_branches
from fewstep.export.tracing import first_calls, read_contract, read_specs
from fewstep.manifest import DENOISER, ComponentSpec, Contract, TokenizerSpec
from fewstep.schedule import Schedule, sample_loop


@dataclass(frozen=True)
class Description:
    """A generator's contract, what its components take and give, and one recorded call of each to trace."""

    contract: Contract
    components: Mapping[str, ComponentSpec]
    schedules: Mapping[int, Schedule]
    calls: Mapping[str, Call]
    tokenizer: TokenizerSpec


def describe(generator: Generator, steps: Sequence[int]) -> Description:
    """Returns the description of a generator for some step counts.

    Raises:
        ScheduleError: its scheduler is not a table.
        ExportError: its pipeline does something between the networks that a bundle cannot express.
    """
    schedules = {n: probe_schedule(generator, n) for n in steps}
    count = generator.default_steps if generator.default_steps in schedules else max(schedules)
    recorded = run(generator, generator.prompts[0], 0, steps=count, guidance=generator.guidance)
    inputs, latents = _replay(schedules[count], recorded)
    tokens = torch.from_numpy(np.array([_token_ids(generator.pipeline.tokenizer, generator.prompts[0])]))
    return Description(
        contract=read_contract(generator, recorded, latents),
        components=read_specs(generator, recorded, inputs, schedules[count].timesteps, tokens),
        schedules=schedules,
        calls=first_calls(recorded),
        tokenizer=TokenizerSpec("tokenizer", tokens.shape[1], int(generator.pipeline.tokenizer.pad_token_id)),
    )


def probe_schedule(generator: Generator, steps: int) -> Schedule:
    """Returns the table of a generator's own scheduler at a step count."""
    scheduler = generator.pipeline.scheduler
    # Pipelines pass eta = 0 to every scheduler that takes one.
    eta = 0.0 if "eta" in inspect.signature(scheduler.step).parameters else None
    return probe(scheduler, steps, eta=eta)


def write_tokenizer(generator: Generator, folder: Path) -> None:
    """Writes the tokenizer as transformers stores it, with ``vocab.json`` and ``merges.txt`` for BPE."""
    tokenizer = generator.pipeline.tokenizer
    tokenizer.save_pretrained(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer of transformers 4
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))


def diffusers_files(generator: Generator) -> dict[str, str]:
    """Returns the configuration files of the folder layout that ONNX Runtime users of diffusers models load."""
    pipeline = generator.pipeline
    index = {k: v for k, v in dict(pipeline.config).items() if not k.startswith("_") or k.startswith("_class")}
    index |= {"_class_name": type(pipeline).__name__, "_diffusers_version": index.get("_diffusers_version", "0.0.0")}
    entries: dict[str, Any] = {}
    for name, value in index.items():
        if name == "vae":
            entries["vae_decoder"] = ["diffusers", "OnnxRuntimeModel"]
        elif isinstance(value, (list, tuple)) and name in ("text_encoder", "unet", "transformer"):
            entries[name] = ["diffusers", "OnnxRuntimeModel"]
        else:
            entries[name] = list(value) if isinstance(value, tuple) else value
    files = {"model_index.json": json.dumps(entries, indent=2)}
    for part in generator.parts.values():
        config = getattr(pipeline, part.attribute).config
        text = (
            config.to_json_string()
            if hasattr(config, "to_json_string")
            else json.dumps(dict(config), indent=2, default=str)
        )
        files[f"{part.folder}/config.json"] = text
    files["scheduler/scheduler_config.json"] = pipeline.scheduler.to_json_string()
    return files


def _replay(schedule: Schedule, recorded: Run) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns the network's inputs and the latents of a recorded run as the table has them, the initial one first."""
    outputs = [split_branches(call) for call in recorded.of(DENOISER)]
    if len(outputs) != schedule.steps:
        raise ExportError(
            f"the pipeline called the denoiser {len(outputs)} times, the schedule has {schedule.steps} steps",
            hint="a pipeline that skips or repeats calls cannot be expressed yet",
        )
    shape = tuple(next(iter(outputs[0]["cond"][1].values())).shape)
    inputs: list[torch.Tensor] = []
    latents = [torch.from_numpy(schedule.init_scale * noise.normal(0, 0, shape))]

    def denoise(k: int, x: Any) -> Any:
        inputs.append(torch.from_numpy(x))
        F = {branch: next(iter(values[1].values())).numpy() for branch, values in outputs[k].items()}
        if "uncond" in F:
            return F["uncond"] + np.float32(recorded.guidance) * (F["cond"] - F["uncond"])
        return F["cond"]

    def keep(k: int, x: Any, x0: Any) -> None:
        latents.append(torch.from_numpy(x))

    sample_loop(schedule, latents[0].numpy(), denoise, lambda k: noise.normal(0, k + 1, shape), keep)
    return inputs, latents


def _token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """As diffusers' pipelines call a tokenizer."""
    length = tokenizer.model_max_length
    ids: list[int] = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
    return ids
