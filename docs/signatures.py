"""Corrections to what Griffe finds in classes and in the package."""

from __future__ import annotations

import dataclasses
from typing import Any

import griffe


class Signatures(griffe.Extension):
    """Show this package's own parameters, and no docstring that an attribute has from its type."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """A function hides the module of its name, as it does at import."""
        for name, module in list(pkg.modules.items()):
            if name in module.functions:
                pkg.members[name] = griffe.Alias(name, module[name], parent=pkg)

    def on_class_members(self, *, node: Any, cls: griffe.Class, **_: Any) -> None:
        """Griffe calls this for each class that it has inspected."""
        for member in cls.members.values():
            if isinstance(member, griffe.Attribute) and "property" not in member.labels:
                member.docstring = None
        kind = getattr(node, "obj", None)
        signature = getattr(kind, "__signature__", None)
        init = cls.members.get("__init__")
        if not isinstance(init, griffe.Function):
            return
        if dataclasses.is_dataclass(kind):  # of a trainer's hundred options only our own
            ours = {name for base in kind.__mro__ if base.__module__.startswith("gamma_loss")
                    for name in vars(base).get("__annotations__", ())}  # fmt: skip
            if len(init.parameters) > 2 * len(ours):
                shown = [each for each in init.parameters if each.name in {"self", *ours}]
                rest = griffe.Parameter("options", kind=griffe.ParameterKind.var_keyword)
                init.parameters = griffe.Parameters(*shown, rest)
        if signature is None:
            return
        own = [each for each in init.parameters if each.kind.name != "var_keyword"]
        known = {each.name for each in own}
        shared = [
            griffe.Parameter(
                name, kind=griffe.ParameterKind.keyword_only,
                default=None if each.default is each.empty else repr(each.default),
            )
            for name, each in signature.parameters.items() if name not in known
        ]  # fmt: skip
        init.parameters = griffe.Parameters(*own, *shared)
