"""compress: a model compression research framework for TensorFlow and Keras.

Importing this package imports no machine-learning library. It only says, before TensorFlow is
imported by anyone, that ``tf.keras`` means the Keras 2 API (``tf_keras``), which the TensorFlow Model
Optimization Toolkit needs, and that oneDNN computes.
"""

import os
import platform

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
if platform.machine().lower() in ("x86_64", "amd64"):
    # TensorFlow turns oneDNN on by itself where the processor has AVX-512 only. ResNet-20 trains 2.1 times as fast with
    # it on one with AVX2, and its other convolutions have no gradients for channels_first.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__version__ = "0.1.0"
