"""Files on disk: what is written is whole or not there."""
