"""The four networks of the project, each with a `width` that multiplies every channel count.

To add a network: write a function (width, classes, input_shape) -> module here and name it in
MODELS. Its permutation axes are read off its graph (common/align/axes.py).
"""

import math
from textwrap import shorten

from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.runtime.seeding import seeded


def channels(base: int, width: float) -> int:
    """Return base * width; raises UserError unless that is a whole number of channels."""
    count = base * width
    if not 1 <= count < 2**31 or abs(count - round(count)) > 1e-9:
        raise UserError(
            f"--width {width:g} turns {base} channels into {count:g}: choose one that gives a "
            "whole number of them"
        )
    return round(count)


def initialise(model: nn.Module, mode: str = "fan_in", zero_biases: bool = True) -> nn.Module:
    """Kaiming-normal weights of convolutions and linear layers (He et al. 2015).

    Biases are zero or stay as PyTorch draws them.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None and zero_biases:
                nn.init.zeros_(module.bias)
    return model


def mlp(width: float, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Three hidden layers of 512 * width units, initialised as by He et al. (2015); our own."""
    hidden, pixels = channels(512, width), math.prod(input_shape)
    layers = [nn.Flatten()]
    for fan_in in (pixels, hidden, hidden):
        layers += [nn.Linear(fan_in, hidden), nn.ReLU()]
    return initialise(nn.Sequential(*layers, nn.Linear(hidden, classes)))


def vgg11(width: float, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """VGG11 for small images: eight 3x3 convolutions with bias, no BatchNorm, one linear layer.

    Initialised as the authors' and REPAIR's VGG (torchvision's rule): convolutions Kaiming-normal
    by fan-out, the linear layer N(0, 0.01), biases zero. At the paper's learning rate of 0.08 it
    learns so; by fan-in it diverges in the first epoch, and with PyTorch's default, which the
    authors' configuration can leave, its loss is still that of guessing after 80 steps.
    """
    fan_in, height, side = input_shape
    if min(height, side) < 32:
        raise UserError(f"vgg11 needs 32 px or more, not {height}x{side}: set --image-size")
    layers = []
    for entry in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if entry == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            fan_out = channels(entry, width)
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU()]
            fan_in = fan_out
    layers += [nn.Flatten(), nn.Linear(fan_in * (height // 32) * (side // 32), classes)]
    model = initialise(nn.Sequential(*layers), mode="fan_out")
    nn.init.normal_(model[-1].weight, std=0.01)
    return model


class Block(nn.Module):
    """A basic residual block; its shortcut is a strided 3x3 convolution with BN or nothing."""

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
    """The paper's CIFAR ResNet: 16, 32, 64 channels times width, three blocks a stage.

    Initialised as by the authors: weights Kaiming-normal by fan-in, the linear layer's bias as
    PyTorch draws it.
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
    """torchvision's ResNet50, by its parameter names, with every channel count times width."""
    from common.vision import torchvision  # here, because it takes seconds that others need not pay

    model = torchvision.models.resnet50(num_classes=classes)
    for name, module in list(model.named_modules()) if width != 1 else ():
        if isinstance(module, nn.Conv2d):
            fan_in = 3 if name == "conv1" else channels(module.in_channels, width)
            shape = module.kernel_size, module.stride, module.padding
            wide = nn.Conv2d(fan_in, channels(module.out_channels, width), *shape, bias=False)
            # As torchvision does.
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
    """A network on the CPU, from `seed` alone; input_shape is (channels, height, width in px).

    Raises UserError for an unknown name, a fraction of a channel, or too small an image.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    with seeded(seed):
        return MODELS[name](width, classes, tuple(input_shape))


def check_fits(state: dict[str, Tensor], model: nn.Module, path: object, name: str) -> None:
    """Raise UserError unless the model `name` takes a state dict, read from `path`."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        found = shorten(str(error).partition("\n")[2], 200)
        raise UserError(f"{path} does not fit {name}: {found}") from error
