"""Results as a run would have written them, for tests of what reads them."""

import dataclasses
from types import ModuleType
from typing import Any

ACCURACY = {"accuracy_strict": (30.0, 28.0, 32.0), "accuracy_flexible": (34.0, 31.5, 36.5)}
E2E = {
    **{"BLEU": (60.0, 58.5, 61.5), "NIST": (4.9, 4.8, 5.0), "METEOR": (35.0, 34.0, 36.0)},
    **{"ROUGE_1": (66.0, 65.0, 67.0), "ROUGE_2": (35.0, 34.0, 36.0), "ROUGE_L": (43.0, 42.0, 44.0)},
    **{"CIDEr": (1.2, 1.1, 1.3), "e2e-official/BLEU": (0.64, 0.62, 0.66)},
}
SUMMARY = {"ROUGE_1": (33.0, 32.0, 34.0), "ROUGE_2": (12.0, 11.0, 13.0), "ROUGE_L": (24.0, 23.0, 25.0)}
BY_DATASET = {"gsm8k": ACCURACY, "mawps": ACCURACY, "e2e": E2E, "cnn_dm": SUMMARY, "xsum": SUMMARY}


def sample(results: ModuleType, *, add: float = 0.0, status: str = "ok", **changes: Any) -> Any:
    """Return a plausible result; `changes` are of its identity or its own fields, `add` goes to every score."""
    names = {field.name for field in dataclasses.fields(results.Identity)}
    chosen = {
        **{"table": "table1", "profile": "paper", "model": "llama2-7b", "method": "crosslore"},
        **{"dataset": "gsm8k", "rank": 128, "seed": 1},
        **{name: value for name, value in changes.items() if name in names},
    }
    scores = {
        name: results.Score(value=v + add, low=low + add, high=high + add, signature=f"{name}|protocol:paper|v:0.1.0")
        for name, (v, low, high) in BY_DATASET[chosen["dataset"]].items()
    }
    reasons = {"oom": "CUDA out of memory. Tried to allocate 172.00 MiB", "failed": "exit status 1"}
    fields = {
        "experiment": results.Identity(**chosen),
        "status": status,
        "reason": reasons.get(status, ""),
        "config": {"finetuning_type": chosen["method"], "rank": chosen["rank"], "learning_rate": 1e-6},
        "config_hash": "0123456789abcdef",
        "commit": "abc123def456",
        "packages": {"torch": "2.11.0", "llamafactory": "0.9.5"},
        "data": {
            "train": results.DataFile(sha256="a" * 64, rows=7473),
            "test": results.DataFile(sha256="b" * 64, rows=1319),
        },
        "device": results.Device(name="NVIDIA RTX 4090", kind="cuda", threads=8),
        "hours": 0.95 if status == "ok" else None,
        "peak_gib": {"allocated": 14.9, "reserved": 15.81, "rss": 3.2, "rss_above_loaded": 0.4},
        "train": {"steps": 7473, "loss_last": 0.41, "trainable_parameters": 6738415616},
        "scores": scores if status == "ok" else {},
        "finished": "2026-11-25T14:16:58Z",
    }
    fields.update({name: value for name, value in changes.items() if name not in names})
    return results.Result(**fields)
