"""The pages of studies whose runs are not kept: what was saved of each is its tables, `docs/*_tables.md`.

    python -m studies.pages

reads these tables, folds them, and makes of their numbers the verdicts and pictures that the pages open with. After a new
run of a study, copy its `tables.md` over the one in `docs/` and run the command. Values of p come from the rounded numbers of
the tables.

tables          Markdown tables, read back        panels       a picture: a row an arm, a column a quantity
lines           a verdict on some numbers         comparison, regularizers, cnn_experts, language_model
"""
