"""A patch as an instrument: what each part of a context changed in the weights, and how that grew."""

from controllability.instrument.attribution import Attribution as Attribution, attribute as attribute
from controllability.instrument.dynamics import Dynamics as Dynamics, dynamics as dynamics
from controllability.instrument.surveys import Survey as Survey, read_survey as read_survey, survey as survey
