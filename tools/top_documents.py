"""megatron-dwm-documents, from a clone (megatron_dwm/commands/top_documents.py)."""

from megatron_dwm.commands.top_documents import command

if __name__ == "__main__":
    command()
