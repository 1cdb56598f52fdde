"""Channels: which entries of which weights belong to the same channel, and how channels are removed."""
