"""The registered operators that rewritten graphs are made of.

Each stands for an ATen operator and gives the same values; what is added is in the backward, which hands the companions the
statistics of the per-sample gradients. All of them decompose to plain ATen in Inductor, so everything still fuses; what stays
opaque are the reductions that would otherwise need memory for one gradient per sample (`sums`, `embedding_sums`).

Companions come as a list for each parameter (empty where no statistic is wanted), in the order of ``wanted``, a string such as
``"square,norm"``; `statistics` says what each is.

Legend: N samples, S positions of one sample, I in, O out, V rows of a table, D width of a row.

Rows are grouped as in `sample_axis`: along ``axis`` of the input lie ``outer * num * inner`` rows, and row ``i`` belongs to
sample ``(i // inner) % num``. With ``per_token`` every row counts by itself.
"""

from graphopt.passes.truegrad.ops import collect as collect
from graphopt.passes.truegrad.ops import convolution as convolution
from graphopt.passes.truegrad.ops import embedding as embedding
from graphopt.passes.truegrad.ops import linear as linear
from graphopt.passes.truegrad.ops import per_sample as per_sample
from graphopt.passes.truegrad.ops import permutation as permutation
from graphopt.passes.truegrad.ops import sums as sums
from graphopt.passes.truegrad.ops import tied_embedding as tied_embedding
from graphopt.passes.truegrad.ops.registration import register_decompositions as register_decompositions
