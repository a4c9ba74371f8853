"""A branch made ready for one call: the interface, combinators and layers. Tensors only, those of the call."""

from iresflow_plugin.maps.combinators import Composition, Concatenation, Shares, Sum
from iresflow_plugin.maps.convolution import CONVOLUTIONS, Convolution, ConvSpec
from iresflow_plugin.maps.derivatives import jacobian_columns, pull_back, push_forward, recomputed, transposed_jacobian
from iresflow_plugin.maps.layers import (
    Affine,
    Elementwise,
    Reshape,
    Scaling,
    Shift,
    Stated,
    Watched,
    show_inputs,
    show_output,
)
from iresflow_plugin.maps.map import Around, Endomap, Linearised, Map
from iresflow_plugin.maps.rounding import Products, Rounded, elementwise, products_for

__all__ = [
    "CONVOLUTIONS",
    "Affine",
    "Around",
    "Composition",
    "Concatenation",
    "ConvSpec",
    "Convolution",
    "Elementwise",
    "Endomap",
    "Linearised",
    "Map",
    "Products",
    "Reshape",
    "Rounded",
    "Scaling",
    "Shares",
    "Shift",
    "Stated",
    "Sum",
    "Watched",
    "elementwise",
    "jacobian_columns",
    "products_for",
    "pull_back",
    "push_forward",
    "recomputed",
    "show_inputs",
    "show_output",
    "transposed_jacobian",
]
