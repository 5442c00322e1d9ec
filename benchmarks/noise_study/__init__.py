"""The study on label noise.

`tasks` and `raters` make the data, `train` does one run, `plan` says which runs there are,
`outcomes` what came out, and `report` writes it to docs/. `suspects` is a study of its own.
"""
