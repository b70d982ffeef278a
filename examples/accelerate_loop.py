"""A training loop of your own with Hugging Face accelerate: DoRA by PEFT, dora_kernels beneath it.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py --bf16

`accumulate` takes optimizer steps in the middle of the loop, so one `frozen_adapters` stands around all of it: a step
ends the reuse of what was made before it, and the next micro-batch makes the norms of all layers anew, in one launch.
"""

import argparse
import contextlib
import itertools

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from finetune import add_adapters, load, sequences

import dora_kernels


def main(arguments: list[str] | None = None) -> list[float]:
    """Returns the loss of each micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="of a model and its tokenizer (default: a small Llama)")
    parser.add_argument("--out", default="finetuned", metavar="FOLDER", help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of an optimizer step")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--bf16", action="store_true", help="base in bfloat16, adapters in float32, autocast")
    parser.add_argument("--stock", action="store_true", help="without dora_kernels, to compare with")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(
        mixed_precision="bf16" if options.bf16 else "no",
        # the end of an epoch cuts no optimizer step short
        gradient_accumulation_plugin=GradientAccumulationPlugin(options.accumulate, sync_with_dataloader=False),
    )
    model, tokenizer = load(options.model, torch.bfloat16 if options.bf16 else torch.float32)
    model = add_adapters(model, options.rank).train()
    if not options.stock:
        accelerator.print(dora_kernels.enable(model))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.AdamW(trainable, lr=options.rate),
        torch.utils.data.DataLoader(
            sequences(tokenizer, options.sequence),
            batch_size=options.batch,
            shuffle=True,
            drop_last=True,
            collate_fn=transformers.default_data_collator,
        ),
    )
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    losses = []
    with contextlib.nullcontext() if options.stock else dora_kernels.frozen_adapters(model):
        for batch in itertools.islice(epochs, options.steps * options.accumulate):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if accelerator.sync_gradients:
                accelerator.print(f"step {len(losses) // options.accumulate}: loss {losses[-1]:.4f}")
    accelerator.unwrap_model(model).save_pretrained(options.out, is_main_process=accelerator.is_main_process)
    return losses


if __name__ == "__main__":
    main()
