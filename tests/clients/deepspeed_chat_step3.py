"""The rollout of a DeepSpeed-Chat step-3 script, as its authors write it.

    python tests/clients/deepspeed_chat_step3.py plain accelerated

`deepspeed.initialize` wraps the actor; prompts are left-padded to one length; the script generates
through `engine.module`, trains a step on what came out, and generates again. Prints one JSON record
for each of the runs asked for.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

import deepspeed
import torch
from transformers import OPTConfig, OPTForCausalLM

PAD, EOS, PROMPT_LENGTH, ANSWER_LENGTH = 1, 2, 12, 16


def main(runs: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOCAL_RANK"] = "0"
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiles for minutes
        for run in runs:
            print(json.dumps(train(accelerate=run == "accelerated")))
        torch.distributed.destroy_process_group()


def train(*, accelerate: bool) -> dict[str, object]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    actor = OPTForCausalLM(OPTConfig(
        vocab_size=128, hidden_size=48, word_embed_proj_dim=48, ffn_dim=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=PAD, eos_token_id=EOS,
        dropout=0.0,
    ))  # fmt: skip
    if accelerate:
        import hybrid_engine

        hybrid_engine.accelerate(actor)
    engine, *_ = deepspeed.initialize(model=actor, model_parameters=actor.parameters(), config={
        "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    })  # fmt: skip
    prompts = torch.randint(3, 128, (4, PROMPT_LENGTH))
    for row, length in enumerate((12, 3, 7, 1)):
        prompts[row, : PROMPT_LENGTH - length] = PAD
    sequences, losses, seconds = [], [], []
    for _ in range(3):
        start = time.process_time()
        sequences.append(generate_sequence(engine, prompts))
        seconds.append(time.process_time() - start)
        engine.train()
        mask = sequences[-1].ne(PAD).long()
        loss = engine(sequences[-1], attention_mask=mask, labels=sequences[-1]).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    report: dict[str, object] = {
        "sequences": [tokens.tolist() for tokens in sequences], "losses": losses,
        "rollout_seconds": seconds,
    }  # fmt: skip
    if accelerate:
        state = hybrid_engine.acceleration(engine)
        assert state is not None
        report |= {"served": state.served, "fallbacks": state.fallbacks}
    return report


def generate_sequence(engine: deepspeed.DeepSpeedEngine, prompts: torch.Tensor) -> torch.Tensor:
    engine.eval()
    with torch.no_grad():
        return engine.module.generate(
            prompts,
            attention_mask=prompts.ne(PAD),
            max_length=PROMPT_LENGTH + ANSWER_LENGTH,
            pad_token_id=PAD,
            synced_gpus=False,
            do_sample=False,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
