"""A model that is neither timm's nor torchvision's, and functions that build it, for tests of files."""

from torch import nn

from lightning_acu import ACUConv2d


class Net(nn.Module):
    """(N, 3, H, W) to (N, classes): a stem, a depthwise layer, one that is active by itself, and a head."""

    def __init__(self, width=8, classes=5, stride=1):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, (3, 5), padding=(1, 2), groups=width)
        self.cross = ACUConv2d.from_positions(width, 6, [(-1, 0), (0, -1), (0, 0.5), (0, 0)])
        self.head = nn.Linear(6, classes)

    def forward(self, image):
        """The classes' numbers."""
        return self.head(self.cross(self.depthwise(self.norm(self.stem(image)).relu())).mean((-2, -1)))


def build(width=8, classes=5):
    """A Net."""
    return Net(width, classes)


def build_list():
    """Something other than a model."""
    return [1]


build_lambda = lambda: Net()  # noqa: E731
