"""Thin trainers for libraries that people train with, each imported only when asked for."""
