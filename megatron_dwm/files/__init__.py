"""How files are written, and the formats that more than one folder reads: each spelled once.

    atomic.py          files and folders that are whole under their own name, or not there
    lock.py            one process at a time

Nothing here knows the rest of the package. Errors are `OSError` (the disk) and `ValueError` (the
content); whoever knows what the user typed makes a `UserError` of them.
"""
