"""fewstep puts few-step generators on devices and proves that they compute what PyTorch computes.

```python
import fewstep

bundle = fewstep.build("stickers", recipe="fp32", targets=["onnxruntime"], out="build/stickers")
report = fewstep.verify(bundle).report
picture = fewstep.Bundle.open("build/stickers").generate("red apple", seed=7)
```

Importing it loads neither torch nor any runtime.
"""

from __future__ import annotations

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.contract import Contract
from fewstep.bundle.manifest import Artifact, Manifest
from fewstep.bundle.samples import Sample, StepFeed
from fewstep.bundle.schedule import Schedule
from fewstep.bundle.source import Lora, Replacement, SourceSpec
from fewstep.errors import FewstepError
from fewstep.pipeline.build import Options, build
from fewstep.pipeline.verify import Verification, verify
from fewstep.recipe.recipe import Limits, Recipe, load_recipe
from fewstep.runtimes.parity.harness import Check, ParityReport
from fewstep.runtimes.profiling import Profile, profile

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "Bundle",
    "Check",
    "Contract",
    "FewstepError",
    "Limits",
    "Lora",
    "Manifest",
    "Options",
    "ParityReport",
    "Profile",
    "Recipe",
    "Replacement",
    "Sample",
    "Schedule",
    "SourceSpec",
    "StepFeed",
    "Verification",
    "build",
    "load_recipe",
    "profile",
    "verify",
]
