"""LenVM: Length Value Models. Know, steer and see how long a language model's answer will be."""

from lenvm.errors import LenVMError

__version__ = "0.1.0"

__all__ = ["LenVMError", "__version__"]
