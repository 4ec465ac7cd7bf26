"""The errors that fewstep raises on purpose.

```
FewstepError            exit status 2
├── SourceError         a generator cannot be loaded from what was given
├── ScheduleError       a scheduler is not a table of numbers
├── RecipeError         a recipe is malformed
├── ExportError         a component cannot be traced or lowered
├── CalibrationError    calibration data or ranges are missing, not finite or not reproducible
├── BundleError         a bundle is incomplete, altered or unsafe
├── StorageError        a disk is full or may not be written, or the stage cache is damaged
├── ContractError       arrays do not fit what the manifest promises
├── RuntimeMissingError a backend is not installed or cannot run here
└── ParityError         a parity limit was exceeded: exit status 1
```
"""

from __future__ import annotations


class FewstepError(Exception):
    """An error with a message (where, what was, what was expected) and a hint (what to do)."""

    exit_status = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class SourceError(FewstepError):
    """A generator cannot be loaded from what was given."""


class ScheduleError(FewstepError):
    """A scheduler is not a table of numbers (it is not linear, or draws noise in a way that cannot be replaced)."""


class RecipeError(FewstepError):
    """A recipe is malformed."""


class ExportError(FewstepError):
    """A component cannot be traced or lowered."""


class QuantizationError(FewstepError):
    """A quantization plan cannot be made, read or applied."""


class CalibrationError(FewstepError):
    """Calibration data or ranges are missing, not finite or not reproducible."""


class BundleError(FewstepError):
    """A bundle is incomplete, altered or unsafe."""


class StorageError(FewstepError):
    """A disk is full or may not be written, or the stage cache is damaged."""


class ContractError(FewstepError):
    """Arrays or models do not fit what the manifest promises."""


class RuntimeMissingError(FewstepError):
    """A backend is not installed or cannot run on this machine."""


class ParityError(FewstepError):
    """A parity limit was exceeded."""

    exit_status = 1
