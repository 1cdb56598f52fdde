"""VGG-16 for CIFAR-10: the published sizes."""

from __future__ import annotations

from compress.metrics.counts import count_macs, count_params
from compress.models.vgg import Vgg16

FILTERS = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
SIDES = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]


def test_vgg16_is_of_the_published_size():
    """Li et al. (arXiv 1608.08710), table 1: 3.13e8 multiply-adds, 1.5e7 parameters."""
    model = Vgg16().architecture((32, 32, 3), 10)
    kernels = [9 * inputs * filters for inputs, filters in zip([3, *FILTERS], FILTERS, strict=False)]
    dense = 512 * 512 + 512 * 10
    macs = sum(kernel * side**2 for kernel, side in zip(kernels, SIDES, strict=True)) + dense
    assert count_macs(model) == macs == 313_463_808
    # Kernels, scale and centre of each batch norm, the last biases.
    assert count_params(model) == sum(kernels) + dense + 2 * (sum(FILTERS) + 512) + 10
    assert sum(kernels) + dense == 14_977_728
