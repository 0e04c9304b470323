"""What is in a set of rows that exists: the gates of `building.gates`, and tables of the whole set.

In: the rows of a file, a folder or a recipe. Out: which rows have a fault, what else is in the set, and a cleaned set.
No row is held in memory but those that are compared. Deliberately not here: the command (`cli.audit`) and the page
(`reports.audit_page`).
"""
