"""One run: its start and its checks, the loop, its records, what it says and when it ends."""
