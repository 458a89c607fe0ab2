"""Several processes as one run: who each is, what they agree on, and how they are started.

The ranks are started by torchrun (or `mlx.launch`); what they compute together is the backend's. Here is the rest.
"""
