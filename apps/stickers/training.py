"""What the training scripts share: the work folder, resumable state, thread control, learning-rate schedule, EMA."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

# Compiled kernels follow torch.set_num_threads instead of freezing the count of the first call.
torch._inductor.config.cpp.dynamic_threads = True

WORK = Path(os.environ.get("STICKERS_WORK", "build/stickers-train"))


def save_state(path: Path, state: dict[str, object]) -> None:
    """Writes a resumable state (ours, read back with ``weights_only=True``), atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """Returns the state of an interrupted run, or None."""
    return torch.load(path, weights_only=True) if path.exists() else None


def steps(first: int, last: int, *, say_every: int = 50) -> Iterator[int]:
    """Yields step numbers, sets the thread count from ``WORK/threads`` where that file exists, and logs the pace.

    The thread file lets a long run be slowed down or sped up while it goes: ``echo 1 > build/stickers-train/threads``.
    """
    threads = WORK / "threads"
    started = time.perf_counter()
    for step in range(first, last):
        if (step - first) % 10 == 0 and threads.exists():
            text = threads.read_text().strip()
            if text.isdigit() and int(text) != torch.get_num_threads():
                torch.set_num_threads(int(text))
        yield step
        if step == first + 9 or (step + 1) % say_every == 0:
            pace = (time.perf_counter() - started) / (step + 1 - first)
            print(f"step {step + 1}/{last}  {pace:.3f} s/step", end="  ", file=sys.stderr, flush=True)


def learning_rate(step: int, last: int, *, peak: float, warmup: int = 200, decay: float = 0.25) -> float:
    """Returns a linear warm-up, a plateau, and a linear decay to zero over the last ``decay`` of the run.

    The plateau makes it cheap to change one's mind about the length of a run that is under way.
    """
    return peak * min(1.0, (step + 1) / warmup, (last - step) / (decay * last))


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Moves ``ema`` towards ``model``, in place."""
    theirs = [p.detach() for p in model.parameters()]
    torch._foreach_lerp_([p.detach() for p in ema.parameters()], theirs, 1 - decay)
