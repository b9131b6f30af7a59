"""Write the reference pages from the code; see `__main__`."""
