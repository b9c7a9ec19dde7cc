"""torchvision, imported so that a CPU build of torch is enough.

The package index serves torchvision built for CUDA. Beside a CPU-only torch its compiled operators
(box operations, which this project does not use) cannot load, and its import then stops where it
registers them. Leaving that one module out lets models, data sets and transforms work everywhere.
"""

import sys
import types

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    skipped = "torchvision._meta_registrations"
    sys.modules[skipped] = types.ModuleType(skipped)
    import torchvision

from torchvision.transforms import v2  # noqa: E402  only after torchvision itself is in

__all__ = ["torchvision", "v2"]
