"""The forms that a convolution can have, one file each; each names its source."""
