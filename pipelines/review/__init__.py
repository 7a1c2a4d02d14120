"""Review by people: a sample of a stage's rows as a page and as JSON Lines, their verdicts, and what these say of the stage.

A sample lies in `RUN/.review/STAGE/FINGERPRINT/samples`, verdicts beside it in `verdicts`.
"""
