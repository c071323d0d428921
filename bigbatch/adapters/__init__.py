"""A schedule in the training loops of other frameworks: PyTorch, Trainer, Lightning, Optax.

Each file needs its framework and nothing else but `bigbatch.schedule`; nothing is imported here.
"""
