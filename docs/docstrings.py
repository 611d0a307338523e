"""Griffe extension: read a section `Example:` as code, as griffe reads `Examples:`."""

import re

from griffe import Extension


class ExampleSections(Extension):
    """Rename the section before it is parsed; a section with the other name would be shown as prose."""

    def on_object(self, *, obj, **kwargs) -> None:
        """Rename in the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
