"""Names of files in a run directory that several folders know."""

from __future__ import annotations

STOPPED = ".stopped"
"""the file `stop` ended the last attempt, so no scheduler should go on with the run by itself"""
