"""Does γ-PO help under label noise? A study in which every method gets the same chances.

    python -m benchmarks.noise_study              # all runs, then all tables and figures
    python -m benchmarks.noise_study --quick      # a smoke test, under a minute
    python -m benchmarks.noise_study report       # tables and figures from the results file alone

`tasks` (and `raters`) make the data, `train` does one run, `plan` says which runs there are.
`outcomes` looks up what came out, `tables` and `figures` show it, and `report` writes the two
pages, docs/reproduction.md and docs/reproduction_tables.md.
"""
