"""What stands in the files: the safetensors header, the shard index, the table of dtypes.

Bytes in, plain values out, and the other way round; nothing here knows of models, budgets or plans.
"""
