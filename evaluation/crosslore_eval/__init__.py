"""Scores of fine-tuned language models: generation, answer reading, and metrics with their signatures.

Importing this package loads nothing heavy; `crosslore_eval.generate` loads torch and transformers.
"""

__version__ = "0.1.0"
