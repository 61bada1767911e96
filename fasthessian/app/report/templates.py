"""The templates of the pages, which lie beside this module."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from fasthessian.errors import MissingPackageError

if TYPE_CHECKING:
    from jinja2 import Template


def content(name: str) -> str:
    """The text of a file of this folder."""
    return (files(__package__) / name).read_text("utf-8")


def template(name: str) -> Template:
    """The template in the file ``name``; it may extend others.

    Raises:
        ImportError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise MissingPackageError("the report needs jinja2; pip install jinja2") from error
    environment = Environment(
        loader=FunctionLoader(content),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
