"""How files are written, and the formats that more than one folder reads: each spelled once.

    atomic.py          files and folders that are whole under their own name, or not there
    lock.py            one process at a time, by a lock on a file
    dataset_paths.py   the files of an indexed dataset, by its prefix
    index_format.py    PREFIX.idx: lengths, offsets and document borders
    sidecar_format.py  PREFIX.meta.parquet: columns and facts of a dataset's documents
    sidecar_columns.py its columns as arrays
    json_lines.py      numbered lines, and values by dotted names
    command_names.py   what a user types to start a command: in a clone, or installed

Nothing here knows the rest of the package. Errors are `OSError` (the disk) and `ValueError` (the
content); whoever knows what the user typed makes a `UserError` of them.
"""
