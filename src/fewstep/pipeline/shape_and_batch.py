"""What a bundle draws beside its default, pictures of other shapes and several at once: programs, and references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.bundle.manifest import Shaped
from fewstep.bundle.samples import Sample, StepFeed
from fewstep.bundle.variants import variant
from fewstep.errors import ExportError, PipelineError
from fewstep.numerics.inputs import example_inputs
from fewstep.recipe.recipe import Recipe

if TYPE_CHECKING:
    from fewstep.calibration import SampleRequest
    from fewstep.export import Generator, Programs

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Further:
    """The programs of a shape or a batch; ``alone`` are those that draw one sample of the same shape."""

    programs: Programs
    alone: Programs
    size: tuple[int, int] | None
    """Height and width where they are not the default's."""

    @property
    def batch(self) -> int:
        """How many samples are drawn at once."""
        return self.programs.contract.batch

    def shaped(self) -> Shaped:
        """Returns what the manifest says of it."""
        return Shaped(self.programs.contract, self.programs.components, self.programs.described.schedules)

    def requests(self) -> list[SampleRequest]:
        """Returns what it is verified with: one batch: its graphs have the weights that the default's have shown."""
        return batch_requests(self.alone.generator, self.batch)

    def plain(self, original: Generator) -> Generator:
        """Returns the generator before its recipe, at this shape."""
        return original if self.size is None else original.shaped(*self.size)

    def restate(self, samples: Sequence[Sample]) -> list[Sample]:
        """Returns recorded samples of one picture each as a bundle draws them: their calls are those of the batch."""
        return restate(samples, self.programs)


def further_programs(programs: Programs, recipe: Recipe) -> dict[str, Further]:
    """Returns the programs at a recipe's shapes after the first, then at its batch of every shape, by their names.

    Raises:
        ExportError: the generator does not draw a batch as it draws one sample.
    """
    shapes = {"{}x{}".format(*size): size for size in recipe.shape}
    alone: dict[str | None, tuple[Programs, tuple[int, int] | None]] = {next(iter(shapes), None): (programs, None)}
    found = {}
    for name, size in list(shapes.items())[1:]:
        at = _described(programs.generator.shaped(*size), programs, recipe)
        alone[name] = at, size
        found[name] = Further(at, at, size)
    if recipe.batch is not None:
        for shape, (one, at_size) in alone.items():
            found[variant(shape, recipe.batch)] = Further(batched_programs(one, recipe), one, at_size)
    return found


def batched_programs(alone: Programs, recipe: Recipe) -> Programs:
    """Returns the programs that draw a recipe's batch, from those that draw one sample.

    Raises:
        ExportError: the generator does not draw a batch as it draws one sample.
    """
    assert recipe.batch is not None
    generator = alone.generator
    try:
        several = _described(generator.batched(recipe.batch), alone, recipe)
    except (PipelineError, IndexError, RuntimeError, TypeError, ValueError) as error:
        # What code for one sample alone fails with.
        cause = error.__cause__ if isinstance(error, PipelineError) and error.__cause__ else error
        first = str(cause).strip().split("\n", 1)[0]
        raise ExportError(
            f"{generator.name} does not draw {recipe.batch} samples at once: {type(cause).__name__}: {first}",
            hint="build it without a batch, and draw one sample after the other",
        ) from error
    for what, one, many in (
        ("consists of", _anatomy(alone.components), _anatomy(several.components)),
        ("says", replace(alone.contract, batch=recipe.batch), several.contract),
    ):
        if one != many:
            raise ExportError(
                f"in a batch of {recipe.batch} the generator {what} {many}, expected {one} as for one sample",
                hint="build it without a batch, and draw one sample after the other",
            )
    return several


def _described(generator: Generator, like: Programs, recipe: Recipe) -> Programs:
    from fewstep.export import describe, programs_of

    described = describe(generator, sorted(like.described.schedules))
    ours, theirs = like.described.guided.values, described.guided.values
    if ours.keys() != theirs.keys() or not all(np.allclose(ours[o], theirs[o], rtol=1e-4, atol=1e-5) for o in ours):
        raise ExportError(
            f"the unconditional branch of {generator.name} is another at another size or batch, expected the same",
            hint="build a bundle for each shape",
        )
    if generator.batch > 1:  # the same table, to the last digit
        described = replace(described, schedules=like.described.schedules)
    return programs_of(generator, described, recipe)


def _anatomy(components: Mapping[str, ComponentSpec]) -> dict[str, Any]:
    """Returns what components are beside the shapes of their tensors."""
    return {
        name: (dict(spec.bindings), [o.name for o in spec.outputs], spec.phase) for name, spec in components.items()
    }


def batch_requests(generator: Generator, batch: int) -> list[SampleRequest]:
    """Returns the requests of one batch at the default step count, all with prompts, seeds and inputs of their own."""
    from fewstep.calibration import SampleRequest

    prompts, steps, w = generator.prompts or ("",), generator.default_steps, generator.guidance
    return [
        SampleRequest(prompts[i % len(prompts)], i, steps, w, example_inputs(generator.inputs, i)) for i in range(batch)
    ]


def restate(samples: Sequence[Sample], programs: Programs) -> list[Sample]:
    """Returns recorded samples of one picture each with the network calls of programs, batch by batch."""
    batch, found = programs.contract.batch, []
    for rows in batches(samples, batch):
        found += programs.restate(rows if batch == 1 else joined(rows, programs.described.components))
    return found


def batches(samples: Sequence[Sample], batch: int) -> Iterable[Sequence[Sample]]:
    """Returns samples in groups that are drawn at once."""
    return (samples[i : i + batch] for i in range(0, len(samples), batch))


def joined(samples: Sequence[Sample], components: Mapping[str, ComponentSpec]) -> list[Sample]:
    """Returns samples drawn one by one as those of a batch, the first of which holds the calls of all.

    Args:
        samples: of one step count, each with its own calls.
        components: what the networks take and give for the batch.

    Raises:
        ExportError: a network takes one tensor for all samples, and they differ in it.
    """
    calls = zip(*(sample.feeds for sample in samples), strict=True)
    feeds = tuple(_join(of_each, components[of_each[0].component]) for of_each in calls)
    return [replace(samples[0], feeds=feeds), *(replace(sample, feeds=()) for sample in samples[1:])]


def _join(calls: Sequence[StepFeed], spec: ComponentSpec) -> StepFeed:
    inputs, outputs = [call.inputs for call in calls], [call.outputs for call in calls]
    return replace(
        calls[0],
        inputs={tensor.name: _rows(inputs, tensor, calls[0].component) for tensor in spec.inputs},
        outputs={tensor.name: _rows(outputs, tensor, calls[0].component) for tensor in spec.outputs},
    )


def _rows(values: Sequence[Mapping[str, Array]], tensor: TensorSpec, component: str) -> Array:
    """Returns a tensor of a batch: the samples' own one after the other, or the one that all of them share."""
    each = [of_one[tensor.name] for of_one in values]
    shared = all(array.shape == tensor.shape for array in each)
    found = each[0] if shared else np.concatenate(each)
    tensor.check(found.shape, str(found.dtype), component)
    if shared and not all(np.array_equal(array, each[0]) for array in each):
        raise ExportError(
            f"{component}: {tensor.name} {list(tensor.shape)} differs between the samples of a batch, expected one row "
            "for each",
            hint="build it without a batch, and draw one sample after the other",
        )
    return found
