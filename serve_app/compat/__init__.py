"""Names that libraries keep to themselves, and that the service cannot do without; one function for each.

Each function says which library's name it uses, the version it was tested with, and what is lost without it.
`tests/test_compat.py` has a test for each, which fails first and by name when an upgrade removes the name.

Knows nothing of the service. Libraries are imported when a function is called, since few processes need all of them.
"""
