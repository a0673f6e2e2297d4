"""The fewest lines for a Hugging Face ``Trainer``: one callback. ``python examples/hf_trainer.py``"""

from finetune import BATCH, LEARNING_RATE, collator, load_base, training_rows
from transformers import Trainer, TrainingArguments

from vocabguard.integrations.huggingface import VocabGuardCallback

STEPS = 60

model, tokenizer = load_base()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/hf_trainer",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    ),
    train_dataset=training_rows(tokenizer, STEPS, seed=0),
    data_collator=collator(tokenizer),
    processing_class=tokenizer,
    callbacks=[VocabGuardCallback(overrides=["drift.every_n_steps=20"])],  # this line is all
)
trainer.train()
