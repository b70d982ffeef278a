"""The class of a layer that is read in place of being called: is its product still the one of torch's class?

Any class may derive from nn.Linear or a convolution. Its object computes torch's product with the object's own weight
and bias if all that a call runs is torch's: the methods are compared, and a class that finds its attributes in a way
of its own is refused. torch's own methods count as replaced, too, where somebody has put others in their place.

    class X(nn.Linear) without a forward     torch's product
    X.forward, X.__call__, a mixin's, one put on nn.Linear, _conv_forward of the class or of the object
                                             somebody's code, which has to be called
    weight or bias of the class              a property: parametrizations of nn.utils make such a class
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import NamedTuple

from torch import nn
from torch.fx.experimental.proxy_tensor import _AttrProxy

CALLING = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")
"""The methods by which an object is called and its weight is found; those of nn.Module, or its code must run."""


class Product(NamedTuple):
    """A class whose objects multiply x with their weight, and the methods that do it, as they were first seen."""

    cls: type[nn.Module]
    methods: dict[str, FunctionType | None]

    def __str__(self) -> str:
        return f"nn.{self.cls.__name__}" if self.cls.__module__.startswith("torch.") else self.cls.__name__


def product_of(cls: type[nn.Module], *methods: str) -> Product:
    """`cls` with these methods; None for one that another module has already put in place of the class's own."""
    home = vars(sys.modules[cls.__module__])
    found = {name: getattr(cls, name) for name in methods}
    own = {name: method if getattr(method, "__globals__", None) is home else None for name, method in found.items()}
    return Product(cls, own)


LINEAR = product_of(nn.Linear, "forward")
CONVOLUTIONS = {cls: product_of(cls, "forward", "_conv_forward") for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
PRODUCTS = {nn.Linear: LINEAR} | CONVOLUTIONS
"""torch's classes whose objects are read and not called."""


def why_replaced(part: str, module: nn.Module) -> str | None:
    """The reason why an object of one of torch's classes, and of none derived from it, does not compute its product.

    Beside a forward on the object, at which why_not_bypass looks.
    """
    module = _itself(module)
    product = PRODUCTS.get(type(module))
    return None if product is None else _why_not_methods(part, module, product)


def why_not_product(part: str, module: nn.Module, product: Product, expected: str | None = None) -> str | None:
    """The reason why calling `module` is not the product of that class with the module's own weight and bias."""
    module = _itself(module)
    if not isinstance(module, product.cls):
        return f"{part} is a {class_name(module)}; expected {expected or product}"
    return _why_not_methods(part, module, product) or why_not_attributes(part, module)


def _why_not_methods(part: str, module: nn.Module, product: Product) -> str | None:
    for name, own in product.methods.items():
        if getattr(type(module), name) is not own:
            return f"{part} is a {class_name(module)}, whose {name} is not {product}'s own"
    return why_hidden(part, module) if "_conv_forward" in product.methods else None


def why_hidden(part: str, module: nn.Module, methods: tuple[str, ...] = ("_conv_forward",)) -> str | None:
    """The reason why an attribute of `module` hides a method of its class."""
    found = next((name for name in methods if name in module.__dict__), None)
    return None if found is None else f"the {found} of {part} was replaced on the instance"


def why_not_attributes(part: str, module: nn.Module) -> str | None:
    """The reason why `module` may be called, or its weight and bias found, otherwise than an nn.Module's."""
    module = _itself(module)
    cls = type(module)
    for name in CALLING:
        if getattr(cls, name) is not getattr(nn.Module, name):
            return f"{part} is a {class_name(module)}, whose {name} is not nn.Module's own"
    for name in ("weight", "bias"):
        if hasattr(cls, name):
            return f"{part} is a {class_name(module)}, whose {name} is an attribute of the class"
    return why_hidden(part, module, ("_call_impl", "_wrapped_call_impl"))


def _itself(module: nn.Module) -> nn.Module:
    """The module for which torch.export's tracer hands out an object of a class of its own."""
    return module.get_base() if isinstance(module, _AttrProxy) else module


def class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
