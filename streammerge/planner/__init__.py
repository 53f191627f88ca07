"""From what the user asks to what the engine does: recipe, its dialect, the jobs, the plan.

    recipe.py     YAML -> Recipe: checked, frozen, one canonical form  (plain_yaml.py and checks.py read it)
    settings.py   a parameter's value by tensor name and depth: filters and gradients
    layers.py     which tensors form the layer stack, from their names alone
    config.py     config.json of a model whose layers or dtype changed
    groups.py     Recipe + checkpoints -> which tensors meet: models, slices, the base's part in them
    dialect.py    which parameters they meet with; resolve() gives the Resolution
    jobs.py       one Job per output tensor, checked against the headers
    layout.py     where every output tensor lies: shards, headers, offsets
    steps.py      the order of work: which slices are read together, and what is done with them
    plan.py       all of it cut to the budget: Plan

Nothing here reads a weight.
"""
