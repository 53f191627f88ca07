"""What can be done to any method's merge; one file for each, its name is what `post` says in a recipe."""
