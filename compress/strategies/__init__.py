"""The strategies, one method in one file, in the families of Cheng et al. (arXiv 1710.09282)."""
