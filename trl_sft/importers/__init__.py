"""Settings of other trainers become a recipe.

In: a configuration of OpenRLHF, TRL, alignment-handbook, axolotl or LLaMA-Factory. Out: a recipe, and a
reason for each setting that is not in it. One module a tool; nothing else imports this folder but `cli`.
"""
