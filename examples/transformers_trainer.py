"""Hugging Face's Trainer with CrossLore, on the embedded model (make model) and bundled data, on a CPU.

python examples/transformers_trainer.py
"""

import json
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from crosslore.integrations.transformers import trainer_optimizer

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"

tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = json.loads((ROOT / "data" / "restaurants_train.json").read_text(encoding="utf-8"))[:48]
texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}{tokenizer.eos_token}" for row in rows]
dataset = [tokenizer(text, truncation=True, max_length=128) for text in texts]

args = TrainingArguments(
    output_dir=ROOT / "saves" / "trainer_example", per_device_train_batch_size=2, gradient_accumulation_steps=2,
    max_steps=6, learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
)  # fmt: skip
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL),
    args=args,
    train_dataset=dataset,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    optimizer_cls_and_kwargs=trainer_optimizer(args, "crosslore_plus", rank=16, gradients="compact"),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
