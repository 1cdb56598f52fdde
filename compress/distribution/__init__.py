"""One training on several devices of a machine, or on several machines: the batch is divided, the sum is the same."""
