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

from fewstep.build import Options, build
from fewstep.bundle import Bundle
from fewstep.contract import Contract
from fewstep.errors import FewstepError
from fewstep.feeds import Sample, StepFeed
from fewstep.manifest import Artifact, Manifest
from fewstep.recipe import Limits, Recipe, load_recipe
from fewstep.runtimes.measure import Profile, profile
from fewstep.runtimes.parity import Check, ParityReport
from fewstep.schedule import Schedule
from fewstep.source import Lora, Replacement, SourceSpec
from fewstep.verify import Verification, verify

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
