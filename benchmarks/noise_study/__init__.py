"""Does γ-PO help under label noise? A study in which every method gets the same chances.

    python -m benchmarks.noise_study              # all runs, then all numbers
    python -m benchmarks.noise_study --quick      # a smoke test, under a minute
    python -m benchmarks.noise_study report       # all numbers, from the kept results alone

`tasks` and `raters` make the data, `train` does one run, `plan` says which runs there are, and
`outcomes` what came out; `report` writes docs/study/ and the table of docs/reproduction.md.
"""
