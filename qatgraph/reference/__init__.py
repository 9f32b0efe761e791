"""The integer reference: what an int8 region computes, in exact integers. The oracle of every proof."""

from qatgraph.reference.elementwise import add, concat, leaky_relu, lookup, mul, sigmoid, softmax
from qatgraph.reference.grids import (
    Array,
    Grid,
    clamp,
    dequantize,
    dynamic_quantize,
    multiply_quantize,
    quantize,
    requantize,
)
from qatgraph.reference.linears import dequantize_blocks, linear_dynamic, linear_in_blocks, sum_slack
from qatgraph.reference.pooling import average_pool, global_average_pool, max_pool
from qatgraph.reference.products import (
    accumulate,
    accumulate_conv,
    conv,
    conv_float,
    gemm,
    linear,
    matmul,
    matmul_float,
    matmul_integer,
)
from qatgraph.reference.saturation import (
    accumulate_conv_pair16,
    accumulate_pair16,
    k_rows,
    saturated_share,
    worst_pair,
    worst_pairs,
)

__all__ = [
    "Array",
    "Grid",
    "accumulate",
    "accumulate_conv",
    "accumulate_conv_pair16",
    "accumulate_pair16",
    "add",
    "average_pool",
    "clamp",
    "concat",
    "conv",
    "conv_float",
    "dequantize",
    "dequantize_blocks",
    "dynamic_quantize",
    "gemm",
    "global_average_pool",
    "k_rows",
    "leaky_relu",
    "linear",
    "linear_dynamic",
    "linear_in_blocks",
    "lookup",
    "matmul",
    "matmul_float",
    "matmul_integer",
    "max_pool",
    "mul",
    "multiply_quantize",
    "quantize",
    "requantize",
    "saturated_share",
    "sum_slack",
    "sigmoid",
    "softmax",
    "worst_pair",
    "worst_pairs",
]
