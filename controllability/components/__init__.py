"""The components, one idea a file."""

from controllability.components.activation import (
    AboveMean as AboveMean,
    Activation as Activation,
    Clamp as Clamp,
    SoftCap as SoftCap,
)
from controllability.components.bias import Bias as Bias
from controllability.components.collapse import Collapse as Collapse, Correction as Correction
from controllability.components.convolution import Taps as Taps, Window as Window
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
from controllability.components.streams import (
    InverseRms as InverseRms,
    Joined as Joined,
    NormalizeEach as NormalizeEach,
    Remixed as Remixed,
    Spread as Spread,
    Streams as Streams,
)
from controllability.components.times import Times as Times
from controllability.interfaces import Product as Product, Sequence as Sequence, Sum as Sum
