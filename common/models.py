"""The four networks of the project, each with a `width` that multiplies every channel count.

torch.export can follow all, which is how their permutation axes are found (common/align/axes.py).
To add a network: write a function (width, classes, input_shape) -> module here and name it in
MODELS.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.runtime.seeding import seeded


def channels(base: int, width: float) -> int:
    """Return base * width; raises UserError unless that is a whole number of channels."""
    count = base * width
    if count >= 2**31:
        raise UserError(f"--width {width:g} is too large: choose a smaller one")
    if count < 1 or abs(count - round(count)) > 1e-9:
        raise UserError(
            f"--width {width:g} turns {base} channels into {count:g}: choose one that gives whole "
            "channels"
        )
    return round(count)


def initialise(model: nn.Module, mode: str = "fan_in", zero_biases: bool = True) -> nn.Module:
    """Kaiming-normal weights of convolutions and linear layers, by fan-in or fan-out (He et al.
    2015); biases are zero or stay as PyTorch draws them.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None and zero_biases:
                nn.init.zeros_(module.bias)
    return model


def mlp(width: float, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Three hidden layers of 512 * width units, initialised as by He et al. (2015); our own."""
    hidden = channels(512, width)
    sizes = [input_shape[0] * input_shape[1] * input_shape[2], hidden, hidden, hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return initialise(nn.Sequential(*layers, nn.Linear(hidden, classes)))


def vgg11(width: float, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """VGG11 for small images: eight 3x3 convolutions with bias, no BatchNorm, one linear layer.

    Initialised as the authors' and REPAIR's VGG (torchvision's rule): convolutions Kaiming-normal
    by fan-out, the linear layer N(0, 0.01), biases zero. At the paper's learning rate of 0.08 it
    learns so; by fan-in it diverges in the first epoch, and with PyTorch's default, which the
    authors' configuration can leave, its loss is still that of guessing after 80 steps.
    """
    _, height, side = input_shape
    if min(height, side) < 32:
        raise UserError(
            f"vgg11 halves the image five times and needs 32 px or more, not {height}x{side}: use "
            "a larger --image-size"
        )
    layers: list[nn.Module] = []
    fan_in = input_shape[0]
    for entry in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if entry == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            fan_out = channels(entry, width)
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU()]
            fan_in = fan_out
    pixels = (height // 32) * (side // 32)
    model = initialise(
        nn.Sequential(*layers, nn.Flatten(), nn.Linear(fan_in * pixels, classes)), mode="fan_out"
    )
    nn.init.normal_(model[-1].weight, std=0.01)
    return model


class Block(nn.Module):
    """A basic residual block; where the shape changes, a strided 3x3 convolution with BN is the
    shortcut.
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(fan_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """The paper's CIFAR ResNet: 16, 32, 64 channels times width, three blocks a stage.

    Initialised as by the authors: weights Kaiming-normal by fan-in, the linear layer's bias as
    PyTorch draws it.
    """

    in_onednn = True  # on a CPU, where that is 1.15 times as fast (common/runtime/onednn.py)

    def __init__(self, width: float, classes: int, input_shape: tuple[int, int, int]):
        super().__init__()
        stem, *_, last = sizes = [channels(base, width) for base in (16, 32, 64)]
        self.conv1 = nn.Conv2d(input_shape[0], stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        blocks, fan_in = [], stem
        for stage, fan_out in enumerate(sizes):
            for position in range(3):
                blocks.append(
                    Block(fan_in, fan_out, stride=2 if stage > 0 and position == 0 else 1)
                )
                fan_in = fan_out
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(last, classes)
        initialise(self, zero_biases=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet50(width: float, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """torchvision's ResNet50 with every channel count times width, and torchvision's parameter
    names.
    """
    from common.vision import (
        torchvision,
    )  # here, because it takes seconds that small networks need not pay

    model = torchvision.models.resnet50(num_classes=classes)
    if width == 1:
        return model
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Conv2d):
            fan_in = 3 if name == "conv1" else channels(module.in_channels, width)
            wide = nn.Conv2d(
                fan_in,
                channels(module.out_channels, width),
                module.kernel_size,
                module.stride,
                module.padding,
                bias=False,
            )
            nn.init.kaiming_normal_(
                wide.weight, mode="fan_out", nonlinearity="relu"
            )  # as torchvision does
        elif isinstance(module, nn.BatchNorm2d):
            wide = nn.BatchNorm2d(channels(module.num_features, width))
        elif isinstance(module, nn.Linear):
            wide = nn.Linear(channels(module.in_features, width), classes)
        else:
            continue
        setattr(parent, name.rpartition(".")[2], wide)
    return model


MODELS = {"mlp": mlp, "vgg11": vgg11, "resnet20": ResNet20, "resnet50": resnet50}


def build_model(
    name: str,
    width: float = 1,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    seed: int = 0,
) -> nn.Module:
    """Build a network on the CPU, initialised from `seed` alone; input_shape is (channels, height,
    width in px).

    Raises UserError for an unknown name, a width that gives fractional channels, or too small an
    image.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    with seeded(seed):
        return MODELS[name](width, classes, tuple(input_shape))
