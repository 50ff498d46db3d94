"""The components, one idea a file."""

from controllability.components.activation import Activation as Activation
from controllability.components.activation import SoftCap as SoftCap
from controllability.components.bias import Bias as Bias
from controllability.components.combinators import Identity as Identity
from controllability.components.combinators import Product as Product
from controllability.components.combinators import Sequence as Sequence
from controllability.components.combinators import Sum as Sum
from controllability.components.combinators import gated as gated
from controllability.components.combinators import residual as residual
from controllability.components.linear import Linear as Linear
from controllability.components.normalisation import Normalize as Normalize
from controllability.components.normalisation import layer_norm as layer_norm
from controllability.components.normalisation import rms_norm as rms_norm
from controllability.components.scale import Scale as Scale
from controllability.components.times import Times as Times
