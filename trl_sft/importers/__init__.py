"""Settings of other trainers become a recipe.

Input: a configuration of OpenRLHF, TRL, alignment-handbook, axolotl or LLaMA-Factory. Output: a recipe, and a reason
for each setting that is not in it. One module and one table a tool; only `cli` imports this folder.
"""
