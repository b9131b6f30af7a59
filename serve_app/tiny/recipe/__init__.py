"""The training of the tiny model. Not needed at run time."""
