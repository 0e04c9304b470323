"""Settings of other trainers become a recipe.

Input: a configuration of OpenRLHF, TRL, alignment-handbook, axolotl or LLaMA-Factory. Output: a recipe, and a reason
for each setting that is not in it. Each tool has one module and one table. Only `cli` imports this folder.
"""
