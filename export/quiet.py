"""Imports torchao before diffusers does, without what both say of the GPU kernels that a compiler does not need."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import util

_TALKERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Lets loggers report nothing less than errors, for the length of a block."""
    with ExitStack() as stack:
        for name in names:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


with errors_only(*_TALKERS):
    import diffusers.quantizers  # noqa: F401

    if util.find_spec("torchao") is not None:  # quantization alone needs it
        import torchao  # noqa: F401
