"""megatron-dwm-merge, from a clone (megatron_dwm/commands/merge_datasets.py)."""

from megatron_dwm.commands.merge_datasets import command

if __name__ == "__main__":
    command()
