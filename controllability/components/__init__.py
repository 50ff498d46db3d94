"""The components, one idea a file."""

from controllability.components.activation import Activation as Activation, SoftCap as SoftCap
from controllability.components.bias import Bias as Bias
from controllability.components.fixed import Blend as Blend, Fixed as Fixed, Gate as Gate
from controllability.components.glu import XIELU as XIELU, Glu as Glu, Swish as Swish
from controllability.components.linear import Linear as Linear
from controllability.components.mixture import ExpertLinear as ExpertLinear, Mixture as Mixture, Share as Share
from controllability.components.normalisation import (
    Normalize as Normalize,
    layer_norm as layer_norm,
    rms_norm as rms_norm,
)
from controllability.components.residual import Identity as Identity, gated as gated, residual as residual
from controllability.components.routing import Routing as Routing
from controllability.components.scale import Scale as Scale
from controllability.components.select import Mixed as Mixed, Select as Select
from controllability.components.times import Times as Times
from controllability.interfaces import Product as Product, Sequence as Sequence, Sum as Sum
