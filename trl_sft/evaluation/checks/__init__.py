"""Rule checks of answers: each is a function from an answer and what is expected to a score from 0 to 1.

In: texts. Out: scores. Deliberately absent: models, files of answers, averages.
"""
