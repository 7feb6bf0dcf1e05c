"""One file an op: the torch reference that is the law, the Triton form, and the `torch.library` registration."""
