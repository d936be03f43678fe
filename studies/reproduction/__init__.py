"""The reproduction study of SR-MoE: tables 1 and 2 and figures 2 to 6 with seeds, intervals and controls.

    python -m studies.reproduction run --photos FOLDER     # or without --photos: the part on the embedded digits
    python -m studies.reproduction page                    # tables and pictures of docs/reproduction.md

`study.toml` is the protocol. `protocol` makes runs of it, `run` does them, `choice` picks the
setting that is put to the test, `saved` keeps the results in one small file. `statistics` computes from them. What the page
shows, each from the saved results alone: `headlines`, `answers`, `tables`, `printed` (the paper's differences), `parts`,
`routing`, `failing`, `sweep`, `stages` (choice and test), `posthoc`, `figures` and `curves`; `cells` writes numbers, `page`
puts all together.
"""
