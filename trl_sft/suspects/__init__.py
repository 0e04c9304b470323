"""Which training rows hurt: cheap signals choose suspects, and paired short reruns measure them.

Inputs: a finished run, prepared again. Outputs: signals of rows, suspects, and the losses of held-out rows after
reruns. Not here: the command (`cli.suspects`), and what the losses tell (`evaluation.paired_reruns`).
"""
