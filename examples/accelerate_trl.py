"""A plain TRL GRPO script, and the three lines that put the hybrid engine under it.

    python examples/accelerate_trl.py

Trains a small random Llama for a few steps twice, without and with the three lines, and prints the
time that generation took. Needs `pip install trl`.
"""

import time

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

import hybrid_engine  # line 1
from rlhf.data import train_tokenizer

QUESTIONS = [f"add {a} and {b}" for a in range(10) for b in range(10)]


def reward_many_digits(completions: list[str], **columns: object) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def train(*, accelerated: bool) -> tuple[float, int]:
    """Seconds of generation in a short run, and how many calls the engine served."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(QUESTIONS, vocab_size=400)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model: PreTrainedModel = LlamaForCausalLM(config)
    if accelerated:
        hybrid_engine.accelerate(model)  # line 2
    options = GRPOConfig(
        output_dir="runs/trl", max_steps=3, per_device_train_batch_size=16, num_generations=8,
        max_completion_length=64, report_to="none", use_cpu=True, bf16=False, logging_steps=1,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, args=options, reward_funcs=reward_many_digits,
        train_dataset=Dataset.from_dict({"prompt": QUESTIONS}),
    )  # fmt: skip
    seconds = 0.0
    generate = trainer._generate_single_turn

    def timed(*args: object, **kwargs: object) -> object:
        nonlocal seconds
        start = time.perf_counter()
        try:
            return generate(*args, **kwargs)
        finally:
            seconds += time.perf_counter() - start

    trainer._generate_single_turn = timed
    trainer.train()
    state = hybrid_engine.acceleration(model)
    hybrid_engine.restore(model)  # line 3, if the model is used on without the engine
    return seconds, state.served if state else 0


if __name__ == "__main__":
    plain, _ = train(accelerated=False)
    engine, served = train(accelerated=True)
    print(f"generation with TRL alone:        {plain:.2f} s")
    print(f"with the hybrid engine under it:  {engine:.2f} s ({served} calls)")
    print(f"speed-up:                         {plain / engine:.1f}x")
