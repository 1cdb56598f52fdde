"""The forms that a factorized layer can have, one file each; a new one is a file here and a line below."""

from __future__ import annotations

from compress.strategies.lowrank.form import Form
from compress.strategies.lowrank.forms.channel import Channel
from compress.strategies.lowrank.forms.cp import Cp
from compress.strategies.lowrank.forms.dense import DenseProduct
from compress.strategies.lowrank.forms.spatial import Spatial
from compress.strategies.lowrank.forms.tensor_train import TensorTrain
from compress.strategies.lowrank.forms.tucker import Tucker


def forms() -> dict[str, Form]:
    """Return the forms by name."""
    return {form.name: form for form in (DenseProduct(), Channel(), Spatial(), Tucker(), Cp(), TensorTrain())}
