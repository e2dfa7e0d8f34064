"""The command lines of the package: options, help, messages. The work is done in other folders.

`pip install megatron-dwm` puts each on PATH (`megatron-dwm-plan`; pyproject.toml has the names).
From a clone it is the file of the same name in tools/. Training and the doctor are modules beside
this folder, because torchrun starts them: `-m megatron_dwm.pretrain`, `-m megatron_dwm.doctor`.
"""
