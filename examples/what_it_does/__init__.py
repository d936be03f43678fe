"""One picture of what wrap_moe does: a mixture of experts, trained with its default term, with the penalty alone, and without.

    python -m examples.what_it_does --out what_it_does.png

The tokens come from eight groups, and each group asks for a linear map of its own. All share one strong direction, as hidden
states of language models do: a gate that follows it sends everything to the same experts. A linear gate sends every token to
two of eight linear experts. Everything is drawn from a seed; the three versions of a seed start equal and see equal batches.

Two settings were tried, each once. Without the shared direction (SHIFT = 0) the ranks part in the same way, and the load is
nearly even in all three versions.
"""
