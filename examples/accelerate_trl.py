"""A plain TRL GRPO script, and the three lines that put the hybrid engine under it.

    python examples/accelerate_trl.py

Trains a small random Llama to write digits. Needs `pip install trl`.
"""

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

import hybrid_engine  # line 1
from rlhf.data import train_tokenizer

QUESTIONS = [f"add {a} and {b}" for a in range(10) for b in range(10)]


def share_of_digits(completions: list[str], **columns: object) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


if __name__ == "__main__":
    torch.manual_seed(0)
    tokenizer = train_tokenizer(QUESTIONS, vocab_size=400)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    hybrid_engine.accelerate(model)  # line 2
    options = GRPOConfig(
        output_dir="runs/trl", max_steps=20, per_device_train_batch_size=16, num_generations=8,
        max_completion_length=64, learning_rate=1e-3, report_to="none", use_cpu=True, bf16=False,
        logging_steps=5, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, args=options, reward_funcs=share_of_digits,
        train_dataset=Dataset.from_dict({"prompt": QUESTIONS}),
    )  # fmt: skip
    trainer.train()
    print(f"rollouts: {hybrid_engine.measure_speedup(model, batch=16):.1f}x as fast")  # line 3
