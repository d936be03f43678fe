"""Which gates let the paper's network train, as depth and rate grow? And do the paper's tables come out where it trains badly?

    python -m studies.trainability run --photos FOLDER    # what is left; started twice with one --out, two processes share it
    python -m studies.trainability page                   # docs/trainability.md, its pictures and tables

The protocol is study.toml, fixed before any run: the network of section 3.1 of arXiv:2601.03889 (no residual), eight epochs,
four experts a layer, 2 to 8 layers, on ten digits of 16 pixels and four classes of photos of 32; ten arms, all on the same
seeds, twenty of them at the edge. A network counts as trained from twice chance on.

- Share that trains: Fisher's exact test of each arm against its control, Holm's correction over all arms and conditions.
- Accuracy, seed by seed: paired t test against the control, Holm's correction likewise.
- Control: `linear+balance` for the linear arms and for `prototypes+balance`; `prototypes+balance` for all that adds to it.
- Shown: corrected p below 0.05 and better; refuted: below 0.05 and worse; not shown: anything else.
- The paper's tables 1 and 2, with its one-shot test, at the rate at which the linear gate is about as good as it is there.

The runs are those of `studies.reproduction`'s stages "failure" and "main", by its code; here are the protocol and the page.
"""
