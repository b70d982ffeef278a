"""Fine-tune a causal language model with DoRA: transformers' Trainer (or TRL's), PEFT, and dora_kernels beneath them.

    python examples/finetune.py                          a small Llama with random weights, bytes for tokens
    python examples/finetune.py --model FOLDER --bf16    a model and its tokenizer from a folder on this machine
    python examples/finetune.py ... --resume             the same run, from its last checkpoint on

The text is the source of a package in the standard library; nothing is downloaded. What is saved, each checkpoint and
at the end, is an ordinary PEFT adapter: PeftModel.from_pretrained(model, FOLDER) loads it with or without dora_kernels.
Needs pip install '.[demo]', and trl for --trl.
"""

import argparse
import warnings

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import dora_kernels

TEXT = ("json/*.py",)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="of a model and its tokenizer (default: a small Llama)")
    parser.add_argument("--out", default="finetuned", metavar="FOLDER", help="where checkpoints and the adapter go")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of an optimizer step")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate at the start, 0 at the end")
    parser.add_argument("--save-every", type=int, default=20, help="optimizer steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--bf16", action="store_true", help="base in bfloat16, adapters in float32, autocast")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile")
    parser.add_argument("--trl", action="store_true", help="TRL's SFTTrainer in place of transformers' Trainer")
    parser.add_argument("--stock", action="store_true", help="without dora_kernels, to compare with")
    return parser.parse_args(arguments)


def load(
    folder: str | None, dtype: torch.dtype
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The base model and its tokenizer, from a folder or new."""
    if folder is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model, transformers.AutoTokenizer.from_pretrained(folder)
    transformers.set_seed(0)  # the same random weights each time: an adapter fits the base that it was trained over
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.LlamaForCausalLM(config).to(dtype), tokenizer


def add_adapters(model: torch.nn.Module, rank: int) -> PeftModel:
    """DoRA on every linear layer but the head."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        use_dora=True,
        target_modules="all-linear",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.05,
    )
    transformers.set_seed(0)
    with warnings.catch_warnings():
        # PEFT 0.21 reads a model attribute that transformers 5 has renamed
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def sequences(tokenizer: transformers.PreTrainedTokenizerBase, length: int) -> list[dict[str, list[int]]]:
    """The text in pieces of `length` tokens."""
    ids = tokenizer(bytes(dora_kernels.demo.standard_library(TEXT)).decode(), add_special_tokens=False)["input_ids"]
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(arguments: list[str] | None = None) -> transformers.Trainer:
    options = parse(arguments)
    model, tokenizer = load(options.model, torch.bfloat16 if options.bf16 else torch.float32)
    model = add_adapters(model, options.rank)
    callbacks = []
    if not options.stock:
        print(dora_kernels.enable(model))
        # norms once an optimizer step, not once a micro-batch; under --compile no graph can keep them
        callbacks.append(dora_kernels.trainer.FrozenAdaptersCallback())
    rows = sequences(tokenizer, options.sequence)
    settings = {
        "output_dir": options.out,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": options.rate,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": options.bf16,
        "torch_compile": options.compile is not None,
        "torch_compile_backend": options.compile,
        "save_steps": options.save_every,
        "logging_steps": 1,
        "report_to": "none",
    }
    common = {"model": model, "processing_class": tokenizer, "callbacks": callbacks}
    if options.trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(args=SFTConfig(**settings), train_dataset=Dataset.from_list(rows), **common)
    else:
        trainer = transformers.Trainer(args=transformers.TrainingArguments(**settings), train_dataset=rows, **common)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
