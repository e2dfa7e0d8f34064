"""One run: its checks, its start, the loop, its records and messages, and its end."""
