"""How long a bundle takes, how much memory it needs and how large it is, measured on this machine."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.contract import DENOISER, is_denoiser
from fewstep.errors import RuntimeMissingError
from fewstep.faults import naming_packages
from fewstep.numerics.inputs import example_inputs
from fewstep.runtimes import get_runtime
from fewstep.runtimes.sampling.sampler import open_sampler


@dataclass(frozen=True)
class Latency:
    """Times of one thing: median and the middle 80 % (10th to 90th percentile), in milliseconds."""

    component: str
    calls: int
    runs: int
    median_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class Profile:
    """One measurement of a bundle. ``peak_memory_bytes`` is the growth of resident memory over the idle process."""

    runtime: str
    steps: int
    threads: int | None
    latencies: tuple[Latency, ...]
    picture: Latency
    peak_memory_bytes: int
    sizes_bytes: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Returns the profile as JSON-ready values."""
        return asdict(self)


@naming_packages()
def profile(
    bundle: Bundle, *, runtime: str | None = None, steps: int | None = None, runs: int = 10, threads: int | None = None
) -> Profile:
    """Returns latency per component and whole, peak memory and sizes.

    Measured in a process of its own, so that memory which this one holds or has cached does not count.

    Raises:
        ContractError: the bundle has no schedule for this step count.
        BundleError: the bundle has no artifacts for this runtime.
        RuntimeMissingError: the measuring process failed.
    """
    state = get_runtime(runtime or bundle.manifest.runtimes[0]).availability()
    if not state.runs and state.stand_in is not None:
        raise RuntimeMissingError(
            f"{state.runtime} cannot be timed here ({state.stand_in} in its place would say nothing): {state.detail}",
            hint=state.remedy,
        )
    # Refused here, with their own texts, what would end the other process with a traceback.
    bundle.manifest.schedule(bundle.manifest.default_steps if steps is None else steps)
    bundle.manifest.artifact(runtime or bundle.manifest.runtimes[0], DENOISER)
    options = {"runtime": runtime, "steps": steps, "runs": runs, "threads": threads}
    child = [sys.executable, "-c", "from fewstep.runtimes.profiling import child; child()", str(bundle.path)]
    done = subprocess.run([*child, json.dumps(options)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeMissingError(
            f"cannot measure {bundle.path}: {last[0]}", hint="does `fewstep generate` work on it?"
        )
    values = json.loads(done.stdout)
    latencies = tuple(Latency(**latency) for latency in values.pop("latencies"))
    return Profile(**{**values, "latencies": latencies, "picture": Latency(**values["picture"])})


def child() -> None:
    """Measures the bundle named by the process's arguments and writes the profile to stdout as JSON."""
    bundle, options = Bundle.open(sys.argv[1]), json.loads(sys.argv[2])
    sys.stdout.write(json.dumps(_measure(bundle, **options).to_json()))


def _measure(bundle: Bundle, *, runtime: str | None, steps: int | None, runs: int, threads: int | None) -> Profile:
    """Returns the profile of a bundle in this process.

    Sessions are opened and warmed up by two whole pictures before anything is timed. Components are timed on the
    inputs of a real sample.
    """
    manifest = bundle.manifest
    name = runtime or manifest.runtimes[0]
    schedule = manifest.schedule(manifest.default_steps if steps is None else steps)
    with _PeakMemory() as memory:
        sampler = open_sampler(bundle, runtime=name, threads=threads)
        prompt = manifest.prompts[0]
        inputs = example_inputs(manifest.contract.inputs, 0)
        for seed in range(2):
            sample = sampler(prompt, seed, schedule, inputs=inputs)
        latencies = []
        for component in manifest.components:
            feeds = [feed for feed in sample.feeds if feed.component == component]
            if not feeds:  # a network that other step counts call
                continue
            session = sampler.session(component)
            times = _times(lambda: session.run(feeds[0].inputs), runs * (2 if is_denoiser(component) else 1))  # noqa: B023
            latencies.append(_latency(component, len(feeds), times))
        picture = _latency("picture", 1, _times(lambda: sampler(prompt, 0, schedule, inputs=inputs), runs))
        sampler.close()
    sizes: dict[str, int] = {}
    for artifact in manifest.artifacts:
        if artifact.runtime == name:
            sizes[artifact.component] = sizes.get(artifact.component, 0) + artifact.bytes
    return Profile(name, schedule.steps, threads, tuple(latencies), picture, memory.growth_bytes, sizes)


def _times(call: Callable[[], object], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _latency(component: str, calls: int, times_ms: Sequence[float]) -> Latency:
    ordered = sorted(times_ms)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return Latency(component, calls, len(ordered), statistics.median(ordered), low, high)


class _PeakMemory:
    """Watches this process's resident memory from a thread, every few milliseconds."""

    def __enter__(self) -> _PeakMemory:
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth_bytes = max(self._peak, self._process.memory_info().rss) - self._start
