"""A patch as an instrument: what each part of a context changed in the weights, and how that grew."""

from controllability.instrument.attribution import Attribution as Attribution, attribute as attribute
from controllability.instrument.dynamics import Dynamics as Dynamics, dynamics as dynamics
