"""The same network for images of another size."""

from __future__ import annotations

import tf_keras

from compress.errors import CompressError
from compress.graph.rewrite import rewrite


def with_input_size(model: tf_keras.Model, size: tuple[int | None, int | None]) -> tf_keras.Model:
    """Return a flat copy of the model that reads images of this height and width; None: of any.

    Raises:
        CompressError: if the model reads no images, or a layer of it asks for maps of one size.
    """
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    wanted = " x ".join("any" if part is None else str(part) for part in size)
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise CompressError(
            f"model {model.name}",
            expected="a model with one input of images [height, width, channels]",
            received=f"inputs of shape {shapes}",
            fix="Leave its size as it is.",
        )
    try:
        return rewrite(model, size=size)
    except ValueError as error:
        # Keras' word for a layer that was built for another shape, or a map that has become too small.
        raise CompressError(
            f"model {model.name}",
            expected=f"layers that take images of {wanted} pixels",
            received=str(error).splitlines()[0][:200],
            fix="Give the model a head that reads maps of any size (strategy=convolutional_head), or a size that is "
            "large enough for its strides.",
        ) from error
