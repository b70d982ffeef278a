"""Everything decided before a call runs: the user's options, the device, the way, the tile configurations."""
