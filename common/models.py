"""The four network architectures; `width` multiplies every channel count.

To add one, write a function (width, classes, input_shape) -> module and add it to MODELS.
Its permutation axes are derived from its graph (common/align/axes.py).
"""

import math
from textwrap import shorten

from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.runtime.seeding import seeded


def channels(base: int, width: float) -> int:
    """Return base * width. Raises UserError unless it is a positive whole number."""
    count = base * width
    if not 1 <= count < 2**31 or abs(count - round(count)) > 1e-9:
        raise UserError(
            f"--width {width:g} turns {base} channels into {count:g}: choose a width that gives "
            "a whole number"
        )
    return round(count)


def initialise(model: nn.Module, mode: str = "fan_in", zero_biases: bool = True) -> nn.Module:
    """Draw convolution and linear weights from the Kaiming normal distribution (He et al. 2015).

    Sets biases to zero, or keeps PyTorch's default initialisation. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None and zero_biases:
                nn.init.zeros_(module.bias)
    return model


def mlp(width: float, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Three hidden layers of 512 * width units, Kaiming-normal weights; not in the paper."""
    hidden, pixels = channels(512, width), math.prod(input_shape)
    layers = [nn.Flatten()]
    for fan_in in (pixels, hidden, hidden):
        layers += [nn.Linear(fan_in, hidden), nn.ReLU()]
    return initialise(nn.Sequential(*layers, nn.Linear(hidden, classes)))


def vgg11(width: float, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """VGG11 for small images: eight 3x3 convolutions with bias, no BatchNorm, one linear layer.

    Initialised like the VGG of the authors, of REPAIR and of torchvision: Kaiming-normal (fan-out)
    convolutions, linear weights N(0, 0.01), zero biases. This trains at the paper's learning rate
    of 0.08. With fan-in it diverges in the first epoch. With PyTorch's default, which the authors'
    configuration also allows, the loss stays at chance level for at least 80 steps.
    """
    fan_in, image_height, image_width = input_shape
    if min(image_height, image_width) < 32:
        size = f"{image_height}x{image_width}"
        raise UserError(f"vgg11 needs 32 px or more, not {size}: set --image-size")
    layers = []
    for layer in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if layer == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            fan_out = channels(layer, width)
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU()]
            fan_in = fan_out
    features = fan_in * (image_height // 32) * (image_width // 32)
    layers += [nn.Flatten(), nn.Linear(features, classes)]
    model = initialise(nn.Sequential(*layers), mode="fan_out")
    nn.init.normal_(model[-1].weight, std=0.01)
    return model


class Block(nn.Module):
    """A basic residual block; the shortcut is the identity or a strided 3x3 convolution with BN."""

    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            strided = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
            self.shortcut = nn.Sequential(strided, nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """The paper's CIFAR ResNet: three stages of three blocks with 16, 32, 64 channels times width.

    Initialised as in the authors' code: Kaiming-normal (fan-in) weights, PyTorch's default bias in
    the linear layer.
    """

    def __init__(self, width: float, classes: int, input_shape: tuple[int, int, int]):
        super().__init__()
        first, second, third = (channels(base, width) for base in (16, 32, 64))
        self.conv1 = nn.Conv2d(input_shape[0], first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        blocks = []
        for fan_in, fan_out, stride in ((first, first, 1), (first, second, 2), (second, third, 2)):
            blocks.append(Block(fan_in, fan_out, stride))
            blocks += [Block(fan_out, fan_out, 1) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(third, classes)
        initialise(self, zero_biases=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet50(width: float, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """torchvision's ResNet50, with its parameter names, and all channel counts times width."""
    from common.vision import torchvision  # imported here because it takes seconds

    model = torchvision.models.resnet50(num_classes=classes)
    for name, module in list(model.named_modules()) if width != 1 else ():
        if isinstance(module, nn.Conv2d):
            fan_in = 3 if name == "conv1" else channels(module.in_channels, width)
            shape = module.kernel_size, module.stride, module.padding
            wide = nn.Conv2d(fan_in, channels(module.out_channels, width), *shape, bias=False)
            # Same initialisation as in torchvision.
            nn.init.kaiming_normal_(wide.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            wide = nn.BatchNorm2d(channels(module.num_features, width))
        elif isinstance(module, nn.Linear):
            wide = nn.Linear(channels(module.in_features, width), classes)
        else:
            continue
        model.set_submodule(name, wide)
    return model


MODELS = {"mlp": mlp, "vgg11": vgg11, "resnet20": ResNet20, "resnet50": resnet50}


def build_model(
    name: str,
    width: float = 1,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    seed: int = 0,
) -> nn.Module:
    """Build a network on the CPU; `seed` alone determines its initialisation.

    `input_shape` is (channels, height, width) in px. Raises UserError for an unknown name, a width
    that gives fractional channels, or an image that is too small.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    with seeded(seed):
        return MODELS[name](width, classes, tuple(input_shape))


def check_fits(state: dict[str, Tensor], model: nn.Module, path: object, name: str) -> None:
    """Load the state dict read from `path` into `model`; raises UserError if it does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        details = shorten(str(error).partition("\n")[2], 200)
        raise UserError(f"{path} does not fit {name}: {details}") from error
