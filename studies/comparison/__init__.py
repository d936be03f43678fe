"""Every penalty, balance loss and controller of the library in one experiment: the paper's four layers of four experts.

    python -m studies.comparison

Protocol, the same for every arm. A coefficient is chosen from a grid of four by the mean validation accuracy over tuning
seeds that are used for nothing else. Then new seeds are trained, paired: one seed means one split, one initialisation of the
stem and one order of batches for all arms. After training, the one-shot test runs at several rates, so that arms are compared
where they have learned equally much of the novel images.
"""
