"""What the training scripts share: the work folder, resumable state, thread control, learning-rate schedule, EMA."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

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


def has_fast_bfloat16() -> bool:
    """Returns whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def training_precision() -> AbstractContextManager[object]:
    """Returns bfloat16 autocast where the CPU has it, else float32.

    A CPU without it emulates it. Measured on an EPYC with AVX2 alone, in processor time of one core: one call of the
    denoiser with its gradients, batch 2, 0.6 s in float32 and 2.8 s in bfloat16.
    """
    return torch.autocast("cpu", torch.bfloat16) if has_fast_bfloat16() else nullcontext()


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` with its matrix products in float32, for CPUs on which bfloat16 is emulated.

    The same update, defaults and state as torch's with ``adjust_lr_fn="match_rms_adamw"``.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Applies the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Returns nearly the nearest orthogonal matrix: five Newton-Schulz steps, Jordan et al. (2024)'s polynomial."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class MuonAdamW:
    """Muon for the weights of linear maps and convolutions, AdamW for everything else, stepped as one optimizer.

    Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before it is applied. A convolution's kernel
    [O, I, h, w] counts as the matrix [O, h w I]. Updates are scaled to the size of AdamW's (Liu et al. 2025,
    arXiv:2502.16982), so that both share one learning rate. Measured on the teacher, same batches, constant
    rate: its loss fell 0.0086 in the time in which AdamW's fell 0.0030, with iterations a quarter longer.
    """

    def __init__(self, networks: Sequence[tuple[torch.nn.Module, float]], peak: float) -> None:
        """Takes each network with the scale of its learning rate; kernels must be in channels_last order."""
        self._pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        muon, adamw = [], []
        for network, scale in networks:
            tables = {id(m.weight) for m in network.modules() if isinstance(m, torch.nn.Embedding)}
            matrices = [p for p in network.parameters() if p.ndim >= 2 and id(p) not in tables]
            rest = [p for p in network.parameters() if p.ndim < 2 or id(p) in tables]
            muon.append({"params": [self._matrix(p) for p in matrices], "scale": scale})
            adamw.append({"params": rest, "scale": scale})
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(muon, lr=peak, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
            if has_fast_bfloat16()
            else Muon(muon, lr=peak, weight_decay=1e-2),
            torch.optim.AdamW(adamw, lr=peak, betas=(0.9, 0.99), weight_decay=1e-2, fused=True),
        )

    def _matrix(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        view = torch.nn.Parameter(self._flat(parameter.detach()))
        if view.data_ptr() != parameter.data_ptr():
            raise ValueError(f"a kernel {list(parameter.shape)} is not in channels_last order")
        self._pairs.append((parameter, view))
        return view

    @staticmethod
    def _flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.ndim == 2 else tensor.permute(0, 2, 3, 1).reshape(len(tensor), -1)

    def step(self, rate: float) -> None:
        """Applies the gradients at a learning rate, and forgets them."""
        for parameter, view in self._pairs:
            assert parameter.grad is not None
            view.grad = self._flat(parameter.grad)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter, _ in self._pairs:
            parameter.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the states of both optimizers."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Takes over what `state_dict` returned."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


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
