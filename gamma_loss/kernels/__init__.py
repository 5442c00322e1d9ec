"""The Triton kernels; nothing here is imported before a torch tensor asks for it."""
