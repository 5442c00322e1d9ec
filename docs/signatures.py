"""What Griffe does not see right in a class that it inspects."""

from __future__ import annotations

from typing import Any

import griffe


class Signatures(griffe.Extension):
    """Show a class's ``__signature__``, and no docstring that an attribute has of its type."""

    def on_class_members(self, *, node: Any, cls: griffe.Class, **_: Any) -> None:
        """Griffe calls this for each class that it has inspected."""
        for member in cls.members.values():
            if isinstance(member, griffe.Attribute) and "property" not in member.labels:
                member.docstring = None
        signature = getattr(getattr(node, "obj", None), "__signature__", None)
        init = cls.members.get("__init__")
        if signature is None or not isinstance(init, griffe.Function):
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
