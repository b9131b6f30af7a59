"""How the tiny model was trained. Not needed at run time."""
