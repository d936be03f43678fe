"""What holds a router at high learning rates: the penalty, any control of its norm, or just a slower gate?

    python -m studies.learning_rates run      # what is left of the runs; started twice with one --out, two processes share them
    python -m studies.learning_rates page     # docs/learning_rates.md, its pictures and tables, from the saved results

The protocol is study.toml; it was fixed before any test run. Two small language models (Mixtral's architecture with 8 experts,
top 2; OLMoE's with 32, top 4), byte tokens, text that comes with Python, AdamW with weight decay 0.01, clipping at 1, warm-up
over a tenth of the steps, cosine to zero. A seed draws weights and batches, the same in every arm: arms are compared in pairs.

- Strength: of three, the one with the lowest mean validation loss over the tuning rates and tuning seeds, which are in no test.
  Every arm that has a strength gets the same three-point search, our own penalty too.
- A run that diverges counts with the loss of a uniform guess, log 256 nats a byte.
- Outcomes, each with `none` by its side, seed by seed: the loss at the arm's own best rate (for each seed the rate that is best
  on the mean of the other seeds); the loss at twice and four times that rate; the mean over all rates of the loss above the
  arm's best, "sensitivity" of arXiv:2309.14322; dead experts; choices that change when the gate computes in bfloat16.
- Paired t tests over the seeds, Holm's correction over the arms of one model and outcome. Shown: the corrected p is below 0.05
  and the arm is better than none; refuted: below 0.05 and worse; not shown: anything else.

protocol  study.toml -> runs             results   saved runs -> numbers by arm and rate
arms      what each arm changes          claims    tests and verdicts
train     one run                        page, figures
"""
