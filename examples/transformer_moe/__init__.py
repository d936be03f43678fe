"""`wrap_moe` on language models of transformers: `python -m examples.transformer_moe --help`.

config   every flag, its default and its rules           measure  losses and routing on the validation text
data     text by domain, splits, windows of tokens       study    all arms and seeds, saved as it goes
sources  where the text comes from                       summary  the numbers of a run, intervals, paired differences
model    a small MoE of any architecture, or yours       report   tables as text and Markdown
arms     what each arm adds to the loss                  figures  pictures
train    transformers' Trainer, checkpoints

finetune is a study of its own, a trained model on one domain: `python -m examples.transformer_moe.finetune --help`; its numbers
are in finetune_summary.

Flags, files, progress bars and intervals come from `examples.shared`.
"""
