"""`finetuning_type: crosslore` in LLaMA-Factory.

The start-up hook (`_crosslore_hook`) calls `hooks.patch` for some modules of LLaMA-Factory right after they ran.
Where start-up files are not allowed: `python -m crosslore.integrations.llamafactory train config.yaml`.
"""
