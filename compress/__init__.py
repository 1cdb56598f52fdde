"""compress: a model compression research framework for TensorFlow and Keras.

Importing this package imports no machine-learning library. It only says, before TensorFlow is
imported by anyone, that ``tf.keras`` means the Keras 2 API (``tf_keras``), which the TensorFlow Model
Optimization Toolkit needs.
"""

import os

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__version__ = "0.1.0"
