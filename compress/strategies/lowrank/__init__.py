"""Low-rank factorization: one layer as a product of smaller ones."""
