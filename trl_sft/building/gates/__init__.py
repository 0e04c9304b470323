"""Quality gates: each looks at a row of an instruction set and says why it should not be trained, or nothing.

In: candidate rows, one after another. Out: a `Rejection` with the name of the gate and a sentence with the evidence.
`rules` are gates that need no other row; those that compare rows keep hashes of the rows that passed. No gate asks a
model. Deliberately not here: what happens to a rejected row (`building.screening`, `cli.audit`), and judges.
"""
