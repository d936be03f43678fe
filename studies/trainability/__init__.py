"""Which gates let the paper's network train, as depth and rate grow?

    python -m studies.trainability run [--out FOLDER]     # what is left; started twice with one --out, two processes share it
    python -m studies.trainability page                   # docs/trainability.md, its picture and table, from the saved results

The protocol is study.toml, fixed before any run: the network of section 3.1 of arXiv:2601.03889 (no residual) on all ten
digits, 16 pixels, eight epochs, four experts a layer; 2 to 8 layers, Adam at 1e-3 to 1e-2, twenty seeds, ten arms, all on the
same seeds. A network counts as trained from twice chance on.

- Share that trains: Fisher's exact test of each arm against its control, Holm's correction over all arms and conditions.
- Accuracy, seed by seed: paired t test against the control, Holm's correction likewise.
- Control: `linear+balance` for the linear arms and for `prototypes+balance`; `prototypes+balance` for all that adds to it.
- Shown: corrected p below 0.05 and better; refuted: below 0.05 and worse; not shown: anything else.

The runs are those of `studies.reproduction`'s stage "failure", by its code; here are the protocol and the page.
"""
