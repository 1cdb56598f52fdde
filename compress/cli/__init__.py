"""What the entry points share; with them, the only code that knows Hydra."""
