"""What goes to the hub: the model card, the choice of files, the repository, the upload.

Inputs: folders of finished runs and of exports. Outputs: commits in a repository of the hub. Deliberately not here:
when a run pushes (`training.hub_push`), and questions about models and data sets to load (`recipe.hub`).
"""
