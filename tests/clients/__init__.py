"""The recipes in the trainers that they are written for, installed: `python -m tests.clients`."""
