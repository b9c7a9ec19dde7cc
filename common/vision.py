"""Import torchvision, also where its build does not match a CPU-only build of torch.

The default torchvision wheel is built for CUDA. With a CPU-only torch its compiled operators (box
operations, which this project does not use) cannot load, and `import torchvision` fails where it
registers them. Without that one module, models, data sets and transforms work everywhere.
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

from torchvision.transforms import v2  # noqa: E402  must follow the import of torchvision

__all__ = ["torchvision", "v2"]
